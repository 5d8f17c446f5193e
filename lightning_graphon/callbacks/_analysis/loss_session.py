"""Predicted and observed loss of one fit, in the process that measures it: what is done when, and what is said."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_graphon._shared.checks import make_plain
from lightning_graphon.callbacks._analysis.affordable_network import PORTION, affordable_network, affordable_pool
from lightning_graphon.callbacks._analysis.masks_in_use import masks_in_use
from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._logging.loss_chart import within_reach
from lightning_graphon.callbacks._logging.scalars import log_scalars
from lightning_graphon.callbacks._module.network import TrainingStepNetwork
from lightning_graphon.callbacks._module.probe import (
    batches_seen,
    draw_probe_and_pool,
    repeat_batch,
    samples,
    take,
    training_batch_size,
)
from lightning_graphon.callbacks._module.training_step import ModuleLoss, TrainingStepObjective
from lightning_graphon.dynamics import (
    KernelPrediction,
    LossCurves,
    LossTracker,
    OptimizerView,
    UnsupportedTrainingError,
    next_multiple,
)
from lightning_graphon.metrics import LossDecay

log = logging.getLogger(__name__)
# What reading the state of another program, or of another version, may raise.
FOREIGN = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
_AT_THE_END = ("rate_ratio", "log_correlation")
_NEVER = 2**62
_HORIZON = 1000  # steps for which there must be time to follow a prediction; few hold longer


@dataclass(frozen=True)
class Measuring:
    """What is measured, when, and up to which error a prediction holds; as `LossDecayMonitor` documents it."""

    probe_size: int
    pool_size: int
    probe_seed: int
    every_n_steps: int
    tolerance: float

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("probe_size", "every_n_steps", "tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.pool_size < 0:
            raise ValueError(f"pool_size must be 0 or more, got {self.pool_size!r}")


class LossSession:
    """Measures the loss of a probe during one fit and predicts it, as long as that can be done.

    Args:
        trainer: Fits the module.
        pl_module: The module.
        optimizer: Trains it; None where there are several.
        prediction: Which kernel predicts.
        measuring: What is measured, and when.
        loss_fn: In place of `training_step`.
        curves: Goes on with them.
        budget: Says how long kernels may take, and how often the loss may be measured.

    Attributes:
        tracker: Predicts; None where nothing is predicted.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: OptimizerView | None,
        prediction: KernelPrediction, measuring: Measuring, loss_fn: ModuleLoss | None, curves: LossCurves,
        budget: TimeBudget,
    ) -> None:  # fmt: skip
        self._trainer, self._module, self._optimizer = trainer, pl_module, optimizer
        self._prediction, self._measuring, self.curves, self.budget = prediction, measuring, curves, budget
        self.tracker: LossTracker | None = None
        self._objective = TrainingStepObjective(trainer, pl_module, loss_fn)
        self._batch: Any = None
        self._pool: Any | None = None
        self._took = 0.0  # seconds of a look

    def begin(self, restored: Mapping[str, Any] | None) -> int:
        """Draw the probe, read the network, go on from a checkpoint's state; the step of the next look."""
        m = self._measuring
        self._batch, self._pool = draw_probe_and_pool(
            self._trainer, self._module, m.probe_size, m.pool_size, m.probe_seed,
            batches_seen(self._trainer), self.budget.portion(PORTION),
        )  # fmt: skip
        try:
            if self._optimizer is None:
                count = len(self._trainer.optimizers)
                raise UnsupportedTrainingError(f"there are {count} optimizers, and one is needed")
            if self.curves.gave_up is not None:
                raise UnsupportedTrainingError(self.curves.gave_up)
            masks = masks_in_use(self._trainer, self._module)
            self._take_as_before({} if restored is None else restored.get("settings", {}))
            network, part = affordable_network(self._trainer, self._objective, self._batch, masks, self.budget)
            if samples(part) < samples(self._batch):
                log.info("LossDecayMonitor: the probe has %d of %d samples", samples(part), samples(self._batch))
            self._batch = part
            size = training_batch_size(self._trainer)
            coupled = (self._pool is not None or size != network.count) and network.couples_samples()
            if coupled:  # their number matters, and no pool can stand for training batches
                self._pool = None
            pool, self._pool = affordable_pool(network, self._trainer, self._objective, self._pool, self.budget)
            self.tracker = LossTracker(
                network, self._optimizer, self._prediction, self.curves, pool=pool,
                every_n_steps=m.every_n_steps, tolerance=m.tolerance,
                step=self._trainer.global_step, gradient_scale=self._gradient_scale(network),
                seconds=lambda: self.budget.portion(PORTION), clips=bool(self._trainer.gradient_clip_val),
                horizon=min(_HORIZON, self.budget.planned),
            )  # fmt: skip
            if restored:
                self._resume(self.tracker, restored)
            self._tell_limits(self.tracker, coupled)
        except UnsupportedTrainingError as error:
            self._give_up(str(error))
        return self._next_look()

    def _take_as_before(self, settings: Mapping[str, Any]) -> None:
        """The same probe and pool again, which were cut to the time that there was."""
        if "samples" in settings and "pool" in settings:
            self._batch = take(self._batch, settings["samples"])
            self._pool = take(self._pool, settings["pool"]) if self._pool is not None and settings["pool"] else None

    def _tell_limits(self, tracker: LossTracker, coupled: bool) -> None:
        size, probe = training_batch_size(self._trainer), samples(self._batch)
        if coupled and size != probe:
            log.warning(
                "LossDecayMonitor: the loss in training_step couples the samples of a batch, as contrastive losses do. "
                "Training batches of %s and the probe of %d have different losses, so the predicted fall is biased: "
                "probe_size=%s compares like with like.",
                size or "another size", probe, size or "the batch size",
            )  # fmt: skip
        elif self._pool is None:
            log.info(
                "LossDecayMonitor: there is no pool of other samples than the probe's, so the probe pushes itself: "
                "where training has more samples, the loss is predicted to fall too fast."
            )
        if tracker.leaves_out:
            log.info("LossDecayMonitor: the prediction leaves out %s.", tracker.leaves_out)

    def _gradient_scale(self, network: TrainingStepNetwork) -> float:
        """Gradient of a training batch over that of what pushes: 1 for mean losses, the ratio of their sizes for sums.

        Raises:
            UnsupportedTrainingError: The loss is a sum, and the size of training batches is not known.
        """
        with network.evaluated(), torch.no_grad():
            once = float(self._objective.loss(self._batch))
            try:
                twice = float(self._objective.loss(repeat_batch(self._batch)))
            except (ValueError, TypeError, RuntimeError, IndexError):
                return 1.0  # a batch that cannot be repeated; most losses are means
        if not math.isclose(twice, 2 * once, rel_tol=1e-3, abs_tol=1e-12) or once == 0:
            return 1.0
        batch_size = training_batch_size(self._trainer)
        if batch_size is None:
            raise UnsupportedTrainingError(
                "the loss in training_step is a sum over the batch, whose size is not known: use a mean"
            )
        return float(batch_size / samples(self._batch if self._pool is None else self._pool))

    def _resume(self, tracker: LossTracker, restored: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; one that does not fit is left, and told."""
        now = self.identity()
        try:
            if restored["settings"] != now:
                raise ValueError(f"it was made with {restored['settings']}, and now it is {now}")
            tracker.load_state_dict(restored["tracker"])
            if tracker.initial is not None and tracker.initial.kernels is None:
                log.warning(
                    "LossDecayMonitor: the prediction of step %d ends here, at step %d: its kernel is too large for a "
                    "checkpoint.", tracker.initial.start, self._trainer.global_step,
                )  # fmt: skip
        except FOREIGN as error:
            log.warning(
                "LossDecayMonitor starts anew at step %d: the checkpoint's prediction does not fit, %s",
                self._trainer.global_step, error,
            )  # fmt: skip
            self.curves.rows, self.curves.invalid = [], None

    def identity(self) -> dict[str, Any]:
        """Plain values that a checkpoint and the run that resumes it must share."""
        m = self._measuring
        sizes = {"probe_size": m.probe_size, "pool_size": m.pool_size, "probe_seed": m.probe_seed}
        drawn = {"samples": samples(self._batch), "pool": 0 if self._pool is None else samples(self._pool)}
        return {**self._prediction.identity(), **sizes, **drawn}

    def advance(self) -> None:
        """Follow the step that the optimizer is about to take."""
        if self.tracker is not None:
            try:
                self.tracker.advance()
            except UnsupportedTrainingError as error:
                self._give_up(str(error))

    def _next_look(self) -> int:
        every, last = self._measuring.every_n_steps, self.curves.last_step
        regular = next_multiple(every, last) if self.tracker is None else self.tracker.next_look()
        spacing = self.budget.spacing(self._took)
        if spacing <= every or (self.tracker is not None and self.tracker.initial is None):
            return regular
        # Looks are seldom enough for the rest of the training to afford them; without any time left the end remains.
        return _NEVER if math.isinf(spacing) else max(regular, next_multiple(every, last + math.ceil(spacing) - 1))

    def look(self) -> int:
        """Measure the loss now; the step of the next look."""
        step, told, start = self._trainer.global_step, self.curves.invalid, perf_counter()
        self._stop_what_costs_too_much()
        made = self.tracker and (self.tracker.initial, self.tracker.refreshed)
        values: dict[str, float] = {}
        if self.tracker is not None:
            try:
                values = self.tracker.observe(step)
            except UnsupportedTrainingError as error:
                self._give_up(str(error))
        if not values:
            values = {"observed": self._objective.observed(self._batch)}
            self.curves.add(step, values)
        shown = within_reach(values, self.curves)
        log_scalars(self._trainer, {f"loss_decay/{name}": value for name, value in shown.items()})
        # An error that is no longer measured must not stay behind for a ModelCheckpoint to find it the best.
        for key in ("loss_decay/relative_error", "loss_decay/refreshed_error"):
            if key in self._trainer.callback_metrics and key.rpartition("/")[2] not in shown:
                self._trainer.callback_metrics[key] = torch.tensor(math.inf)
        if self.curves.invalid is not None and told is None:
            first, why = self.curves.invalid
            log.warning("LossDecayMonitor: from step %d on the prediction of the start no longer holds: %s", first, why)
        if made == (self.tracker and (self.tracker.initial, self.tracker.refreshed)):  # kernels are an expense of once
            self._took = perf_counter() - start
        self._stop_what_costs_too_much()
        return self._next_look()

    def _stop_what_costs_too_much(self) -> None:
        """Predictions are followed step by step: one that has failed for half of the time, one that holds for all."""
        if self.tracker is None:
            return
        predicts = self.tracker.initial is not None
        if self.budget.left == 0 and not predicts:
            self._give_up("computing a kernel takes more than time_budget allows")
        elif self.budget.left == 0 and not self.tracker.stopped:
            self.tracker.stop_initial()
            log.warning(
                "LossDecayMonitor follows the prediction no longer from step %d on: the time of time_budget is used "
                "up. The observed loss is logged.", self._trainer.global_step,
            )  # fmt: skip
        elif predicts and self.curves.invalid is not None and self.budget.left < 0.5 * self.budget.allowed:
            self.tracker.stop_initial()

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
        if self.tracker is None or self.tracker.initial is None:
            return None
        if len(self.curves.by_step()["predicted"]) < 2 and self.curves.invalid is None:
            return None
        values = {k: float(v) for k, v in agreement(self.curves, self._measuring.tolerance).compute().items()}
        kept = {k: values[k] for k in _AT_THE_END if values[k] == values[k]}
        # The metric sees errors only; the kernel may have moved before.
        steps = {"valid_until": self.curves.valid_until, "invalid_from": self.curves.invalid_from}
        kept.update({k: float(step) for k, step in steps.items() if step is not None})
        log_scalars(self._trainer, {f"loss_decay/{k}": v for k, v in kept.items()})
        return values


def agreement(curves: LossCurves, tolerance: float) -> LossDecay:
    """Agreement of prediction and observation so far."""
    metric, tensors = LossDecay(tolerance, sync_on_compute=False), curves.tensors()
    made = tensors["predicted"].isfinite()
    metric.update(*(tensors[name][made] for name in ("predicted", "observed", "step")))
    return metric
