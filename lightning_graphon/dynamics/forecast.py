"""One prediction of the loss: which kernel, the outputs measured with it, and every optimizer step since."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.dynamics.compact_kernels import mirrored, pack_kernels, unpack_kernels
from lightning_graphon.dynamics.descent.kernel_descent import LossDecayPredictor
from lightning_graphon.dynamics.followed import MeasuredOutputs, PushingLoss
from lightning_graphon.dynamics.forecast_kernels import ForecastKernels
from lightning_graphon.dynamics.optimizer import OptimizerStep, RateGroups, relative_rates
from lightning_graphon.dynamics.output_part import OutputPart, PartLoss
from lightning_graphon.dynamics.probed_network import UnsupportedTrainingError
from lightning_graphon.dynamics.recorded_loss import RecordedLoss
from lightning_graphon.ntk import KroneckerKernel

_SAME_RATIO = 1e-6  # learning rates of groups may drift apart by this before the kernels are mixed anew
_CATCH_UP = 0.5  # seconds that may always be spent on the steps since the last look, of which there may be thousands
_SAME_LOSS = 1e-4  # of one batch at the same outputs, in single precision on another device
_LARGEST_STATE = 2**18  # numbers of a kernel in a checkpoint: 1 MB


class Forecast:
    """The predicted loss of the probe, one optimizer step after another.

    Args:
        made: The kernels of each group of parameter groups, between the probe and, after it, the pool. Without kernels
            nothing is predicted any more.
        groups: Which groups.
        probe: Its outputs, measured with the kernels, and its loss, which is predicted.
        pool: What pushes; None: the probe does it itself.
        descent: The optimizer's momentum; its rates at the start.
        step: Optimizer step at which kernels and outputs were measured.
        adam_steps: As `adam_steps` says for the optimizer.
        weights: Of the pool's and of the probe's loss in what training descends: the probe's samples are training data.
    """

    @checked
    def __init__(
        self, made: ForecastKernels, groups: RateGroups, probe: MeasuredOutputs, pool: MeasuredOutputs | None,
        descent: OptimizerStep, step: int, adam_steps: int | None = None, weights: tuple[float, float] = (1.0, 0.0),
    ) -> None:  # fmt: skip
        self.seconds: Callable[[], float] = lambda: math.inf  # that following the optimizer may take now
        self.kernels = None if made.kernels is None else mirrored(made.kernels)
        self.grams, self.part, self.groups = made.grams, made.part, groups
        self.velocities, self.start, self.descent = made.velocities, step, descent
        self.probe, self.pool, self._adam_steps, self._weights = probe, pool, adam_steps, weights
        self._measured = probe.of_part(self.part)
        if pool is None:
            self.outputs = self._measured.outputs
            self._loss: RecordedLoss | PartLoss | PushingLoss = self._measured.loss
        else:
            pushing = pool.of_part(self.part)
            self.outputs = torch.cat([self._measured.outputs, pushing.outputs])
            self._loss = PushingLoss(pushing.loss, self._measured.loss, len(self._measured.outputs), weights)
        # Steps to follow when the loss is asked for: many in a row are faster than one between two training steps.
        self._pending: list[tuple[list[float], float]] = []
        self._seen, self._rates = descent, self._group_rates(descent)
        self._ratios = self._ratios_now = relative_rates(self._rates)
        self._stopped, self._left_behind = self.kernels is None, False
        self.predictor = None if self.kernels is None else self._predictor(self.kernels)

    @property
    def largest_stable_rate(self) -> float:
        """At the start."""
        return math.inf if self.kernels is None else self._predictor(self.kernels).max_learning_rate(1e-2)

    @property
    def followed(self) -> str:
        """What the prediction is made for, in words."""
        outputs, pool = self.probe.outputs, self.pool
        count = len(outputs) if self.part is None else min(self.part.samples, len(outputs))
        words = f"{count} training samples"
        if pool is not None:
            words += f" pushed by {len(pool.outputs) if self.part is None else self.part.samples} others"
        if self.part is None or self.part.entries.numel() == outputs[0].numel():
            return words
        positions = outputs[0].numel() // self.part.entries.shape[1]
        return f"{words} at {len(self.part.entries)} of {positions} positions"

    @property
    def loss(self) -> float:
        """Predicted loss now; an `UnsupportedTrainingError` where there was no time to follow all steps."""
        self._catch_up()
        if self._left_behind:
            raise UnsupportedTrainingError("following the prediction takes more than time_budget allows")
        if self.predictor is None:
            return math.nan
        if self.pool is None:
            return self.predictor.loss
        now = self.predictor.outputs[: len(self._measured.outputs)]
        return float(self._measured.loss(now.double()).detach())

    @property
    def ratios(self) -> dict[int, float]:
        """Parameter group -> its learning rate relative to the largest."""
        return {i: ratio for group, ratio in zip(self.groups, self._ratios_now, strict=True) for i in group}

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

    def rolled_out(self, rates: Sequence[Sequence[float]], at: Sequence[int]) -> list[float]:
        """Losses after some of the steps that are to come; the forecast stays where it is.

        Args:
            rates: Learning rates of the parameter groups in each of these steps.
            at: Numbers of steps from now, ascending, at most as many as there are rates.
        """
        ahead = copy.copy(self)
        ahead._pending, ahead.seconds = [], self.seconds
        if self.predictor is not None and self.kernels is not None:
            self._catch_up()
            ahead.predictor = self._predictor(self.kernels)
            ahead.predictor.load_state_dict(self.predictor.state_dict())
        losses, done = list[float](), 0
        for count in at:
            for step in rates[done:count]:
                ahead.advance(replace(self._seen, rates=tuple(step)))
            done = count
            losses.append(ahead.loss)
        return losses

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
            self._step(rates, momentum)
        self._pending.clear()

    def _step(self, rates: list[float], momentum: float) -> None:
        self._mix(relative_rates(rates) if max(rates) > 0 else self._ratios)
        assert self.predictor is not None  # noqa: S101
        if math.isfinite(self.predictor.loss):
            unbiased = 1.0
            if self._adam_steps is not None:
                unbiased = 1 - momentum ** (self._adam_steps + self.predictor.steps + 1)
            self.predictor.step(max(rates) / unbiased, momentum=momentum)

    def _mix(self, ratios: list[float]) -> None:
        """Go on with the kernel of other learning rates."""
        if any(abs(a - b) > _SAME_RATIO for a, b in zip(ratios, self._ratios, strict=True)):
            assert self.predictor is not None  # noqa: S101
            assert self.kernels is not None  # noqa: S101
            self._ratios, state = ratios, self.predictor.state_dict()
            self.predictor = self._predictor(self.kernels)
            self.predictor.load_state_dict(state)

    def shares(self) -> Tensor | None:
        """Share of the initial fall of the loss, gᵀΘg, in each mode of the kernel, the largest first."""
        return None if self.kernels is None else self._predictor(self.kernels).fall_by_mode()

    def _predictor(self, kernels: Tensor) -> LossDecayPredictor:
        """With the learning rates of the groups relative to the largest."""

        def mixed(parts: Tensor) -> Tensor:
            return torch.tensordot(torch.tensor(self._ratios, dtype=parts.dtype, device=parts.device), parts, 1)

        kernel = mixed(kernels) if self.grams is None else KroneckerKernel(mixed(kernels), mixed(self.grams))
        velocity, d = None if self.velocities is None else mixed(self.velocities), self.descent
        return LossDecayPredictor(
            kernel, self.outputs, None, self._loss, check_every=0, velocity=velocity,
            momentum=d.momentum, nesterov=d.nesterov, dampening=d.dampening,
        )  # fmt: skip

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
        """Tensors and numbers only, without kernels of a pool that are larger than a megabyte."""
        self._catch_up()
        d, kernels, predictor = self.descent, self.kernels, self.predictor
        small = kernels is not None and (self.pool is None or kernels.numel() <= 2 * _LARGEST_STATE)
        return {
            "kernels": pack_kernels(kernels) if kernels is not None and small else None,
            "grams": self.grams,
            "velocities": self.velocities if small else None,
            "groups": [list(group) for group in self.groups],
            "part": None if self.part is None else [self.part.samples, self.part.entries],
            "outputs": self.probe.outputs,
            "pool": None if self.pool is None else self.pool.outputs,
            "descent": [list(d.rates), d.momentum, d.nesterov, d.dampening, d.adaptive],
            "adam_steps": self._adam_steps,
            "weights": list(self._weights),
            "start": self.start,
            "loss": float(self.probe.loss(self.probe.outputs.double())),
            "ratios": self._ratios,
            "ratios_now": self._ratios_now,
            # What pushes the outputs of test points is not needed: there are none.
            "predictor": {**predictor.state_dict(), "pushed": None} if predictor is not None and small else None,
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], loss: RecordedLoss, pool_loss: RecordedLoss | None, device: torch.device
    ) -> "Forecast":
        """The forecast of `state_dict()`, to go on with; one without kernels predicts nothing any more.

        Raises:
            ValueError: It is of another probe batch.
        """
        rates, *rest = state["descent"]
        given = (state[name] for name in ("pool", "grams", "velocities"))
        pool, grams, velocities = (None if t is None else t.to(device) for t in given)
        outputs = state["outputs"].to(device)
        if not math.isclose(float(loss(outputs.double())), state["loss"], rel_tol=_SAME_LOSS):
            raise ValueError("the loss of the probe batch is another one: the training data or the loss have changed")
        if (pool is None) != (pool_loss is None):
            raise ValueError("it has a pool, and now there is none, or the other way round")
        groups, descent = tuple(map(tuple, state["groups"])), OptimizerStep(tuple(rates), *rest)
        part = None if state["part"] is None else OutputPart(state["part"][0], state["part"][1].cpu())
        kernels = None if state["kernels"] is None else unpack_kernels(state["kernels"], device)
        new = cls(
            ForecastKernels(kernels, grams, part, velocities), groups, MeasuredOutputs(outputs, loss),
            None if pool is None or pool_loss is None else MeasuredOutputs(pool, pool_loss),
            descent, state["start"], state["adam_steps"], tuple(state["weights"]),
        )  # fmt: skip
        new._ratios_now = state["ratios_now"]
        if new.kernels is not None and new.predictor is not None:
            new._ratios = state["ratios"]
            new.predictor = new._predictor(new.kernels)
            new.predictor.load_state_dict(state["predictor"])
        return new
