"""Runs under two processes (strategy="ddp"): the first one rehearses, and the second does not wait for it.

Not a test by itself: `test_rehearsal_ddp.py` starts it and looks at what it wrote.
"""

import sys
from pathlib import Path

import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback

from lightning_graphon.callbacks._module.pool import draw_data
from lightning_graphon.callbacks._rehearsal.nested_trainer import NestedTrainer
from lightning_graphon.callbacks._rehearsal.rehearse import rehearse_fit
from tests.helpers.leaving import write_and_leave
from tests.helpers.modules import Classifier, cnn, loader, make_trainer


class Synchronises(Classifier):
    """Everything that would wait for the other process."""

    def __init__(self):
        super().__init__(cnn)
        self.metric = torchmetrics.MeanMetric()
        self.sizes, self.worlds = [], set()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.metric.update(loss)
        if isinstance(self.trainer, NestedTrainer):
            self.metric.compute()
            self.all_gather(loss)
            SEEN.append((len(batch[1]), self.trainer.world_size))
        self.log("loss", loss, sync_dist=True, on_step=True, on_epoch=True)
        self.log("metric", self.metric)
        return loss


class Rehearses(Callback):
    losses = None

    def on_train_start(self, trainer, pl_module):
        if trainer.is_global_zero:
            data = draw_data(trainer, pl_module, 8, 24)
            probe, pool = data.probe, data.drawn
            self.losses = rehearse_fit(
                trainer, pl_module, pool=pool, probe=probe, steps=range(5), seed=0, masks=None
            ).losses


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


SEEN = []


def fit(*callbacks):
    torch.manual_seed(3)
    losses = Losses()
    trainer = make_trainer(*callbacks, losses, strategy="ddp", devices=2, max_epochs=2)
    model = Synchronises()
    trainer.fit(model, loader(shuffle=True))
    return losses.seen, {name: p.detach().clone() for name, p in model.named_parameters()}


if __name__ == "__main__":
    rehearsal = Rehearses()
    plain, rehearsed = fit(), fit(rehearsal)
    write_and_leave(
        {"plain": plain, "rehearsed": rehearsed, "losses": rehearsal.losses, "seen": SEEN}, Path(sys.argv[1])
    )
