"""`rehearse_fit`: the loss of the next steps of a training, from training a copy."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from typing_extensions import override

from lightning_graphon._shared.module_state import preserve_module_state
from lightning_graphon.callbacks._distributed.first_process import OtherProcessesNeededError, first_process_alone
from lightning_graphon.callbacks._module.batches import undisturbed_data
from lightning_graphon.callbacks._module.muted_loggers import muted_loggers
from lightning_graphon.callbacks._module.pool import DataExhaustedError, PoolLoader
from lightning_graphon.callbacks._module.probe import samples, training_batch_size
from lightning_graphon.callbacks._module.training_step import ModuleLoss, TrainingStepObjective
from lightning_graphon.callbacks._rehearsal.module_copy import (
    copy_gradients,
    copy_module,
    refuse_what_cannot_be_copied,
    release,
)
from lightning_graphon.callbacks._rehearsal.moving_masks import MovingMasks
from lightning_graphon.callbacks._rehearsal.nested_trainer import NestedTrainer, silenced
from lightning_graphon.dynamics import UnsupportedTrainingError
from lightning_graphon.pruning import Enforcer, Masks, MaskUpdater


@dataclass(frozen=True)
class Changed:
    """What the change of a copy brings with it.

    Attributes:
        masks: In place of those of the module; None: the same.
        prepare: Called with the optimizers before the first step.
    """

    masks: Masks | None = None
    prepare: Callable[[Sequence[Optimizer]], object] = lambda optimizers: None


@dataclass(frozen=True)
class Rehearsed:
    """What a nested fit has shown.

    Attributes:
        losses: For each step that was reached.
        rates: Learning rates of the parameter groups in every step; of several optimizers, in the order of their steps.
    """

    losses: list[float]
    rates: list[list[float]]


Change = Callable[[pl.LightningModule], Changed | None]


def rehearse_fit(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    *,
    pool: list[Any],
    probe: Any,
    others: Sequence[Any] = (),
    share: float = 0.0,
    steps: Sequence[int],
    seed: int | None,
    masks: Masks | None,
    moving: Sequence[MaskUpdater] = (),
    change: Change | None = None,
    seconds: float = math.inf,
    progress: Callable[[int], object] | None = None,
    loss_fn: ModuleLoss | None = None,
    resume: bool = True,
    batches: Iterable[Any] | None = None,
) -> Rehearsed:
    """The loss of a probe during the next optimizer steps, by a nested fit of a deep copy of the module.

    The copy trains as the module will: its own `training_step`, optimizers, schedulers, closures and manual
    optimisation, with the trainer's precision, clipping and accumulation, on one device, with the batch of all
    processes together. Its masks change as those of the module will. Its hooks run, `on_train_start` included;
    `on_fit_start` has run on the module, and the copy has what it did. Other callbacks do not run, nor does validation:
    what they change during training (an average of weights, another accumulation, a layer that thaws, a learning rate
    on a plateau) is not rehearsed.

    A rehearsed step takes the time of a training step, the rest a few hundredths of a second. Memory: the copy and its
    optimizers' states, freed at the end. Afterwards all is as before: weights, buffers, gradients, random generators,
    loggers, metrics, data and trainer.

    Args:
        trainer: Fits the module; to be called in a callback's `on_train_start` or later, by one process.
        pl_module: The module.
        pool: Batches as the dataloader yields them, to train on; see `draw_data`.
        probe: A batch on the module's device; its loss is measured in eval mode.
        others: Batches whose samples come among those of the pool.
        share: Part of all samples that they are.
        steps: Optimizer steps from now, ascending; 0 is before the first of them. As the trainer counts them: where a
            batch makes several, as with two optimizers, each is measured when its batch is done.
        seed: Seed of the order of minibatches and of all generators; None goes on with the generators as they are.
        masks: Kept in force; None for a dense network.
        moving: What changes some of them; left as it is.
        change: Changes the copy before it trains.
        seconds: Stop after this time, checked at every step.
        progress: Called with the number of steps done, after each.
        loss_fn: `loss_fn(pl_module, batch)` -> scalar in place of `training_step` for the probe.
        resume: Optimizers and schedulers go on from the states of the real ones; otherwise they begin anew.
        batches: Train on these, as the dataloader yields them and in this order, in place of the pool.

    Raises:
        UnsupportedTrainingError: The module cannot be copied, or its copy cannot train; one sentence says why.
        OtherProcessesNeededError: Its step calls processes that do not take part.
    """
    started = perf_counter()
    refuse_what_cannot_be_copied(trainer, pl_module)
    watch = _Watch(trainer.global_step, steps, started + seconds, progress, pl_module)
    gradients = [parameter.grad for parameter in pl_module.parameters()]
    loader = PoolLoader(
        pool, _global_batch_size(trainer, pool), trainer.num_training_batches, seed or 0, batches, others, share
    )
    with (
        silenced(),
        first_process_alone(trainer, "training_step"),
        undisturbed_data(trainer, pl_module, trainer.train_dataloader, seed),
        preserve_module_state(pl_module, seed),
        torch.enable_grad(),
    ):
        try:
            nested = NestedTrainer(trainer, watch)
            nested.loggers = trainer.loggers
            with muted_loggers(nested):
                twin = copy_module(trainer, pl_module, nested)
                try:
                    copy_gradients(gradients, twin)
                    changed = (None if change is None else change(twin)) or Changed()
                    masks = changed.masks or masks
                    nested.attach(twin, loader)
                    nested.setup(resume)
                    if masks is not None and moving:
                        nested.callbacks.insert(0, MovingMasks(masks, moving, twin, nested))
                    elif masks is not None:
                        Enforcer(twin, masks, *nested.optimizers)
                    changed.prepare(nested.optimizers)
                    watch.begin(lambda: TrainingStepObjective(nested, twin, loss_fn).observed(probe))
                    nested.run()
                finally:
                    release(twin, nested, (*pl_module.parameters(), *pl_module.buffers()))
        except (_RehearsalOver, DataExhaustedError):
            pass
        except (UnsupportedTrainingError, OtherProcessesNeededError):
            raise
        except Exception as error:
            raise UnsupportedTrainingError(f"the rehearsal failed ({type(error).__name__}: {error})") from error
    return Rehearsed(watch.losses, watch.rates)


def _global_batch_size(trainer: pl.Trainer, pool: list[Any]) -> int:
    """Samples of a step's batch over all processes; where the loader does not say, of the pool's largest."""
    return (training_batch_size(trainer) or max(map(samples, pool), default=0) or 1) * trainer.world_size


class _RehearsalOver(Exception):  # noqa: N818 - no error
    """All steps are done, or the time is over."""


class _Watch(Callback):
    """Measures the probe at the asked steps of a nested fit and ends it.

    Attributes:
        losses: Of the steps that were reached.
        rates: Of the steps that were taken.
    """

    def __init__(
        self, first: int, steps: Sequence[int], until: float, progress: Callable[[int], object] | None,
        original: pl.LightningModule,
    ) -> None:  # fmt: skip
        self.losses: list[float] = []
        self.rates: list[list[float]] = []
        self._first, self._steps, self._until, self._progress = first, list(steps), until, progress
        self._original, self._done = original, 0

    def begin(self, measure: Callable[[], float]) -> None:
        """Measure before the first step.

        Args:
            measure: Gives the loss of the copy now.
        """
        self._measure = measure
        self._look(0)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._done == 0 and any(parameter.grad is not None for parameter in self._original.parameters()):
            raise UnsupportedTrainingError(
                "training_step of a copy still trains the module itself, through a function that it holds"
            )
        done = trainer.global_step - self._first
        if done > self._done and self._progress is not None:
            self._progress(done)
        self._done = done
        self._look(done)

    def _look(self, done: int) -> None:
        """Measure if a step is due that has not been; end if none is left or no time is."""
        due = sum(step <= done for step in self._steps) - len(self.losses)
        if due > 0:
            self.losses.extend([self._measure()] * due)
        if len(self.losses) == len(self._steps) or perf_counter() >= self._until:
            raise _RehearsalOver
