"""Predicts the loss of a probe step by step, measures it now and then, and says when the prediction no longer holds."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_graphon.dynamics.followed import MeasuredOutputs
from lightning_graphon.dynamics.forecast import Forecast
from lightning_graphon.dynamics.forecast_kernels import AffordableKernels
from lightning_graphon.dynamics.kernel_change import KernelChange
from lightning_graphon.dynamics.kernel_prediction import KernelPrediction
from lightning_graphon.dynamics.loss_curves import LossCurves, next_multiple, relative_error
from lightning_graphon.dynamics.optimizer import (
    OptimizerStep,
    OptimizerView,
    adam_steps,
    rate_groups,
    read_optimizer_step,
)
from lightning_graphon.dynamics.optimizer_kernels import OptimizerKernels
from lightning_graphon.dynamics.probed_network import ProbedNetwork, UnsupportedTrainingError
from lightning_graphon.dynamics.recorded_loss import recorded_loss

# Adam's second moments are means of few gradients at first; its kernel stands still only after some steps.
_START_OF_ADAPTIVE = 10
_SAME_LOSS, _DIVERGED = 1e-3, 10.0  # recorded and real one, in single precision; times the largest loss seen


class LossTracker:
    """Predicted and observed loss of one probe while an optimizer trains the network.

    Call `advance` before each step of the optimizer and `observe` at the steps of `next_look`. The tracker is made, and
    asked to observe, while the weights are whole and the optimizer can be read; nothing else needs that.

    Args:
        network: With its probe batch.
        optimizer: Trains the network.
        options: Which kernel predicts.
        curves: Is written to; with the rows of an earlier training that goes on.
        pool: The network with the samples that push, other ones than the probe's; None: the probe pushes itself.
        horizon: Steps of a prediction that there must be time to follow; the pool is cut to that.
        every_n_steps: Measure the loss after every n-th optimizer step.
        tolerance: Largest relative error of a prediction that holds.
        step: Optimizer step now.
        gradient_scale: Gradient of a training batch over that of what pushes: 1 for mean losses.
        seconds: How long a computation of kernels may take now. What that is too short for is computed for part of the
            outputs.
        clips: Whether gradients are clipped.
        weights: Of the pool's and of the probe's loss in what training descends.
        mask_updates: How often masks have changed; after each time the prediction is refreshed.
        band: Step -> where rehearsals expect the loss, None where there are none; predictions are judged by that.

    Attributes:
        leaves_out: What no prediction knows of, in words: weight decay, gradient clipping; empty without.
        initial: The prediction made at the start; None until then.
        refreshed: The prediction made at the last refresh.
        stopped: Whether the prediction of the start is no longer followed.

    Raises:
        UnsupportedTrainingError: No prediction can be made; why, in one sentence.
    """

    def __init__(
        self, network: ProbedNetwork, optimizer: OptimizerView, options: KernelPrediction, curves: LossCurves, *,
        pool: ProbedNetwork | None = None, every_n_steps: int = 50, tolerance: float = 0.1, step: int = 0,
        gradient_scale: float = 1.0, seconds: Callable[[], float] = lambda: math.inf, horizon: float = 0,
        clips: bool = False, band: Callable[[int], tuple[float, float] | None] = lambda step: None,
        weights: tuple[float, float] = (1.0, 0.0), mask_updates: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self.network, self.pool, self.options, self.curves = network, pool, options, curves
        self.initial: Forecast | None = None
        self.refreshed: Forecast | None = None
        self._weights, self._next_change, self._mask_updates, self._known_updates = weights, 0, mask_updates, 0
        self._every, self._tolerance = every_n_steps, tolerance
        self._kernels, self._optimizer = OptimizerKernels(network, optimizer), optimizer.optimizer
        self.gradient_scale, self._read, self._seconds = gradient_scale, list[Any](), seconds
        decays = any(group.get("weight_decay") for group in self._optimizer.param_groups)
        self.leaves_out = " and ".join(["weight decay"] * decays + ["gradient clipping"] * clips)
        self._step, self._band = _optimizer_step(self._optimizer, gradient_scale), band
        self._regrouped: str | None = None  # why the groups are no longer those of the first prediction
        self._largest, self.stopped = 0.0, False  # loss seen; the first prediction
        # Step at which the optimizer was new: that of the checkpoint's run, or now where a fit begins without one.
        self._new_at = 0 if self._optimizer.state else step
        outputs = network.measured()
        self.loss = recorded_loss(network, outputs)
        pushing = outputs if pool is None else pool.measured()
        self.pool_loss = None if pool is None else recorded_loss(pool, pushing)
        self._affordable = AffordableKernels(
            self._kernels, pool, self.pool_loss or self.loss, pushing, full=options.full, horizon=horizon
        )
        self._change = KernelChange(network, optimizer, outputs)

    @property
    def ended(self) -> bool:
        """Whether its kernel was too large for a checkpoint; what was rolled out before is left."""
        return self.initial is not None and self.initial.kernels is None

    @property
    def start_step(self) -> int:
        """Optimizer step at which the prediction is made."""
        chosen = self.options.start_step
        return chosen if chosen is not None else self._new_at + _START_OF_ADAPTIVE * self._step.adaptive

    def advance(self) -> None:
        """Follow the step that the optimizer is about to take.

        Raises:
            UnsupportedTrainingError: The optimizer has changed what it does.
        """
        now = [(float(g["lr"]), g.get("momentum"), g.get("betas")) for g in self._optimizer.param_groups]
        if now != self._read:  # every training step comes by here: read again only what has changed
            self._read, self._step = now, _optimizer_step(self._optimizer, self.gradient_scale)
        try:
            for forecast in (None if self._regrouped else self.initial, self.refreshed):
                if forecast is not None:
                    forecast.advance(self._step)
        except UnsupportedTrainingError as error:  # a backbone thaws: other parameters, or rates of their own
            self._regrouped, self.refreshed = str(error), None
            self.stop_initial()

    def next_look(self) -> int:
        """Step at which the loss is to be measured next."""
        cadences = (self._every, self.options.refresh_every_n_steps)
        regular = min(next_multiple(every, self.curves.last_step) for every in cadences if every)
        return min(regular, self.start_step) if self.initial is None else regular

    def observe(self, step: int) -> dict[str, float]:
        """Measure the loss; start, judge and refresh predictions.

        Args:
            step: Optimizer step now.

        Returns:
            `observed`, and where there are any `predicted`, `relative_error`, `kernel_drift`, `refreshed` and
            `refreshed_error`; also added to the curves.

        Raises:
            UnsupportedTrainingError: There is no kernel, or the loss is no longer the recorded one.
        """
        before = self.curves.last_step
        outputs, observed = self._measure()
        values = {"observed": observed}
        if self.initial is None and step >= self.start_step:
            self.initial = self._forecast(outputs, step)
            self._change.start(self.initial.groups, self._seconds())
            self._next_change = step + self._every
        values.update(_compared("predicted", "relative_error", None if self.stopped else self.initial, observed))
        values.update(_compared("refreshed", "refreshed_error", self.refreshed, observed))
        if self._regrouped and self.curves.invalid is None:
            self.curves.invalid = step, self._regrouped
        if self.initial is not None and step >= self._next_change and not self._regrouped:
            values.update(self._kernel_change(self.initial, outputs, step))
        self._judge(values, step)
        self._stop_if_diverged(values)
        if math.isfinite(observed) and self._refresh_is_due(step, before):
            self.refreshed = self._forecast(outputs, step)
        self.curves.add(step, values)
        return values

    def _refresh_is_due(self, step: int, before: int) -> bool:
        known, self._known_updates = self._known_updates, self._mask_updates()
        if self.initial is None or step <= self.initial.start:
            return False
        every = self.options.refresh_every_n_steps
        regular = every is not None and step >= next_multiple(every, max(before, 0))
        return regular or self._known_updates > known or (self._regrouped is not None and self.refreshed is None)

    def _measure(self) -> tuple[Tensor, float]:
        """Outputs and loss of the probe now."""
        outputs = self.network.measured()
        with torch.no_grad():
            recorded = float(self.loss(outputs.double()))
        if not self.loss.reads_values:
            return outputs, recorded
        with self.network.evaluated(), torch.no_grad():
            observed = float(self.network.loss(outputs))
        if math.isfinite(observed) and not math.isclose(recorded, observed, rel_tol=_SAME_LOSS):
            raise UnsupportedTrainingError("the loss in training_step has branched: it is not the function that it was")
        return outputs, observed

    def _forecast(self, outputs: Tensor, step: int) -> Forecast:
        groups = rate_groups(self._optimizer)
        try:
            if self.options.ntk == "graphon":
                made = self._affordable.graphon(groups, self.options.propagate)
            else:
                made = self._affordable.compute(groups, self._seconds())
        except ValueError as error:
            raise UnsupportedTrainingError(f"there is no {self.options.ntk} kernel: {error}") from error
        probe, pool = MeasuredOutputs(outputs, self.loss), None
        if self.pool is not None and self.pool_loss is not None:
            pool = MeasuredOutputs(self.pool.measured(), self.pool_loss)
        # The optimizer's buffer is made of gradients of training batches, as its rates are for those of the pool.
        velocities = None if made.velocities is None else made.velocities / self.gradient_scale
        new = Forecast(
            replace(made, velocities=velocities), groups, probe, pool, self._step, step, adam_steps(self._optimizer),
            self._weights,
        )  # fmt: skip
        new.seconds = self._seconds
        return new

    def _kernel_change(self, initial: Forecast, outputs: Tensor, step: int) -> dict[str, float]:
        """`kernel_drift`; nothing where the loss has no slope. The next at most twice as far from the start."""
        self._next_change = step + min(self.options.change_every_n_steps, max(self._every, step - initial.start))
        gradient = self.loss.value_and_gradient(outputs.double())[1]
        change = self._change.since_start(gradient, initial.ratios)
        return {"kernel_drift": change} if math.isfinite(change) else {}

    def _judge(self, values: Mapping[str, float], step: int) -> None:
        """Say once that the initial prediction no longer holds, and why."""
        if self.curves.invalid is not None or self.initial is None or "relative_error" not in values:
            return
        band, change, limit = self._band(step), values.get("kernel_drift", 0.0), self.options.change_tolerance
        if math.isfinite(values["observed"]) and band is None and not change <= limit:
            self.curves.invalid = step, f"the kernel has moved by {change:.0%} (kernel_drift, at most {limit:.0%})"
            return
        self.curves.judge(step, values, self._tolerance, band)
        rate, stable = max(self._step.rates), self.initial.largest_stable_rate
        if self.curves.invalid is not None and rate > stable:
            why = f"the learning rate {rate:.3g} is beyond {stable:.3g}, the largest stable one"
            self.curves.invalid = step, f"{self.curves.invalid[1]}; {why}"

    def _stop_if_diverged(self, values: dict[str, float]) -> None:
        """An invalid prediction far above every loss seen so far would only hide the other curves of a chart."""
        self._largest = max(self._largest, abs(values["observed"]))
        if self.curves.invalid is None or "predicted" not in values:
            return
        if not abs(values["predicted"]) <= _DIVERGED * self._largest:
            self.stop_initial()
            del values["predicted"], values["relative_error"]

    def stop_initial(self) -> None:
        """Follow the prediction of the start no longer: it has failed, or takes too long."""
        self.stopped = True
        if self.initial is not None:
            self.initial.stop()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only; the curves have a state of their own."""
        return {
            "initial": None if self.initial is None else self.initial.state_dict(),
            "refreshed": None if self.refreshed is None else self.refreshed.state_dict(),
            "change": self._change.state_dict(),
            "sizes": self._affordable.state_dict(),
            "next_change": self._next_change,
            "largest": self._largest,
            "diverged": self.stopped,
            "new_at": self._new_at,
            "unused_norms": sorted(self.network.unused_norms),
            "regrouped": self._regrouped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: The state is of another probe batch.
        """
        device = next(self.network.root.parameters()).device
        initial, refreshed = (
            None if part is None else Forecast.from_state(part, self.loss, self.pool_loss, device)
            for part in (state["initial"], state["refreshed"])
        )
        following, largest, diverged, new_at = (state[key] for key in ("next_change", "largest", "diverged", "new_at"))
        for network in filter(None, (self.network, self.pool)):
            network.unused_norms = frozenset(state["unused_norms"])
        self._affordable.load_state_dict(state["sizes"])
        self._change.load_state_dict(state["change"])  # the last that may raise: a tracker is left as it was, or new
        self.initial = initial
        self.refreshed = refreshed if refreshed is not None and refreshed.kernels is not None else None
        for forecast in filter(None, (initial, refreshed)):
            forecast.seconds = self._seconds
        self._regrouped = state.get("regrouped")  # older checkpoints have none
        self._next_change, self._largest, self._new_at = int(following), float(largest), int(new_at)
        if diverged or (initial is not None and initial.kernels is None):
            self.stop_initial()


def _compared(name: str, error: str, forecast: Forecast | None, observed: float) -> dict[str, float]:
    if forecast is None:
        return {}
    predicted = forecast.loss
    return {name: predicted, error: relative_error(predicted, observed)}


def _optimizer_step(optimizer: Optimizer, scale: float) -> OptimizerStep:
    try:
        step = read_optimizer_step(optimizer)
    except ValueError as error:
        raise UnsupportedTrainingError(str(error)) from error
    return replace(step, rates=tuple(scale * rate for rate in step.rates))
