"""The closed-form half of `LossDecayPredictor`: squared error at any time, from the initial outputs."""

from collections.abc import Iterator
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from lightning_graphon.dynamics.descent.decay_modes import (
    ClosedForm,
    DecayModes,
    Times,
    as_times,
    descent_residual_factors,
)
from lightning_graphon.dynamics.descent.output_loss import OutputLoss, TestPoints, as_squared_error
from lightning_graphon.dynamics.descent.spread import initial_root, test_deviations
from lightning_graphon.ntk.operators.output_kernel import OutputKernel


class ClosedFormPredictions:
    """What the initial state of a predictor says about any time; `LossDecayPredictor` sets the attributes."""

    momentum: float
    nesterov: bool
    dampening: float
    _kernel: OutputKernel
    _objective: OutputLoss
    _start: Tensor
    _shape: torch.Size
    _test: TestPoints | None

    @cached_property
    def _closed(self) -> ClosedForm:
        square = as_squared_error(self._objective, self._start)
        return ClosedForm.from_eigen(self._kernel.eigen(self._start), square)

    @property
    def modes(self) -> DecayModes:
        """Eigenvalues, decay rates and shares of the initial loss, for squared error.

        Raises:
            ValueError: the loss is not a squared error.
        """
        return self._closed.modes()

    def _residual_factors(self, times: Times, lr: float, flow: bool) -> Tensor:
        """Fraction [T, K, *] of each mode's residual that is left."""
        speed, given = self._speed_and_times(times, lr, flow)
        if not flow:
            return descent_residual_factors(speed, given, self.momentum, self.nesterov, self.dampening)
        # exp(−speed·t), and 1 where the speed is 0, also at t = ∞.
        return torch.where(speed == 0, 1.0, torch.exp(-speed * given.reshape(-1, 1, 1)))

    def _learned_factors(self, times: Times, lr: float, flow: bool) -> Tensor:
        """One minus `_residual_factors`, with the digits of slow modes where there is no momentum."""
        speed, given = self._speed_and_times(times, lr, flow)
        if not flow and (self.momentum > 0 or bool((speed >= 1).any())):
            return 1 - self._residual_factors(times, lr, flow)
        rate = speed if flow else -torch.log1p(-speed)
        return torch.where(speed == 0, 0.0, -torch.expm1(-rate * given.reshape(-1, 1, 1)))

    def _speed_and_times(self, times: Times, lr: float, flow: bool) -> tuple[Tensor, Tensor]:
        speed = lr * self._closed.square.curvature * self._closed.eigen.values
        given = as_times(times, speed, whole=not flow)
        return speed * (1 - self.dampening * (self.momentum > 0)) / (1 - self.momentum) if flow else speed, given

    def predict(self, times: Times, lr: float, *, flow: bool = False) -> Tensor:
        r"""Squared error at any times, from the initial outputs, in closed form.

        The kernel is decomposed once. Steps taken with `step` do not matter here.

        Args:
            times: numbers of steps, any array, 0 and infinity included. With `flow` any real numbers; with
                `lr=1` they are sums of learning rates, so that a schedule becomes a time axis.
            lr: constant learning rate.
            flow: gradient flow, L ∝ Σ exp(−2ηcλt) with c = 2/(N·C) for `mse_loss`, in place of the discrete
                (1 − ηcλ)^{2t}. With momentum, flow runs 1/(1 − μ) times as fast, (1 − d)/(1 − μ) with
                dampening: right for slow modes, after the buffer has filled.

        Returns:
            Losses [T], float64.

        Raises:
            ValueError: the loss is not a squared error, or times are negative, or fractions of a step.
        """
        return self._closed.loss(self._residual_factors(times, lr, flow))

    def predict_outputs(self, times: Times, lr: float, *, flow: bool = False) -> Tensor:
        """Outputs [T, N, ...] at any times; arguments and errors as in `predict`."""
        return self._closed.outputs(self._start, self._residual_factors(times, lr, flow)).reshape(-1, *self._shape)

    @overload
    def predict_test_outputs(
        self, times: Times, lr: float, *, flow: bool = False, initial_covariance: None = None
    ) -> Tensor: ...

    @overload
    def predict_test_outputs(
        self, times: Times, lr: float, *, flow: bool = False, initial_covariance: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def predict_test_outputs(
        self, times: Times, lr: float, *, flow: bool = False, initial_covariance: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Outputs [T, M, ...] of the test points at any times; arguments and errors as in `predict`.

        Args:
            times: as in `predict`.
            lr: as in `predict`.
            flow: as in `predict`.
            initial_covariance: covariance [N + M, N + M] of each output at initialisation between train points, which
                come first, and test points, or [C, N + M, N + M]: the NNGP kernel (`graphon_ntk(get="nngp")`). The
                outputs given to the constructor are the mean then.

        Returns:
            The outputs; with `initial_covariance` also their variances [T, M, ...], over networks that start
            differently and are trained alike (Lee et al. 2019, eq. 16). Infinite where descent has diverged.

        Raises:
            ValueError: no test points were given; or the covariance does not fit or is not positive semi-definite.
        """
        test, learned = self._with_test(), self._learned_factors(times, lr, flow)
        found = [test.outputs(s) for s in self._closed.pushes(learned, self._start.shape[1])]
        outputs = torch.stack(found) if found else self._start.new_zeros(0, *test.shape)
        if initial_covariance is None:
            return outputs
        spread = [w.square().sum(-1) for w in self._deviations(learned, initial_covariance)]
        # [B, M], or [1, M·C] of a full kernel; one row for all outputs is spread over them.
        m, c = test.start.shape
        variances = [(v.T if v.shape[1] == m else v.reshape(m, c)).expand(m, c).reshape(test.shape) for v in spread]
        return outputs, torch.stack(variances) if variances else outputs

    def predict_test_covariance(
        self, times: Times, lr: float, initial_covariance: Tensor, *, flow: bool = False
    ) -> Tensor:
        """Covariance of the test points' outputs over networks that start differently and are trained alike.

        Arguments and errors as in `predict_test_outputs`.

        Returns:
            [T, M, M] where all outputs have the same, [T, C, M, M] where each has its own, or [T, M, C, M, C] for a
            full kernel between outputs. Infinite where descent has diverged.
        """
        m, c = self._with_test().start.shape
        found = [w @ w.mT for w in self._deviations(self._learned_factors(times, lr, flow), initial_covariance)]
        covariance = torch.stack(found) if found else self._start.new_zeros(0, 1, m, m)
        if covariance.shape[-1] != m:
            return covariance.reshape(-1, m, c, m, c)
        return covariance[:, 0] if covariance.shape[1] == 1 else covariance

    def _deviations(self, learned: Tensor, covariance: Tensor) -> Iterator[Tensor]:
        """W of each time, see `test_deviations`."""
        test, start = self._with_test(), self._start
        root = initial_root(covariance.detach().to(start), len(start), *test.start.shape)
        return test_deviations(self._closed.eigen, self._closed.gains(learned), test.kernel.dense(start), root)

    def predict_test_loss(self, times: Times, lr: float, *, flow: bool = False) -> Tensor:
        """Losses [T] of the test points at any times; arguments and errors as in `predict_test_outputs`."""
        test, learned = self._with_test(), self._learned_factors(times, lr, flow)
        found = [test.loss(s) for s in self._closed.pushes(learned, self._start.shape[1])]
        return torch.stack(found) if found else self._start.new_zeros(0)

    def _with_test(self) -> TestPoints:
        if self._test is None:
            raise ValueError("no test points: give test_kernel, test_outputs and test_targets")
        return self._test
