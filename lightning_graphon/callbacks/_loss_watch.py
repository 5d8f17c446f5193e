"""Predicted and observed loss of one probe batch during one fit; no hooks, no logging."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_graphon.callbacks._drift import KernelDrift
from lightning_graphon.callbacks._forecast import Clusters, Forecast, clusters_of
from lightning_graphon.callbacks._network import Network, NotReadableError
from lightning_graphon.callbacks._optimized import OptimizedNetwork
from lightning_graphon.callbacks._traced_loss import traced_loss
from lightning_graphon.ntk import Descent, read_descent

_LARGEST_MIXING = 2048  # rows of a kernel that tells outputs apart; 4 million numbers, multiplied at every step
# Adam's second moments are means of few gradients at first; its kernel stands still only after some steps.
_START_OF_ADAPTIVE = 10


@dataclass(frozen=True)
class Options:
    """What the user chose; see `LossDecayMonitor`."""

    kernel: str
    propagate: str
    every: int
    drift_every: int
    refresh_every: int | None
    start_step: int | None
    tolerance: float
    drift_tolerance: float


class LossWatch:
    """Predicts the loss of the probe step by step, measures it now and then, and says when the prediction is void.

    Args:
        options: What the user chose.
        network: With its probe batch.
        optimizer: Trains the network.
        masks: By the names in the LightningModule.
        dataset_size: Number of training points that the probe stands for.

    Attributes:
        initial: The prediction made at the start; None until then.
        refreshed: The prediction made at the last refresh.
        void: Step and reason from which the initial prediction no longer holds.

    Raises:
        NotReadableError: No prediction can be made; why, in one sentence.
    """

    def __init__(
        self, options: Options, network: Network, optimizer: Optimizer, masks: Mapping[str, Tensor], dataset_size: int
    ) -> None:
        self.options, self.network, self.dataset_size = options, network, dataset_size
        self.initial: Forecast | None = None
        self.refreshed: Forecast | None = None
        self.void: tuple[int, str] | None = None
        self._optimized = OptimizedNetwork(network, optimizer, masks)
        self._optimizer = optimizer
        self._descent = _descent(optimizer)
        self._next_drift = 0
        with network.evaluated(), torch.no_grad():
            outputs = network.outputs().detach()
        self._mixing = _mixing(outputs)
        self.loss = traced_loss(network, outputs)
        self._drift = KernelDrift(network, optimizer, masks, outputs)

    @property
    def start_step(self) -> int:
        """Optimizer step at which the prediction is made."""
        chosen = self.options.start_step
        return chosen if chosen is not None else _START_OF_ADAPTIVE * self._descent.adaptive

    def advance(self) -> None:
        """Follow the step that the optimizer is about to take.

        Raises:
            NotReadableError: The optimizer has changed what it does.
        """
        self._descent = _descent(self._optimizer)
        for forecast in (self.initial, self.refreshed):
            if forecast is not None and math.isfinite(forecast.loss):
                forecast.advance(self._descent)

    def due(self, step: int) -> bool:
        """Whether the loss is to be measured at this step."""
        return step % self.options.every == 0 or (self.initial is None and step >= self.start_step)

    def observe(self, step: int) -> dict[str, float]:
        """Measure the loss; start and refresh predictions.

        Returns:
            `observed`, and where there are any `predicted`, `relative_error`, `kernel_drift`, `refreshed` and
            `refreshed_error`.
        """
        with self.network.evaluated(), torch.no_grad():
            outputs = self.network.outputs().detach()
            values = {"observed": float(self.loss(outputs.double()))}
        if self.initial is None and step >= self.start_step:
            self.initial = self._forecast(outputs, step)
            self._drift.start(self._descent.rates)
            self._next_drift = step + self.options.every
        values.update(self._compared("predicted", "relative_error", self.initial, values["observed"]))
        values.update(self._compared("refreshed", "refreshed_error", self.refreshed, values["observed"]))
        if self.initial is not None and step >= self._next_drift:
            values["kernel_drift"] = self._drift.since_start(self.loss, outputs, self._descent.rates)
            # The next at most twice as far from the start: kernels move most in the beginning.
            self._next_drift = step + min(self.options.drift_every, max(self.options.every, step - self.initial.start))
        self._judge(values, step)
        self._refresh(outputs, step)
        return values

    def _forecast(self, outputs: Tensor, step: int) -> Forecast:
        clusters: Clusters = clusters_of(self._descent.rates)
        kernels = self._optimized.kernels(self.options.kernel, self.options.propagate, clusters, self._mixing)
        return Forecast(kernels, clusters, outputs, self.loss, self._descent, self.dataset_size, step)

    def _compared(self, name: str, error: str, forecast: Forecast | None, observed: float) -> dict[str, float]:
        if forecast is None:
            return {}
        predicted = forecast.loss
        return {name: predicted, error: abs(predicted - observed) / abs(observed) if observed else math.inf}

    def _judge(self, values: Mapping[str, float], step: int) -> None:
        """Declare the initial prediction void, once."""
        if self.void is not None or self.initial is None:
            return
        error, drift = values["relative_error"], values.get("kernel_drift", 0.0)
        stable = self.initial.largest_stable_rate
        if not drift <= self.options.drift_tolerance:
            limit = self.options.drift_tolerance
            self.void = step, f"the kernel has moved by {drift:.0%} (kernel_drift, at most {limit:.0%})"
        elif not error <= self.options.tolerance:
            limit, rate = self.options.tolerance, max(self._descent.rates)
            why = (
                f"; the learning rate {rate:.3g} is beyond {stable:.3g}, the largest stable one"
                if rate > stable
                else ""
            )
            self.void = step, f"it is {error:.0%} off (relative_error, at most {limit:.0%}){why}"

    def _refresh(self, outputs: Tensor, step: int) -> None:
        every = self.options.refresh_every
        if every and self.initial is not None and step > self.initial.start and step % every == 0:
            self.refreshed = self._forecast(outputs, step)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        return {
            "initial": None if self.initial is None else self.initial.state_dict(),
            "refreshed": None if self.refreshed is None else self.refreshed.state_dict(),
            "void": None if self.void is None else list(self.void),
            "drift": self._drift.reference,
            "next_drift": self._next_drift,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        device = next(self.network.root.parameters()).device
        self.initial, self.refreshed = (
            None if part is None else Forecast.from_state(part, self.loss, device)
            for part in (state["initial"], state["refreshed"])
        )
        self.void = None if state["void"] is None else (int(state["void"][0]), str(state["void"][1]))
        self._drift.reference, self._next_drift = state["drift"], int(state["next_drift"])


def _descent(optimizer: Optimizer) -> Descent:
    try:
        return read_descent(optimizer)
    except ValueError as error:
        raise NotReadableError(str(error)) from error


def _mixing(outputs: Tensor) -> bool:
    """Whether the kernel has to tell outputs apart: it does where they have structure, such as tokens or pixels.

    Raises:
        NotReadableError: There are too many.
    """
    mixing = outputs.ndim > 2
    if mixing and outputs.numel() > _LARGEST_MIXING:
        raise NotReadableError(
            f"outputs of shape {tuple(outputs.shape)} need a kernel between all {outputs.numel()} numbers, more than "
            f"{_LARGEST_MIXING}: give a smaller probe_size"
        )
    return mixing
