"""Predicted and observed loss of one probe batch during one fit; no hooks, no logging."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_graphon.callbacks._distributed.optimizer_view import OptimizerView
from lightning_graphon.callbacks._loss.forecast import Clusters, Forecast, clusters_of
from lightning_graphon.callbacks._loss.kernel_change import KernelChange
from lightning_graphon.callbacks._loss.optimizer_kernels import OptimizerKernels
from lightning_graphon.callbacks._loss.options import Options
from lightning_graphon.callbacks._module.network import Network, UnreadableStepError
from lightning_graphon.callbacks._module.probe import repeat_batch, samples
from lightning_graphon.callbacks._module.recorded_loss import traced_loss
from lightning_graphon.dynamics import OptimizerStep, read_optimizer_step
from lightning_graphon.metrics import loss_decay_errors

_LARGEST_MIXING = 2048  # rows of a kernel that tells outputs apart; 4 million numbers, multiplied at every step
_LARGEST_GRAM = 1024  # outputs that may move each other: likewise, a matrix of a million numbers
# Adam's second moments are means of few gradients at first; its kernel stands still only after some steps.
_START_OF_ADAPTIVE = 10
_SAME_LOSS = 1e-3  # recorded and real one, in single precision
_EXPLODED = 10.0  # times the largest loss seen


class LossWatch:
    """Predicts the loss of the probe step by step, measures it now and then, and says when the prediction is void.

    Made, and asked to observe, while the weights are whole and the optimizer is read; nothing else needs that.

    Args:
        options: What the user chose.
        network: With its probe batch.
        optimizer: Trains the network.
        masks: By the names in the LightningModule.
        dataset_size: Number of training points that the probe stands for.
        step: Optimizer step now.
        batch_size: Samples in a training batch; None where nobody knows.

    Attributes:
        initial: The prediction made at the start; None until then.
        refreshed: The prediction made at the last refresh.
        void: Step and reason from which the initial prediction no longer holds.

    Raises:
        UnreadableStepError: No prediction can be made; why, in one sentence.
    """

    def __init__(
        self, options: Options, network: Network, optimizer: OptimizerView, masks: Mapping[str, Tensor],
        dataset_size: int, step: int, batch_size: int | None,
    ) -> None:  # fmt: skip
        self.options, self.network, self.dataset_size = options, network, dataset_size
        self.initial: Forecast | None = None
        self.refreshed: Forecast | None = None
        self.void: tuple[int, str] | None = None
        self._optimized = OptimizerKernels(network, optimizer, masks)
        self._optimizer = optimizer.optimizer
        self._scale = _scale(network, batch_size)
        self._descent = _descent(self._optimizer, self._scale)
        self._read: list[Any] = []
        self._next_drift = 0
        self._largest, self._exploded = 0.0, False  # loss seen; the first prediction
        # Step at which the optimizer was new: that of the checkpoint's run, or now where a fit begins without one.
        self._new_at = 0 if self._optimizer.state else step
        with network.evaluated(), torch.no_grad():
            outputs = network.outputs().detach()
        self._mixing = _mixing(outputs, options.full_kernel)
        self.loss = traced_loss(network, outputs)
        self._drift = KernelChange(network, optimizer, masks, outputs)

    @property
    def start_step(self) -> int:
        """Optimizer step at which the prediction is made."""
        chosen = self.options.start_step
        return chosen if chosen is not None else self._new_at + _START_OF_ADAPTIVE * self._descent.adaptive

    def advance(self) -> None:
        """Follow the step that the optimizer is about to take.

        Raises:
            UnreadableStepError: The optimizer has changed what it does.
        """
        now = [(float(g["lr"]), g.get("momentum"), g.get("betas")) for g in self._optimizer.param_groups]
        if now != self._read:  # every training step comes by here: read again only what has changed
            self._read, self._descent = now, _descent(self._optimizer, self._scale)
        for forecast in (self.initial, self.refreshed):
            if forecast is not None:
                forecast.advance(self._descent)

    def next_look(self, before: int) -> int:
        """Step at which the loss is to be measured, when it was last measured at step `before`; -1 for never."""
        cadences = (self.options.every_n_steps, self.options.refresh_every_n_steps)
        regular = min(following(every, before) for every in cadences if every)
        return min(regular, self.start_step) if self.initial is None else regular

    def observe(self, step: int, before: int) -> dict[str, float]:
        """Measure the loss; start and refresh predictions.

        Args:
            step: Optimizer step now.
            before: Step of the last measurement; -1 for none.

        Returns:
            `observed`, and where there are any `predicted`, `relative_error`, `kernel_drift`, `refreshed` and
            `refreshed_error`.

        Raises:
            UnreadableStepError: There is no kernel, or the loss is no longer the recorded one.
        """
        outputs, observed = self._measure()
        values = {"observed": observed}
        if self.initial is None and step >= self.start_step:
            self.initial = self._forecast(outputs, step)
            self._drift.start(self.initial.clusters)
            self._next_drift = step + self.options.every_n_steps
        values.update(self._compared("predicted", "relative_error", self.initial, values["observed"]))
        values.update(self._compared("refreshed", "refreshed_error", self.refreshed, values["observed"]))
        if self.initial is not None and step >= self._next_drift:
            values.update(self._measured_drift(outputs, step))
        self._judge(values, step)
        self._drop_exploded(values)
        every = self.options.refresh_every_n_steps
        if every and step >= following(every, max(before, 0)) and math.isfinite(observed):
            self._refresh(outputs, step)
        return values

    def _drop_exploded(self, values: dict[str, float]) -> None:
        """A void prediction far above every loss seen so far would only hide the other curves of a chart."""
        self._largest = max(self._largest, abs(values["observed"]))
        if self.void is not None and not abs(values["predicted"]) <= _EXPLODED * self._largest:
            self.stop_diverged_curve()
        if self._exploded:
            del values["predicted"], values["relative_error"]

    def stop_diverged_curve(self) -> None:
        assert self.initial is not None  # noqa: S101
        self._exploded = True
        self.initial.stop()

    def _measure(self) -> tuple[Tensor, float]:
        """Outputs and loss of the probe now."""
        with self.network.evaluated(), torch.no_grad():
            outputs = self.network.outputs().detach()
            recorded = float(self.loss(outputs.double()))
            if not self.loss.reads_values:
                return outputs, recorded
            observed = float(self.network.loss(outputs))
        if math.isfinite(observed) and not math.isclose(recorded, observed, rel_tol=_SAME_LOSS):
            raise UnreadableStepError("the loss in training_step has branched: it is not the function that it was")
        return outputs, observed

    def _forecast(self, outputs: Tensor, step: int) -> Forecast:
        clusters = clusters_of(self._optimizer)
        try:
            kernels, grams = self._kernels(clusters, outputs)
            new = Forecast(kernels, grams, clusters, outputs, self.loss, self._descent, self.dataset_size, step)
        except ValueError as error:
            raise UnreadableStepError(f"there is no {self.options.kernel} kernel: {error}") from error
        new.inherit(self._buffer(outputs, step))
        return new

    def _kernels(self, clusters: Clusters, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernels [G, ...] of the clusters, and how outputs move each other, [G, C, C], where these do not say it."""
        if self.options.kernel == "graphon":
            return self._optimized.graphon_kernels(clusters, self.options.propagate), None
        if self._mixing:
            return self._optimized.kernels(clusters, reduce=None), None
        if outputs[0].numel() > _LARGEST_GRAM:
            return self._optimized.kernels(clusters, reduce="mean"), None
        return self._optimized.kronecker_kernels(clusters)

    def _buffer(self, outputs: Tensor, step: int) -> Tensor | None:
        """Momentum buffer that the optimizer has by now: of the last prediction, or of a steady gradient."""
        last = self.refreshed or (None if self._exploded else self.initial)
        if last is not None:
            return last.buffer
        mu, steps = self._descent.momentum, step - self._new_at
        if not mu or not steps:
            return None
        gradient = self.loss.value_and_gradient(outputs.double())[1].reshape(len(outputs), -1)
        fresh = mu ** (steps - 1)
        return gradient * (fresh + (1 - self._descent.dampening) * (1 - fresh) / (1 - mu))

    def _compared(self, name: str, error: str, forecast: Forecast | None, observed: float) -> dict[str, float]:
        if forecast is None:
            return {}
        predicted = forecast.loss
        both = torch.tensor([predicted, observed], dtype=torch.float64)
        return {name: predicted, error: float(loss_decay_errors(both[0], both[1]))}

    def _measured_drift(self, outputs: Tensor, step: int) -> dict[str, float]:
        """`kernel_drift`; nothing where the loss has no slope. The next at most twice as far from the start."""
        assert self.initial is not None  # noqa: S101
        o = self.options
        self._next_drift = step + min(o.drift_every_n_steps, max(o.every_n_steps, step - self.initial.start))
        gradient = self.loss.value_and_gradient(outputs.double())[1]
        drift = self._drift.since_start(gradient, self.initial.ratios)
        return {"kernel_drift": drift} if math.isfinite(drift) else {}

    def _judge(self, values: Mapping[str, float], step: int) -> None:
        """Declare the initial prediction void, once."""
        if self.void is not None or self.initial is None:
            return
        error, drift = values["relative_error"], values.get("kernel_drift", 0.0)
        if not math.isfinite(values["observed"]):
            self.void = step, f"the observed loss is {values['observed']}"
        elif not drift <= self.options.drift_tolerance:
            limit = self.options.drift_tolerance
            self.void = step, f"the kernel has moved by {drift:.0%} (kernel_drift, at most {limit:.0%})"
        elif not error <= self.options.tolerance:
            limit, rate = self.options.tolerance, max(self._descent.rates)
            stable = self.initial.largest_stable_rate
            why = (
                f"; the learning rate {rate:.3g} is beyond {stable:.3g}, the largest stable one"
                if rate > stable
                else ""
            )
            self.void = step, f"it is {error:.0%} off (relative_error, at most {limit:.0%}){why}"

    def _refresh(self, outputs: Tensor, step: int) -> None:
        if self.initial is not None and step > self.initial.start:
            self.refreshed = self._forecast(outputs, step)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        return {
            "initial": None if self.initial is None else self.initial.state_dict(),
            "refreshed": None if self.refreshed is None else self.refreshed.state_dict(),
            "void": None if self.void is None else list(self.void),
            "drift": self._drift.state_dict(),
            "next_drift": self._next_drift,
            "largest": self._largest,
            "exploded": self._exploded,
            "new_at": self._new_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: The state is of another probe batch.
        """
        device = next(self.network.root.parameters()).device
        self.initial, self.refreshed = (
            None if part is None else Forecast.from_state(part, self.loss, device)
            for part in (state["initial"], state["refreshed"])
        )
        self.void = None if state["void"] is None else (int(state["void"][0]), str(state["void"][1]))
        self._drift.load_state_dict(state["drift"])
        self._next_drift = int(state["next_drift"])
        self._largest = float(state["largest"])
        if state["exploded"]:
            self.stop_diverged_curve()
        self._new_at = int(state["new_at"])


def following(every: int, before: int) -> int:
    """The first multiple of `every` after `before`; a batch may take several steps and come to a later one."""
    return (before // every + 1) * every


def _descent(optimizer: Optimizer, scale: float) -> OptimizerStep:
    try:
        descent = read_optimizer_step(optimizer)
    except ValueError as error:
        raise UnreadableStepError(str(error)) from error
    return replace(descent, rates=tuple(scale * rate for rate in descent.rates))


def _scale(network: Network, batch_size: int | None) -> float:
    """Gradient of a training batch over that of the probe: 1 for mean losses, the ratio of their sizes for sums.

    Raises:
        UnreadableStepError: The loss is a sum, and the size of training batches is not known.
    """
    with network.evaluated(), torch.no_grad():
        once = float(network.objective.loss(network.batch))
        try:
            twice = float(network.objective.loss(repeat_batch(network.batch)))
        except (ValueError, TypeError, RuntimeError, IndexError):
            return 1.0  # a batch that cannot be doubled; most losses are means
    if not math.isclose(twice, 2 * once, rel_tol=1e-3, abs_tol=1e-12) or once == 0:
        return 1.0
    if batch_size is None:
        raise UnreadableStepError(
            "the loss in training_step is a sum over the batch, whose size is not known: use a mean"
        )
    return batch_size / samples(network.batch)


def _mixing(outputs: Tensor, wanted: bool) -> bool:
    """Whether the kernel tells outputs apart: where it is wanted, or they have structure, such as tokens or pixels.

    Raises:
        UnreadableStepError: There are too many.
    """
    mixing = wanted or outputs.ndim > 2
    if mixing and outputs.numel() > _LARGEST_MIXING:
        raise UnreadableStepError(
            f"outputs of shape {tuple(outputs.shape)} need a kernel between all {outputs.numel()} numbers, more than "
            f"{_LARGEST_MIXING}: give a smaller probe_size"
        )
    return mixing
