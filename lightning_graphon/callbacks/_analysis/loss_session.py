"""Predicted and observed loss of one fit, in the process that measures it: what is done when, and what is said."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_graphon.callbacks._analysis.affordable_network import PORTION
from lightning_graphon.callbacks._analysis.copies_ahead import CopyTrainer
from lightning_graphon.callbacks._analysis.kernel_theory import kernel_theory
from lightning_graphon.callbacks._analysis.masks_in_use import enforced_masks, first_update, masks_in_use
from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._analysis.wanted import COPIES, CURVE_OF, PREDICTORS, Wanted
from lightning_graphon.callbacks._logging.loss_chart import agreement, announcement, within_reach
from lightning_graphon.callbacks._logging.scalars import log_scalars, show
from lightning_graphon.callbacks._module.pool import TrainingData, draw_data, probe_for_batches
from lightning_graphon.callbacks._module.probe import samples
from lightning_graphon.callbacks._module.training_step import TrainingStepObjective
from lightning_graphon.dynamics import (
    LossCurves,
    LossTracker,
    OptimizerView,
    PredictionsAhead,
    UnsupportedTrainingError,
    next_multiple,
    relative_error,
)

log = logging.getLogger(__name__)
# What reading the state of another program, or of another version, may raise.
FOREIGN = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
_AT_THE_END = ("rate_ratio", "log_correlation")
_NEVER = 2**62
_SHARDED = "the weights are cut over processes, and a copy would need them whole on each"
_ERRORS = ("relative_error", "refreshed_error")


class LossSession:
    """Measures the loss of a probe during one fit and predicts it, as long as that can be done.

    Args:
        trainer: Fits the module.
        pl_module: The module.
        optimizer: Trains it; None where there are several.
        wanted: By the user.
        curves: Goes on with them.
        budget: Says how long predictions may take, and how often the loss may be measured.
        sharded: Whether weights are cut over processes.

    Attributes:
        tracker: Predicts by a kernel; None where none does.
        ahead: What copies of the training say of it.
        theory: Whose prediction is called the predicted one; None where there is none.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: OptimizerView | None, wanted: Wanted,
        curves: LossCurves, budget: TimeBudget, sharded: bool = False,
    ) -> None:  # fmt: skip
        self._trainer, self._module, self._optimizer, self._sharded = trainer, pl_module, optimizer, sharded
        self.wanted, self._measuring, self.curves, self.budget = wanted, wanted.measuring, curves, budget
        self.tracker: LossTracker | None = None
        self.ahead = PredictionsAhead(masks_move=first_update(trainer, pl_module))
        self._objective = TrainingStepObjective(trainer, pl_module, wanted.loss_fn, alone=True)
        self._data: TrainingData | None = None
        self._pool = 0  # samples that push in the kernel's prediction
        self.theory: str | None = None
        self._took, self._told = 0.0, False  # seconds of a look; what is predicted

    def begin(self, restored: Mapping[str, Any] | None) -> int:
        """Draw the data, make predictions or go on with those of a checkpoint; the step of the next look."""
        m, trainer = self._measuring, self._trainer
        size = probe_for_batches(trainer, m.probe_size, self.budget.portion(PORTION))
        self._data = draw_data(trainer, self._module, size, m.pool_size, m.probe_seed, self.budget.portion(PORTION))
        if self.curves.gave_up is not None:
            self._give_up(self.curves.gave_up)
            return self._next_look()
        names = self.wanted.predicting.names(self._optimizer, self.wanted.kernel, bool(trainer.gradient_clip_val))
        if "kernel" in names:
            self._begin_kernel({} if restored is None else restored.get("settings", {}))
        if restored is None or not self._resume(restored):
            self._begin_copies([name for name in COPIES if name in names])
        made = [*(["kernel"] if self.tracker is not None else []), *self.ahead.predictions]
        self.theory = next((name for name in PREDICTORS if name in made), None)
        if self.theory is None:
            self._give_up("; ".join(dict.fromkeys(self.ahead.refused.values())))
        return self._next_look()

    @property
    def probe_size(self) -> int:
        """Samples that are measured."""
        return 0 if self._data is None else samples(self._data.probe)

    def _begin_kernel(self, drawn: Mapping[str, int]) -> None:
        assert self._data is not None  # noqa: S101
        m, masks = self._measuring, masks_in_use(self._trainer, self._module)
        try:
            theory = kernel_theory(
                self._trainer, self._objective, self._optimizer, self._data, masks, self.wanted.kernel, self.curves,
                self.budget, every_n_steps=m.every_n_steps, tolerance=m.tolerance, band=self._band,
                drawn={key: drawn[key] for key in ("samples", "pool") if key in drawn},
            )  # fmt: skip
        except UnsupportedTrainingError as error:
            self.ahead.refused["kernel"] = str(error)
            return
        self.tracker, self._pool = theory.tracker, theory.pool
        self._data = replace(self._data, probe=theory.probe)

    def _begin_copies(self, names: Sequence[str]) -> None:
        assert self._data is not None  # noqa: S101
        if not names:
            return
        if self._sharded:
            self.ahead.refused.update(dict.fromkeys(names, _SHARDED))
            return
        copies = CopyTrainer(
            self._trainer, self._module, self._data, enforced_masks(self._trainer), self.budget,
            loss_fn=self.wanted.loss_fn, seed=self._measuring.probe_seed,
        )  # fmt: skip
        made = copies.predict(names, self.wanted.predicting, self._measuring.every_n_steps)
        made.refused = {**self.ahead.refused, **made.refused}
        self.ahead = made

    def _resume(self, restored: Mapping[str, Any]) -> bool:
        """Go on from a checkpoint's state; one that does not fit is left, and told."""
        now = self.identity()
        try:
            if restored["settings"] != now:
                raise ValueError(f"it was made with {restored['settings']}, and now it is {now}")
            copies = PredictionsAhead.from_state(restored["ahead"])
            if restored["tracker"] is None:
                self.tracker = None
            elif self.tracker is not None:
                self.tracker.load_state_dict(restored["tracker"])
                if self.tracker.ended and self.tracker.initial is not None:
                    log.warning(
                        "LossDecayMonitor: the kernel's prediction of step %d ends at step %d: it is too large for a "
                        "checkpoint.", self.tracker.initial.start, max(copies.until, self._trainer.global_step),
                    )  # fmt: skip
            self.ahead, self._told = copies, True
        except FOREIGN as error:
            log.warning(
                "LossDecayMonitor starts anew at step %d: the checkpoint's prediction does not fit, %s",
                self._trainer.global_step, error,
            )  # fmt: skip
            self.curves.rows, self.curves.invalid = [], None
            return False
        return True

    def identity(self) -> dict[str, Any]:
        """Plain values that a checkpoint and the run that resumes it must share."""
        m = self._measuring
        sizes = {"probe_size": m.probe_size, "pool_size": m.pool_size, "probe_seed": m.probe_seed}
        drawn = {"samples": self.probe_size, "pool": self._pool}
        return {**self.wanted.kernel.identity(), **self.wanted.predicting.identity(), **sizes, **drawn}

    def advance(self) -> None:
        """Follow the step that the optimizer is about to take."""
        if self.tracker is not None:
            try:
                self.tracker.advance()
            except UnsupportedTrainingError as error:
                self._end_kernel(str(error))

    def _next_look(self) -> int:
        every, last = self._measuring.every_n_steps, self.curves.last_step
        regular = next_multiple(every, last) if self.tracker is None else self.tracker.next_look()
        compared = [step for step in self.ahead.steps if step > last]
        if compared and self._took * len(compared) <= self.budget.left / 2:
            regular = min(regular, compared[0])
        spacing = self.budget.spacing(self._took)
        if spacing <= every or not self.curves.rows or (self.tracker is not None and self.tracker.initial is None):
            return regular
        # Looks are seldom enough for the rest of the training to afford them; without any time left the end remains.
        return _NEVER if math.isinf(spacing) else max(regular, next_multiple(every, last + math.ceil(spacing) - 1))

    def look(self) -> int:
        """Measure the loss now; the step of the next look."""
        step, told, start = self._trainer.global_step, self.curves.invalid, perf_counter()
        self._stop_what_costs_too_much()
        made = self.tracker and (self.tracker.initial, self.tracker.refreshed)
        values = self._observe(step)
        values.update(self._of_copies(step, values["observed"]))
        values.update({"power_law": loss for loss in self.curves.power_law([step]).values()})  # noqa: B035 - one
        self.curves.add(step, values)
        self._log(within_reach(values, self.curves))
        if self.curves.invalid is not None and told is None:
            first, why = self.curves.invalid
            log.warning("LossDecayMonitor: from step %d on the prediction of the start no longer holds: %s", first, why)
        if made == (self.tracker and (self.tracker.initial, self.tracker.refreshed)):  # kernels are an expense of once
            self._took = perf_counter() - start
        self._tell()
        self._stop_what_costs_too_much()
        return self._next_look()

    def _observe(self, step: int) -> dict[str, float]:
        """The loss now, and what the kernel predicts."""
        if self.tracker is not None:
            try:
                return self.tracker.observe(step)
            except UnsupportedTrainingError as error:
                self._end_kernel(str(error))
        observed = self._objective.observed(self._data and self._data.probe)
        self.curves.add(step, {"observed": observed})
        return {"observed": observed}

    def _of_copies(self, step: int, observed: float) -> dict[str, float]:
        """What copies predict, judged where they make the prediction."""
        found = self.ahead.at(step)
        values = {CURVE_OF[name]: loss for name, loss in found.items() if name in CURVE_OF}
        if self.theory in found and (self.theory != "kernel" or (self.tracker is not None and self.tracker.ended)):
            predicted = found[self.theory]
            values |= {"predicted": predicted, "relative_error": relative_error(predicted, observed)}
            if self.theory == "replay":
                del values["replayed"]
            self.curves.judge(step, {"observed": observed, **values}, self._measuring.tolerance, self._band(step))
        return values

    def _band(self, step: int) -> tuple[float, float] | None:
        return self.ahead.band(step, self._measuring.tolerance)

    def _log(self, values: Mapping[str, float]) -> None:
        log_scalars(self._trainer, {f"loss_decay/{name}": value for name, value in values.items()})
        # An error that is no longer measured must not stay behind for a ModelCheckpoint to find it the best.
        for name in _ERRORS:
            if f"loss_decay/{name}" in self._trainer.callback_metrics and name not in values:
                self._trainer.callback_metrics[f"loss_decay/{name}"] = torch.tensor(math.inf)

    def _tell(self) -> None:
        """Say once what is predicted, and until when theory is trusted."""
        waits = self.tracker is not None and self.tracker.initial is None
        if self._told or (waits and not self.ahead.predictions):
            return
        self._told = True
        if self.tracker is not None and not waits:
            self.ahead.compare_with_kernel(self.tracker, self._measuring.tolerance)
        else:
            self.ahead.find_lazy_until(self._measuring.tolerance)
        if self.wanted.verbose and self.theory is not None:
            last = self._trainer.global_step + self.budget.planned
            show(announcement(self.ahead, self.tracker, self.probe_size, last))

    def _stop_what_costs_too_much(self) -> None:
        """Predictions are followed step by step: one that has failed for half of the time, one that holds for all."""
        if self.tracker is None:
            return
        predicts = self.tracker.initial is not None
        if self.budget.left == 0 and not predicts:
            self._end_kernel("computing a kernel takes more than time_budget allows")
        elif self.budget.left == 0 and not self.tracker.stopped:
            self.tracker.stop_initial()
            log.warning(
                "LossDecayMonitor follows the prediction no longer from step %d on: the time of time_budget is used "
                "up. The observed loss is logged.", self._trainer.global_step,
            )  # fmt: skip
        elif predicts and self.curves.invalid is not None and self.budget.left < 0.5 * self.budget.allowed:
            self.tracker.stop_initial()

    def _end_kernel(self, reason: str) -> None:
        """No kernel predicts from here on; copies have done so before."""
        self.tracker, self.ahead.refused["kernel"] = None, reason
        if self.ahead.until <= self._trainer.global_step:
            self._give_up(reason)
        else:
            log.warning("LossDecayMonitor: no kernel predicts from step %d on: %s", self._trainer.global_step, reason)

    def _give_up(self, reason: str) -> None:
        """No prediction from here on; the observed loss goes on."""
        self.tracker, self.curves.gave_up = None, reason
        log.warning(
            "LossDecayMonitor predicts nothing from step %d on: %s. The observed loss is logged.",
            self._trainer.global_step, reason,
        )  # fmt: skip

    @property
    def short(self) -> bool:
        """Whether there is one measurement or prediction only, at an earlier step: a curve has two points."""
        few = 1 in (len(self.curves.rows), len(self.curves.by_step()["predicted"]))
        return few and self._trainer.global_step > self.curves.last_step

    def agreement(self) -> dict[str, float] | None:
        """How well the prediction did, logged; None where there was none."""
        if len(self.curves.by_step()["predicted"]) < 2 and self.curves.invalid is None:
            return None
        values = {k: float(v) for k, v in agreement(self.curves, self._measuring.tolerance).compute().items()}
        kept = {k: values[k] for k in _AT_THE_END if values[k] == values[k]}
        # The metric sees errors only; the kernel may have moved before.
        steps = {
            "valid_until": self.curves.valid_until,
            "invalid_from": self.curves.invalid_from,
            "lazy_until": self.ahead.lazy_until,
        }
        kept.update({k: float(step) for k, step in steps.items() if step is not None})
        log_scalars(self._trainer, {f"loss_decay/{k}": v for k, v in kept.items()})
        return values
