"""Predicted and observed loss of one fit, in the process that measures it: what is done when, and what is said."""

import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_graphon._shared.module_state import preserve_module_state
from lightning_graphon.callbacks._analysis.masks_in_use import masks_in_use
from lightning_graphon.callbacks._distributed.optimizer_view import OptimizerView
from lightning_graphon.callbacks._logging.scalars import log_scalars
from lightning_graphon.callbacks._loss import report
from lightning_graphon.callbacks._loss.options import Options
from lightning_graphon.callbacks._loss.record import LossRecord
from lightning_graphon.callbacks._loss.watch import LossWatch, following
from lightning_graphon.callbacks._module.network import UnreadableStepError, read_network
from lightning_graphon.callbacks._module.probe import batches_seen, draw_probe, samples, training_points
from lightning_graphon.callbacks._module.training_step import ModuleLoss, TrainingStepObjective

log = logging.getLogger(__name__)
# What reading the state of another program, or of another version, may raise.
FOREIGN = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)


class LossRun:
    """Measures the loss of a probe during one fit and predicts it, as long as that can be done.

    Args:
        trainer: Fits the module.
        pl_module: The module.
        optimizer: Trains it; None where there are several.
        options: What the user chose.
        loss_fn: In place of `training_step`.
        record: Goes on with it.

    Attributes:
        watch: Predicts; None where nothing is predicted.
        record: Numbers.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: OptimizerView | None, options: Options,
        loss_fn: ModuleLoss | None, record: LossRecord,
    ) -> None:  # fmt: skip
        self._trainer, self._module, self._optimizer = trainer, pl_module, optimizer
        self.options, self.record = options, record
        self.watch: LossWatch | None = None
        report.chart_together(trainer)
        self._objective = TrainingStepObjective(trainer, pl_module, loss_fn)
        self._batch = draw_probe(trainer, pl_module, options.probe_size, options.probe_seed, batches_seen(trainer))

    def begin(self, restored: Mapping[str, Any] | None) -> int:
        """Read the network, go on from a checkpoint's state, and look; the step of the next look."""
        try:
            self.watch = self._new_watch()
            if restored and not self._resume(self.watch, restored):
                self.watch = self._new_watch()
        except UnreadableStepError as error:
            self._give_up(str(error))
        return self.look() if self._trainer.global_step >= self.next_look() else self.next_look()

    def _new_watch(self) -> LossWatch:
        if self._optimizer is None:
            raise UnreadableStepError(f"there are {len(self._trainer.optimizers)} optimizers, and one is needed")
        if self.record.gave_up is not None:
            raise UnreadableStepError(self.record.gave_up)
        trainer, batch = self._trainer, self._batch
        network = read_network(self._objective, self._module, batch)
        masks, size = masks_in_use(trainer, self._module), max(training_points(trainer), samples(batch))
        batch_size = getattr(trainer.train_dataloader, "batch_size", None)
        return LossWatch(self.options, network, self._optimizer, masks, size, trainer.global_step, batch_size)

    def _resume(self, watch: LossWatch, restored: Mapping[str, Any]) -> bool:
        """Go on from a checkpoint's state; a state that does not fit is left, with a word."""
        now = self.options.identity()
        try:
            if restored["settings"] != now:
                raise ValueError(f"it was made with {restored['settings']}, and now it is {now}")
            watch.load_state_dict(restored["watch"])
        except FOREIGN as error:
            log.warning(
                "LossDecayMonitor starts anew at step %d: the checkpoint's prediction does not fit, %s",
                self._trainer.global_step, error,
            )  # fmt: skip
            self.record.rows, self.record.void_from = [], None
            return False
        self.record.void_from = None if watch.void is None else watch.void[0]
        return True

    def advance(self) -> None:
        """Follow the step that the optimizer is about to take."""
        if self.watch is not None:
            try:
                self.watch.advance()
            except UnreadableStepError as error:
                self._give_up(str(error))

    def next_look(self) -> int:
        """Step at which the loss is to be measured next."""
        before = self.record.last_step
        return self.watch.next_look(before) if self.watch else following(self.options.every_n_steps, before)

    def look(self) -> int:
        """Measure the loss now; the step of the next look."""
        values = self._measured()
        log_scalars(self._trainer, {f"loss_decay/{name}": value for name, value in values.items()})
        self.record.add(self._trainer.global_step, values)
        self._tell_void()
        return self.next_look()

    def _measured(self) -> dict[str, float]:
        if self.watch is not None:
            try:
                return self.watch.observe(self._trainer.global_step, self.record.last_step)
            except UnreadableStepError as error:
                self._give_up(str(error))
        return {"observed": self._observed()}

    @torch.no_grad()
    def _observed(self) -> float:
        with preserve_module_state(self._module):
            self._module.eval()
            return float(self._objective.loss(self._batch))

    def _tell_void(self) -> None:
        if self.watch is None or self.watch.void is None or self.record.void_from is not None:
            return
        step, reason = self.watch.void
        self.record.void_from = step
        log.warning("LossDecayMonitor: from step %d on the prediction of the start no longer holds: %s", step, reason)

    def _give_up(self, reason: str) -> None:
        """No prediction from here on; the observed loss goes on."""
        self.watch, self.record.gave_up = None, reason
        log.warning(
            "LossDecayMonitor predicts nothing from step %d on: %s. The observed loss is logged.",
            self._trainer.global_step, reason,
        )  # fmt: skip

    @property
    def short(self) -> bool:
        """Whether there is one measurement or prediction only, at an earlier step: a curve has two points."""
        few = 1 in (len(self.record.rows), self._predicted())
        return few and self._trainer.global_step > self.record.last_step

    def _predicted(self) -> int:
        """Number of points with a prediction; the first is where it was made."""
        return int(self.record.curves()["predicted"].isfinite().sum())

    def agreement(self) -> dict[str, float] | None:
        """How well the prediction did, logged; None where there was none."""
        if self.watch is None or self.watch.initial is None or self._predicted() < 2:
            return None
        values = {k: float(v) for k, v in self.record.metric(self.options.tolerance).compute().items()}
        if self.record.void_from is not None:  # the metric sees errors only; a kernel may have moved before
            values["valid_until"] = float(self.record.void_from)
        kept = {k: values[k] for k in report.AT_THE_END if values[k] == values[k]}
        log_scalars(self._trainer, {f"loss_decay/{k}": v for k, v in kept.items()})
        return values
