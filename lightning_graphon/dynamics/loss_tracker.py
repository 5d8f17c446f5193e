"""Predicts the loss of a probe step by step, measures it now and then, and says when the prediction no longer holds."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_graphon._shared.checks import checked
from lightning_graphon.dynamics.forecast import Forecast
from lightning_graphon.dynamics.forecast_kernels import AffordableKernels, ForecastKernels
from lightning_graphon.dynamics.kernel_change import KernelChange
from lightning_graphon.dynamics.kernel_prediction import KernelPrediction
from lightning_graphon.dynamics.loss_curves import LossCurves
from lightning_graphon.dynamics.optimizer import OptimizerStep, OptimizerView, rate_groups, read_optimizer_step
from lightning_graphon.dynamics.optimizer_kernels import OptimizerKernels
from lightning_graphon.dynamics.probed_network import ProbedNetwork, UnsupportedTrainingError
from lightning_graphon.dynamics.recorded_loss import recorded_loss

# Adam's second moments are means of few gradients at first; its kernel stands still only after some steps.
_START_OF_ADAPTIVE = 10
_SAME_LOSS = 1e-3  # recorded and real one, in single precision
_DIVERGED = 10.0  # times the largest loss seen


class LossTracker:
    """Predicted and observed loss of one probe while an optimizer trains the network.

    Call `advance` before each step of the optimizer and `observe` at the steps of `next_look`. The tracker is made, and
    asked to observe, while the weights are whole and the optimizer can be read; nothing else needs that.

    Args:
        network: With its probe batch.
        optimizer: Trains the network.
        options: Which kernel predicts.
        curves: Is written to; with the rows of an earlier training that goes on.
        dataset_size: Number of training points that the probe stands for.
        every_n_steps: Measure the loss after every n-th optimizer step.
        tolerance: Largest relative error of a prediction that holds.
        step: Optimizer step now.
        gradient_scale: Gradient of a training batch over that of the probe: 1 for mean losses.
        seconds: How long a computation of kernels may take now. What that is too short for is computed for part of the
            outputs.

    Attributes:
        initial: The prediction made at the start; None until then.
        refreshed: The prediction made at the last refresh.
        stopped: Whether the prediction of the start is no longer followed.

    Raises:
        UnsupportedTrainingError: No prediction can be made; why, in one sentence.
    """

    def __init__(
        self, network: ProbedNetwork, optimizer: OptimizerView, options: KernelPrediction, curves: LossCurves, *,
        dataset_size: int, every_n_steps: int = 50, tolerance: float = 0.1, step: int = 0, gradient_scale: float = 1.0,
        seconds: Callable[[], float] = lambda: math.inf,
    ) -> None:  # fmt: skip
        self.network, self.options, self.curves = network, options, curves
        self.initial: Forecast | None = None
        self.refreshed: Forecast | None = None
        self._every, self._tolerance, self._dataset_size = every_n_steps, tolerance, dataset_size
        self._kernels, self._optimizer = OptimizerKernels(network, optimizer), optimizer.optimizer
        self._scale, self._read, self._seconds = gradient_scale, list[Any](), seconds
        self._step = _optimizer_step(self._optimizer, gradient_scale)
        self._next_change = 0
        self._regrouped: str | None = None  # why the groups are no longer those of the first prediction
        self._largest, self.stopped = 0.0, False  # loss seen; the first prediction
        # Step at which the optimizer was new: that of the checkpoint's run, or now where a fit begins without one.
        self._new_at = 0 if self._optimizer.state else step
        with network.evaluated(), torch.no_grad():
            outputs = network.outputs().detach()
        self.loss = recorded_loss(network, outputs)
        self._affordable = AffordableKernels(self._kernels, self.loss, outputs, options.full)
        self._change = KernelChange(network, optimizer, outputs)

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
            self._read, self._step = now, _optimizer_step(self._optimizer, self._scale)
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
        values.update(_compared("predicted", "relative_error", self.initial, observed))
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
        if self.initial is None or step <= self.initial.start:
            return False
        every = self.options.refresh_every_n_steps
        regular = every is not None and step >= next_multiple(every, max(before, 0))
        return regular or (self._regrouped is not None and self.refreshed is None)

    def _measure(self) -> tuple[Tensor, float]:
        """Outputs and loss of the probe now."""
        with self.network.evaluated(), torch.no_grad():
            outputs = self.network.outputs().detach()
            recorded = float(self.loss(outputs.double()))
            if not self.loss.reads_values:
                return outputs, recorded
            observed = float(self.network.loss(outputs))
        if math.isfinite(observed) and not math.isclose(recorded, observed, rel_tol=_SAME_LOSS):
            raise UnsupportedTrainingError("the loss in training_step has branched: it is not the function that it was")
        return outputs, observed

    def _forecast(self, outputs: Tensor, step: int) -> Forecast:
        groups = rate_groups(self._optimizer)
        try:
            if self.options.ntk == "graphon":
                made = ForecastKernels(self._kernels.graphon_kernels(groups, self.options.propagate))
            else:
                made = self._affordable.compute(groups, self._seconds())
        except ValueError as error:
            raise UnsupportedTrainingError(f"there is no {self.options.ntk} kernel: {error}") from error
        new = Forecast(made, groups, outputs, self.loss, self._step, self._dataset_size, step)
        new.inherit(self._buffer(new, step))
        new.seconds = self._seconds
        return new

    def _buffer(self, new: Forecast, step: int) -> Tensor | None:
        """Momentum buffer that the optimizer has by now: of the last prediction, or of a steady gradient."""
        last = self.refreshed or (None if self.stopped else self.initial)
        if last is not None:
            return last.buffer
        mu, steps = self._step.momentum, step - self._new_at
        if not mu or not steps:
            return None
        fresh = mu ** (steps - 1)
        return new.gradient * (fresh + (1 - self._step.dampening) * (1 - fresh) / (1 - mu))

    def _kernel_change(self, initial: Forecast, outputs: Tensor, step: int) -> dict[str, float]:
        """`kernel_drift`; nothing where the loss has no slope. The next at most twice as far from the start."""
        self._next_change = step + min(self.options.change_every_n_steps, max(self._every, step - initial.start))
        gradient = self.loss.value_and_gradient(outputs.double())[1]
        change = self._change.since_start(gradient, initial.ratios)
        return {"kernel_drift": change} if math.isfinite(change) else {}

    def _judge(self, values: Mapping[str, float], step: int) -> None:
        """Say once that the initial prediction no longer holds, and why."""
        if self.curves.invalid is not None or self.initial is None:
            return
        error, change = values["relative_error"], values.get("kernel_drift", 0.0)
        limit = self.options.change_tolerance
        if not math.isfinite(values["observed"]):
            self.curves.invalid = step, f"the observed loss is {values['observed']}"
        elif not change <= limit:
            self.curves.invalid = step, f"the kernel has moved by {change:.0%} (kernel_drift, at most {limit:.0%})"
        elif not error <= self._tolerance:
            why = f"it is {error:.0%} off (relative_error, at most {self._tolerance:.0%})"
            rate, stable = max(self._step.rates), self.initial.largest_stable_rate
            if rate > stable:
                why += f"; the learning rate {rate:.3g} is beyond {stable:.3g}, the largest stable one"
            self.curves.invalid = step, why

    def _stop_if_diverged(self, values: dict[str, float]) -> None:
        """An invalid prediction far above every loss seen so far would only hide the other curves of a chart."""
        self._largest = max(self._largest, abs(values["observed"]))
        if self.initial is None:
            return
        if self.curves.invalid is not None and not abs(values["predicted"]) <= _DIVERGED * self._largest:
            self.stop_initial()
        if self.stopped:
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
            None if part is None else Forecast.from_state(part, self.loss, device)
            for part in (state["initial"], state["refreshed"])
        )
        following, largest, diverged, new_at = (state[key] for key in ("next_change", "largest", "diverged", "new_at"))
        self.network.unused_norms = frozenset(state["unused_norms"])
        self._affordable.load_state_dict(state["sizes"])
        self._change.load_state_dict(state["change"])  # the last that may raise: a tracker is left as it was, or new
        self.initial, self.refreshed = initial, refreshed
        for forecast in filter(None, (initial, refreshed)):
            forecast.seconds = self._seconds
        self._regrouped = state.get("regrouped")  # older checkpoints have none
        self._next_change, self._largest, self._new_at = int(following), float(largest), int(new_at)
        if diverged:
            self.stop_initial()


@checked
def next_multiple(every: int, before: int) -> int:
    """The first multiple of `every` after `before`; a batch may take several steps and come to a later one.

    >>> next_multiple(50, -1), next_multiple(50, 0), next_multiple(50, 120)
    (0, 50, 150)
    """
    return (before // every + 1) * every


def _compared(name: str, error: str, forecast: Forecast | None, observed: float) -> dict[str, float]:
    if forecast is None:
        return {}
    predicted = forecast.loss
    return {name: predicted, error: relative_error(predicted, observed)}


def relative_error(predicted: float, observed: float) -> float:
    """|predicted − observed| / |observed|; 0 where both are equal, infinite where only the observed one is 0.

    >>> relative_error(1.1, 1.0) < 0.11, relative_error(0.0, 0.0), relative_error(1.0, 0.0)
    (True, 0.0, inf)
    """
    if predicted == observed:
        return 0.0
    if math.isinf(observed) and not math.isnan(predicted):
        return math.inf
    return abs(predicted - observed) / abs(observed) if observed else math.inf


def _optimizer_step(optimizer: Optimizer, scale: float) -> OptimizerStep:
    try:
        step = read_optimizer_step(optimizer)
    except ValueError as error:
        raise UnsupportedTrainingError(str(error)) from error
    return replace(step, rates=tuple(scale * rate for rate in step.rates))
