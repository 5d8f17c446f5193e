"""The closed-form half of `LossDecayPredictor`: squared error at any time, from the initial outputs."""

from functools import cached_property

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
        speed = lr * self._closed.square.curvature * self._closed.eigen.values
        given = as_times(times, speed, whole=not flow)
        if flow:
            gain = (1 - self.dampening * (self.momentum > 0)) / (1 - self.momentum)
            # exp(−speed·t), and 1 where the speed is 0, also at t = ∞.
            return torch.where(speed == 0, 1.0, torch.exp(-speed * gain * given.reshape(-1, 1, 1)))
        return descent_residual_factors(speed, given, self.momentum, self.nesterov, self.dampening)

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

    def predict_test_outputs(self, times: Times, lr: float, *, flow: bool = False) -> Tensor:
        """Outputs [T, M, ...] of the test points at any times; arguments and errors as in `predict`.

        Raises:
            ValueError: no test points were given.
        """
        test, left = self._with_test(), self._residual_factors(times, lr, flow)
        found = [test.outputs(s) for s in self._closed.pushes(left, self._start.shape[1])]
        return torch.stack(found) if found else self._start.new_zeros(0, *test.shape)

    def predict_test_loss(self, times: Times, lr: float, *, flow: bool = False) -> Tensor:
        """Losses [T] of the test points at any times; arguments and errors as in `predict_test_outputs`."""
        test, left = self._with_test(), self._residual_factors(times, lr, flow)
        found = [test.loss(s) for s in self._closed.pushes(left, self._start.shape[1])]
        return torch.stack(found) if found else self._start.new_zeros(0)

    def _with_test(self) -> TestPoints:
        if self._test is None:
            raise ValueError("no test points: give test_kernel, test_outputs and test_targets")
        return self._test
