"""Trainings that are rehearsed, and who rehearses them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_graphon.callbacks._module.batches import train_batches
from lightning_graphon.callbacks._module.pool import draw_data
from lightning_graphon.callbacks._module.training_step import TrainingStepObjective
from lightning_graphon.callbacks._rehearsal.rehearse import rehearse_fit
from tests.helpers.kinds import Dicts, FromDict, Gpt, Talks, Transfer, adamw, small_sgd, tokens
from tests.helpers.modules import Classifier, Gan, cnn, loader, make_trainer, mlp, quiet


class Rehearses(Callback):
    """Rehearses the steps that follow a given one, and measures the same probe when they are real.

    Args:
        steps: Number of steps.
        at: The optimizer step from which on.
        true_batches: Rehearse on the very batches that training sees, epoch by epoch.
        pruner: Its masks are enforced.
        arguments: For `rehearse_fit`.
    """

    def __init__(self, steps=4, at=0, true_batches=True, pruner=None, **arguments):
        self.count, self.at, self.true_batches, self.pruner, self.arguments = steps, at, true_batches, pruner, arguments
        self.rehearsed, self.observed = None, []

    def rehearse(self, trainer, pl_module):
        data = draw_data(trainer, pl_module, 20, 48)
        probe, pool = data.probe, data.drawn
        self.objective = TrainingStepObjective(trainer, pl_module)
        self.batch, self.last, self.steps = probe, trainer.global_step, []
        self.look(trainer)
        arguments = {"seed": 0, "masks": self.pruner and self.pruner.masks, "steps": range(self.count + 1)}
        if self.true_batches:
            epoch = train_batches(trainer, pl_module, int(trainer.num_training_batches), raw=True)
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            # A loader begins anew where a fit is resumed.
            rest = epoch[: len(epoch) - done] if trainer.fit_loop.epoch_loop.restarting else epoch[done:]
            arguments |= {"seed": None, "batches": rest + epoch * 50}
        self.rehearsed = rehearse_fit(trainer, pl_module, pool=pool, probe=probe, **arguments | self.arguments).losses

    def look(self, trainer):
        self.observed.append(self.objective.observed(self.batch))
        self.steps.append(trainer.global_step - self.at)

    def on_train_start(self, trainer, pl_module):
        if trainer.global_step == self.at and self.rehearsed is None:
            self.rehearse(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.rehearsed is None and trainer.global_step == self.at:
            self.rehearse(trainer, pl_module)
        elif self.rehearsed is not None and trainer.global_step > self.last and self.steps[-1] < self.count:
            self.last = trainer.global_step
            self.look(trainer)

    def compare(self):
        """Losses at the steps that training stops at; manual optimisation may take several between two looks."""
        return [self.rehearsed[step] for step in self.steps if step <= self.count], self.observed[: len(self.steps)]


class OneCycle(Classifier):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-2, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Cosine(Classifier):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)]


class Plateau(Classifier):
    """The learning rate falls where a metric of validation does not."""

    def configure_optimizers(self):
        optimizer = small_sgd(self.parameters())
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class Hooked(Classifier):
    """Hooks of its own, which must run once on the way to each step: none of them twice."""

    scale, calls = 1.0, 0

    def on_fit_start(self):
        self.scale *= 0.5

    def on_train_start(self):
        self.scale *= 3.0
        self.net[0].weight.register_hook(lambda gradient: -gradient)

    def on_train_batch_start(self, batch, batch_idx):
        self.calls += 1

    def training_step(self, batch, batch_idx):
        return (self.scale + 0.1 * self.calls) * super().training_step(batch, batch_idx)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.sign_()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        with torch.no_grad():
            self.net[0].bias.mul_(0.9)


class HookedEarly(Hooked):
    """Its hook on a gradient is there before the fit."""

    def __init__(self):
        super().__init__()
        self.net[2].weight.register_hook(lambda gradient: gradient.flip(0))


class ReadsTrainer(Classifier):
    """Everything that user code asks its trainer for goes into the loss."""

    def training_step(self, batch, batch_idx):
        t = self.trainer
        facts = [t.max_epochs, t.max_steps, t.num_training_batches, t.current_epoch, t.global_step, t.world_size]
        facts += [t.estimated_stepping_batches, len(t.train_dataloader), batch_idx, t.accumulate_grad_batches]
        facts += [len(str(t.log_dir)), len(t.default_root_dir), t.custom, float(t.is_last_batch), t.log_every_n_steps]
        self.log("loss", loss := super().training_step(batch, batch_idx), on_step=True, on_epoch=True)
        return loss * (1 + 0.001 * sum(facts))


class Metrics(Classifier):
    """Logs a metric that the module holds."""

    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10)

    def training_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


class Output(dict):
    """As the outputs of transformers: a dict with attributes."""

    __getattr__ = dict.__getitem__


class HuggingFace(Classifier):
    def training_step(self, batch, batch_idx):
        output = Output(logits=self(batch["image"]))
        output["loss"] = F.cross_entropy(output.logits, batch["label"])
        return output


class Data(pl.LightningDataModule):
    """Changes batches on their way, by numbers at random."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def train_dataloader(self):
        return loader(96)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.moved += 1
        return [batch[0] + 0.1 * torch.rand_like(batch[0]), *batch[1:]]


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def scaled():
    """Mixed precision with a scaler so large that the first steps are skipped."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2))


def normed():
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def dicts():
    return DataLoader(Dicts(), batch_size=16)


@dataclass(frozen=True)
class Case:
    build: Callable[[], pl.LightningModule] = Classifier
    data: Callable[[], Any] = loader
    trainer: dict[str, Any] | Callable[[], dict[str, Any]] = field(default_factory=dict)
    pruned: bool = False
    steps: int = 4


CASES = {
    "plain": Case(),
    "adam": Case(lambda: Classifier(mlp, adam)),
    "lbfgs": Case(lambda: Classifier(mlp, lbfgs)),
    "amp": Case(lambda: Classifier(cnn, adam), trainer={"precision": "bf16-mixed"}),
    "scaler": Case(lambda: Classifier(mlp, adam), trainer=lambda: {"plugins": [scaled()]}),
    "half": Case(lambda: Classifier(mlp, adam), trainer={"precision": "bf16-true"}),
    "double": Case(trainer={"precision": "64-true"}),
    "accumulation": Case(trainer={"accumulate_grad_batches": 2, "max_epochs": 4}, steps=5),
    "clipping by norm": Case(trainer={"gradient_clip_val": 0.1}),
    "clipping by value": Case(trainer={"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}),
    "one cycle": Case(OneCycle, trainer={"max_epochs": 3}, steps=8),
    "one cycle, limited": Case(OneCycle, trainer={"max_epochs": -1, "max_steps": 7}, steps=7),
    "epoch schedule": Case(Cosine, trainer={"max_epochs": 4}, steps=10),
    "plateau": Case(Plateau, trainer={"max_epochs": 3}, steps=6),
    "gan": Case(Gan, steps=6),
    "batch norm": Case(lambda: Classifier(normed)),
    "batch norm, dropout": Case(lambda: Classifier(cnn)),
    "pruned": Case(lambda: Classifier(cnn, adam), pruned=True),
    "pruned, sgd": Case(pruned=True),
    "hooks": Case(HookedEarly, trainer={"max_epochs": 2}, steps=5),
    "reads trainer": Case(ReadsTrainer, trainer={"max_epochs": 2}, steps=5),
    "metrics": Case(Metrics, trainer={"max_epochs": 2}, steps=5),
    "talks": Case(lambda: Talks(mlp, small_sgd), trainer={"max_epochs": 2}, steps=5),
    "dict batches": Case(lambda: FromDict(mlp, small_sgd), dicts),
    "outputs of transformers": Case(lambda: HuggingFace(mlp, adamw), dicts),
    "gpt": Case(Gpt, tokens, steps=3),
    "frozen backbone": Case(Transfer),
    "datamodule": Case(data=Data),
}


def fit(case, *callbacks, ckpt_path=None, **kwargs):
    """Fit a case's module; the trainer and what the module has become."""
    pruner = [quiet("snip", 0.9)] if case.pruned else []
    for callback in callbacks:
        callback.pruner = pruner[0] if pruner else None
    own = case.trainer() if callable(case.trainer) else case.trainer
    arguments = {"limit_train_batches": 4, "num_sanity_val_steps": 0, **own, **kwargs}
    trainer = make_trainer(*pruner, *callbacks, **arguments)
    trainer.custom = 3
    torch.manual_seed(5)
    module, data = case.build(), case.data()
    validation = {"val_dataloaders": loader(32)} if hasattr(data, "dataset") and case.build is Plateau else {}
    trainer.fit(module, data, **validation, ckpt_path=ckpt_path)
    return trainer, module
