"""Steps and samplers that meet the other process, under two processes (strategy="ddp"), one of which analyses alone.

Not a test by itself: `test_alone.py` starts it and looks at what every rank wrote.
"""

import logging
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, SpectrumOptions
from tests.helpers.leaving import write_and_leave
from tests.helpers.modules import Classifier, digits, make_trainer, quiet

LIMIT = timedelta(seconds=60)  # of a process that waits for one that does not come
STEPS = {
    "nothing": lambda module, loss: None,
    "log_dir": lambda module, loss: module.trainer.log_dir,
    "sync_dist": lambda module, loss: module.log("loss", loss, sync_dist=True),
    "barrier": lambda module, loss: module.trainer.strategy.barrier(),
    "all_gather": lambda module, loss: module.all_gather(loss.detach()),
    "reduce": lambda module, loss: module.trainer.strategy.reduce(loss.detach()),
    "torch.distributed": lambda module, loss: dist.all_reduce(loss.detach().clone()),
    "later": lambda module, loss: module.trainer.global_step >= 2 and module.all_gather(loss.detach()),
}


class Meets(Classifier):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        STEPS[self.kind](self, loss)
        return loss


class SharedSeed(DistributedSampler):
    """Asks the other process for the order of each epoch."""

    def __iter__(self):
        seed = torch.tensor([self.epoch])
        dist.broadcast(seed, 0)
        self.epoch = int(seed)
        return super().__iter__()


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def fit(kind, sampler=DistributedSampler, watched=True, predict=("kernel", "rehearsal")):
    told = Messages()
    logging.getLogger("lightning_graphon").addHandler(told)
    graphons = GraphonMonitor(
        verbose=False, figure=False, spectrum=SpectrumOptions(probe_size=16, every_n_epochs=1), time_budget=1e9
    )
    losses = LossDecayMonitor(
        predict=predict, probe_size=16, every_n_steps=1, figure=False, verbose=False, time_budget=1e9
    )
    monitors = [graphons, losses] if watched else []
    pruner, model = quiet("snip", batches=2), Meets(kind)
    data = TensorDataset(*digits(96))
    loader = DataLoader(data, 16, sampler=sampler(data, num_replicas=2, rank=dist.get_rank()))
    trainer = make_trainer(
        pruner, *monitors, strategy=DDPStrategy(process_group_backend="gloo", timeout=LIMIT), devices=2, max_epochs=2,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, loader)
    logging.getLogger("lightning_graphon").removeHandler(told)
    return {
        "steps": trainer.global_step,
        "told": told.texts,
        "trace": graphons.spectrum and graphons.spectrum.trace,
        "observed": losses.curves["observed"],
        "predicted": losses.curves["predicted"],
        "shadows": {"broadcast", "barrier"} & vars(trainer.strategy).keys(),
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


def main(folder):
    warnings.simplefilter("ignore")
    # The first trainer starts the second process; what it trains is of no interest.
    make_trainer(strategy=DDPStrategy(process_group_backend="gloo", timeout=LIMIT), devices=2, max_steps=1).fit(
        Classifier(), DataLoader(TensorDataset(*digits(32)), 16)
    )
    found = {kind: fit(kind) for kind in STEPS}
    found["sampler"] = fit("nothing", SharedSeed)
    for kind in ("torch.distributed", "sync_dist"):
        found[f"{kind}, copies"] = fit(kind, predict=("replay", "rehearsal"))
    found["unwatched"] = fit("nothing", watched=False)
    write_and_leave(found, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
