"""One prediction of the loss: which kernel, the outputs measured with it, and every optimizer step since."""

import math
from collections.abc import Callable, Mapping
from itertools import groupby
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.dynamics.compact_kernels import mirrored, pack_kernels, unpack_kernels
from lightning_graphon.dynamics.descent.finite_probe import LossBand, finite_probe_kernel
from lightning_graphon.dynamics.descent.kernel_descent import LossDecayPredictor
from lightning_graphon.dynamics.forecast_kernels import ForecastKernels
from lightning_graphon.dynamics.optimizer import OptimizerStep, RateGroups, relative_rates
from lightning_graphon.dynamics.output_part import OutputPart, PartLoss
from lightning_graphon.dynamics.probed_network import UnsupportedTrainingError
from lightning_graphon.dynamics.recorded_loss import RecordedLoss
from lightning_graphon.ntk import KroneckerKernel

_Predictor = TypeVar("_Predictor")
_SAME_RATIO = 1e-6  # learning rates of groups may drift apart by this before the kernels are mixed anew
_BAND_STEPS = 1000
_CATCH_UP = 0.5  # seconds that may always be spent on the steps since the last look, of which there may be thousands
_SAME_LOSS = 1e-4  # of one batch at the same outputs, in single precision on another device


class Forecast:
    """The predicted loss of the probe, one optimizer step after another.

    The kernel is corrected for the finite probe and kept positive (`finite_probe_kernel`).

    Args:
        made: `kernels` [G, ...], the tangent kernel of each group of parameter groups; `grams` [G, C, C], how outputs
            move each other, the second factors of Kronecker products; None where the kernels say it themselves, or
            where outputs are taken to be alike.
        groups: Which groups.
        outputs: [N, ...], measured with the kernels.
        loss: Of the outputs.
        descent: The optimizer's momentum; its rates at the start.
        dataset_size: Number of training points that the probe stands for.
        step: Optimizer step at which kernels and outputs were measured.
    """

    @checked
    def __init__(
        self, made: ForecastKernels, groups: RateGroups, outputs: Tensor, loss: RecordedLoss,
        descent: OptimizerStep, dataset_size: int, step: int,
    ) -> None:  # fmt: skip
        self.seconds: Callable[[], float] = lambda: math.inf  # that following the optimizer may take now
        self.kernels, self.grams, self.part, self.groups = mirrored(made.kernels), made.grams, made.part, groups
        self.start, self.descent = step, descent
        self._all_outputs, self._points = outputs, dataset_size
        if self.part is None:
            self.outputs, self.dataset_size = outputs, dataset_size
            self._loss: RecordedLoss | PartLoss = loss
        else:
            # Rows stand for the positions of all training points.
            self.outputs, self.dataset_size = self.part.rows(outputs), dataset_size * len(self.part.entries)
            self._loss = PartLoss(loss, outputs, self.part)
        self._history: list[tuple[float, float]] = []
        # Steps to follow when the loss is asked for: many in a row are faster than one between two training steps.
        self._pending: list[tuple[list[float], float]] = []
        self._seen, self._rates = descent, self._group_rates(descent)
        self._ratios = self._ratios_now = relative_rates(self._rates)
        self._mixed = self._stopped = self._left_behind = False
        self.predictor = self._corrected()

    @property
    def largest_stable_rate(self) -> float:
        """At the start."""
        return self._corrected().max_learning_rate(1e-2)

    @property
    def followed(self) -> str:
        """What the prediction is made for, in words."""
        if self.part is None:
            return f"{len(self.outputs)} training samples"
        entries, numbers = self.part.entries, self._all_outputs[0].numel()
        of = "" if entries.numel() == numbers else f" at {len(entries)} of {numbers // entries.shape[1]} positions"
        return f"{self.part.samples} training samples{of}"

    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss in the followed outputs [N, C] at the start."""
        return self._loss.value_and_gradient(self.outputs.double())[1].reshape(len(self.outputs), -1)

    @property
    def loss(self) -> float:
        """Predicted loss now; an `UnsupportedTrainingError` where there was no time to follow all steps."""
        self._catch_up()
        if self._left_behind:
            raise UnsupportedTrainingError("following the prediction takes more than time_budget allows")
        return self.predictor.loss

    @property
    def ratios(self) -> dict[int, float]:
        """Parameter group -> its learning rate relative to the largest."""
        return {i: ratio for group, ratio in zip(self.groups, self._ratios_now, strict=True) for i in group}

    @property
    def buffer(self) -> Tensor | None:
        """Momentum buffer now, of the gradients in the outputs [N, C]; None without one, or where it is not finite."""
        self._catch_up()
        buffer: Tensor | None = self.predictor.state_dict()["buffer"]
        return buffer if buffer is not None and bool(buffer.isfinite().all()) else None

    def inherit(self, buffer: Tensor | None) -> None:
        """Begin with a momentum buffer, since the optimizer has one when it did not begin here."""
        self.predictor.load_state_dict({**self.predictor.state_dict(), "buffer": buffer})

    def advance(self, descent: OptimizerStep) -> None:
        """Follow one optimizer step.

        Raises:
            UnsupportedTrainingError: Groups that shared a learning rate no longer do, or there are new groups.
        """
        if descent is not self._seen:
            self._seen, self._rates = descent, self._group_rates(descent)
            self._ratios_now = relative_rates(self._rates) if max(self._rates) > 0 else self._ratios_now
        if not self._stopped:
            self._pending.append((self._rates, descent.momentum))

    def stop(self) -> None:
        """Follow the learning rates alone from here on: nobody will ask for the loss again."""
        self._catch_up()
        self._stopped = True

    def _catch_up(self) -> None:
        end = perf_counter() + max(self.seconds(), _CATCH_UP)
        for rates, momentum in self._pending:
            if perf_counter() > end:
                self._left_behind = self._stopped = True
                break
            rate = max(rates)
            self._mix(relative_rates(rates) if rate > 0 else self._ratios)
            if math.isfinite(self.predictor.loss):
                self.predictor.step(rate, momentum=momentum)
            if len(self._history) < _BAND_STEPS:  # for the band alone; a checkpoint holds them
                self._history.append((rate, momentum))
        self._pending.clear()

    def _mix(self, ratios: list[float]) -> None:
        """Go on with the kernel of other learning rates."""
        if any(abs(a - b) > _SAME_RATIO for a, b in zip(ratios, self._ratios, strict=True)):
            self._mixed = self._mixed or not torch.equal(self.predictor.outputs.float(), self.outputs.float())
            self._ratios, state = ratios, self.predictor.state_dict()
            self.predictor = self._corrected()
            self.predictor.load_state_dict(state)

    def band(self, seconds: float = math.inf) -> tuple[Tensor, Tensor] | None:
        """Lower and upper predictions, [k + 1] each, of at most 1000 steps, or as many as there is time for.

        None where groups changed their ratio.
        """
        self._catch_up()
        if self._mixed:
            return None
        band = self._predicted(LossBand, self.kernel, dataset_size=self.dataset_size)
        values, end = [(band.lower, band.upper)], perf_counter() + seconds
        for rate, momentum in self._history:
            band.step(rate, momentum=momentum)
            values.append((band.lower, band.upper))
            if perf_counter() > end:
                break
        lower, upper = torch.tensor(values, dtype=torch.float64).T
        return lower, upper

    def shares(self) -> Tensor:
        """Share of the initial fall of the loss, gᵀΘg, in each mode of the kernel, the largest first."""
        return self._plain().fall_by_mode()

    @property
    def kernel(self) -> Tensor | KroneckerKernel:
        """The kernel of one step, with the learning rates of the groups relative to the largest."""
        weights = torch.tensor(self._ratios, dtype=self.kernels.dtype, device=self.kernels.device)
        kernel = torch.tensordot(weights, self.kernels, 1)
        return kernel if self.grams is None else KroneckerKernel(kernel, torch.tensordot(weights, self.grams, 1))

    def _plain(self) -> LossDecayPredictor:
        return self._predicted(LossDecayPredictor, self.kernel)

    def _corrected(self) -> LossDecayPredictor:
        kernel = finite_probe_kernel(self.kernel, self.outputs, self.dataset_size, positive=True)
        return self._predicted(LossDecayPredictor, kernel)

    def _predicted(
        self, kind: Callable[..., _Predictor], kernel: Tensor | KroneckerKernel, **options: Any
    ) -> _Predictor:
        d = self.descent
        options |= {"momentum": d.momentum, "nesterov": d.nesterov, "dampening": d.dampening, "check_every": 0}
        return kind(kernel, self.outputs, None, self._loss, **options)

    def _group_rates(self, descent: OptimizerStep) -> list[float]:
        if sum(map(len, self.groups)) != len(descent.rates):
            now = f"the optimizer has {len(descent.rates)} parameter groups"
            raise UnsupportedTrainingError(f"{now}, not as many as before")
        rates = []
        for group in self.groups:
            own = {descent.rates[i] for i in group}
            if len(own) != 1:
                raise UnsupportedTrainingError("parameter groups that began with one learning rate no longer share it")
            rates.append(own.pop())
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        self._catch_up()
        d = self.descent
        return {
            "kernels": pack_kernels(self.kernels),
            "grams": self.grams,
            "groups": [list(group) for group in self.groups],
            "part": None if self.part is None else [self.part.samples, self.part.entries],
            "outputs": self._all_outputs,
            "descent": [list(d.rates), d.momentum, d.nesterov, d.dampening, d.adaptive],
            "dataset_size": self._points,
            "start": self.start,
            "loss": float(self._loss(self.outputs.double())),
            "ratios": self._ratios,
            "ratios_now": self._ratios_now,
            "mixed": self._mixed,
            "history": [[*values, len(list(steps))] for values, steps in groupby(self._history)],
            # What pushes the outputs of test points is not needed: there are none.
            "predictor": {**self.predictor.state_dict(), "pushed": None},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], loss: RecordedLoss, device: torch.device) -> "Forecast":
        """The forecast of `state_dict()`, to go on with.

        Raises:
            ValueError: It is of another probe batch.
        """
        rates, *rest = state["descent"]
        kernels, outputs = unpack_kernels(state["kernels"], device), state["outputs"].to(device)
        grams = state.get("grams")
        grams = None if grams is None else grams.to(device)  # older checkpoints have none, and go on without
        if not math.isclose(float(loss(outputs.double())), state["loss"], rel_tol=_SAME_LOSS):
            raise ValueError("the loss of the probe batch is another one: the training data or the loss have changed")
        groups, descent = tuple(map(tuple, state["groups"])), OptimizerStep(tuple(rates), *rest)
        part = None if state.get("part") is None else OutputPart(state["part"][0], state["part"][1].cpu())
        made = ForecastKernels(kernels, grams, part)
        new = cls(made, groups, outputs, loss, descent, state["dataset_size"], state["start"])
        rows = torch.as_tensor(state["history"], dtype=torch.float64).tolist()  # older checkpoints have a row per step
        new._history = [(rate, mu) for rate, mu, *n in rows for _ in range(min(int(n[0]) if n else 1, _BAND_STEPS))]
        new._mixed, new._ratios_now = state["mixed"], state["ratios_now"]
        if new._ratios != state["ratios"]:
            new._ratios = state["ratios"]
            new.predictor = new._corrected()
        new.predictor.load_state_dict(state["predictor"])
        return new
