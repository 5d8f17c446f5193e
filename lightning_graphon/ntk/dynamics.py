r"""Predicted loss: gradient descent in function space with the kernel frozen at initialisation.

.. math:: f_{k+1} = f_k - η_k\, Θ\, ∇_f L(f_k)

for any loss of the outputs (Jacot et al. 2018; Lee et al. 2019, section 2.2), at the learning rates really used.
Momentum and Nesterov are linear in the gradients, so they carry over exactly. For squared error there is also
the closed form by modes.
"""

import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_graphon.ntk._field import FieldKernel, field_kernel
from lightning_graphon.ntk._objective import LossFn, OutputLoss, as_field, as_square
from lightning_graphon.ntk.modes import ClosedForm, DecayModes, Times, as_times, descent_left, flow_left
from lightning_graphon.ntk.operator import KernelOperator
from lightning_graphon.ntk.stability import largest_curvature, stable_product


class LossDecayPredictor:
    r"""Predicts the loss of a batch while `torch.optim.SGD` trains on it, from the kernel at initialisation.

    The loss is taken as the model computes it: its own mean, its own factors. So the kernel is the plain
    Σ ∂f ∂f' over parameters (`empirical_ntk(..., parameterization="standard")` for a module), not divided by
    samples or outputs. Everything is float64, on the device of `outputs` (on the CPU for mps). Weight decay
    and adaptive optimizers are not predicted; groups with their own learning rates are, through the kernel's
    `preconditioner`.

    Args:
        kernel: Θ between the N samples: [N, N] the same for every output, [C, N, N] one an output, the full
            [N, C, N, C] or [N·C, N·C]; or a `KernelOperator` over N or N·C.
        outputs: f_0 [N, ...], floating point, measured at initialisation; trailing dimensions are the C
            outputs.
        targets: second argument of `loss_fn`; floating point tensors become float64.
        loss_fn: (outputs, targets) to a scalar tensor.
        momentum: μ of SGD.
        nesterov: as in SGD.
        dampening: as in SGD.
        test_kernel: between M test points and the N train points: [M, N], [C, M, N], [M, C, N, C] or
            [M·C, N·C].
        test_outputs: outputs [M, ...] of the test points at initialisation.
        test_targets: their targets.
        check_every: steps between checks of the learning rate against the largest stable one; 0 for none.

    Attributes:
        steps: number of steps taken.

    Raises:
        TypeError: `loss_fn` is not callable.
        ValueError: shapes that do not fit, kernels that are not symmetric and finite, momentum out of [0, 1),
            Nesterov without momentum or with dampening, test points given in part, or a loss that is not a
            scalar function of the outputs.

    >>> predictor = LossDecayPredictor(torch.eye(2), torch.zeros(2, 1), torch.ones(2, 1), torch.nn.functional.mse_loss)
    >>> predictor.step(0.1)
    >>> round(predictor.loss, 6), round(float(predictor.predict(1, lr=0.1)), 6)
    (0.81, 0.81)
    """

    def __init__(
        self,
        kernel: Tensor | KernelOperator,
        outputs: Tensor,
        targets: Any,
        loss_fn: LossFn,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        dampening: float = 0.0,
        test_kernel: Tensor | KernelOperator | None = None,
        test_outputs: Tensor | None = None,
        test_targets: Any = None,
        check_every: int = 25,
    ) -> None:
        _check_sgd(momentum, nesterov, dampening)
        self.momentum, self.nesterov, self.dampening = momentum, nesterov, dampening
        self._start = as_field(outputs)
        self._shape = outputs.shape
        self._kernel = field_kernel(kernel, self._start)
        self._objective = OutputLoss(loss_fn, targets, outputs.shape, self._start.device)
        self._test = _TestPoints.of(test_kernel, test_outputs, test_targets, loss_fn, self._start)
        self._check_every, self._limit, self._warned = check_every, float("inf"), False
        self._reset()
        self._evaluate()

    def _reset(self) -> None:
        self.steps = 0
        self._field = self._start
        self._pushed = torch.zeros_like(self._start)  # s_k with f_k = f_0 − Θ s_k
        self._buffer: Tensor | None = None
        self._now: tuple[Tensor, Tensor] | None = None

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient at the current outputs, once a step."""
        if self._now is None:
            self._now = self._objective.gradient(self._field)
        return self._now

    @property
    def loss(self) -> float:
        """Predicted loss now."""
        return float(self._evaluate()[0])

    @property
    def outputs(self) -> Tensor:
        """Predicted outputs now, float64, in the shape they were given; a copy."""
        return self._field.reshape(self._shape).clone()

    @property
    def speed(self) -> float:
        """−dL/dt now, gᵀΘg for g = ∇_f L: how fast the loss falls per unit of learning rate × steps."""
        gradient = self._evaluate()[1]
        return float((gradient * (self._kernel @ gradient)).sum())

    @property
    def test_outputs(self) -> Tensor:
        """Predicted outputs of the test points now, [M, ...].

        Raises:
            ValueError: no test points were given.
        """
        return self._with_test().outputs(self._pushed)

    @property
    def test_loss(self) -> float:
        """Predicted loss of the test points now.

        Raises:
            ValueError: no test points were given.
        """
        return float(self._with_test().loss(self._pushed))

    def step(self, lr: float, *, momentum: float | None = None) -> None:
        """Advance by one optimizer step.

        Args:
            lr: learning rate of this step.
            momentum: μ of this step, for schedules that change it; the constructor's by default.

        Raises:
            ValueError: `lr` is negative or NaN, or `momentum` out of [0, 1).

        Warns:
            UserWarning: once, when `lr` exceeds the largest stable learning rate at the current outputs.
        """
        if not lr >= 0:
            raise ValueError(f"lr must be 0 or more, got {lr!r}")
        if momentum is not None:
            _check_sgd(momentum, False, 0.0)
            self.momentum = momentum
        self._check(lr)
        push = lr * self._direction(self._evaluate()[1])
        self._pushed = self._pushed + push
        self._field = self._field - self._kernel @ push
        self.steps += 1
        self._now = None

    def run(self, lrs: Iterable[float]) -> Tensor:
        """Step through a schedule.

        Returns:
            Losses [T + 1], float64 on the CPU, the current one first.

        Raises:
            ValueError: as in `step`.
        """
        losses = [self.loss]
        for lr in lrs:
            self.step(lr)
            losses.append(self.loss)
        return torch.tensor(losses, dtype=torch.float64)

    def _direction(self, gradient: Tensor) -> Tensor:
        """What SGD subtracts, before the kernel: gradient, buffer, or Nesterov's sum of both."""
        if self.momentum == 0:
            return gradient
        if self._buffer is None:
            self._buffer = gradient
        else:
            self._buffer = self.momentum * self._buffer + (1 - self.dampening) * gradient
        return gradient + self.momentum * self._buffer if self.nesterov else self._buffer

    def max_learning_rate(self, tolerance: float = 1e-10) -> float:
        """Largest stable learning rate at the current outputs.

        2/λ_max of Θ times the Hessian of the loss; with momentum the factor is that of `stable_product`.

        Args:
            tolerance: relative accuracy of λ_max.

        Returns:
            inf where the loss has no positive curvature along the kernel.
        """
        field = self._field
        top = largest_curvature(self._kernel, lambda v: self._objective.curvature(field, v), field, tolerance=tolerance)
        limit = stable_product(self.momentum, self.nesterov, self.dampening)
        return limit / top if top > 0 else float("inf")

    def _check(self, lr: float) -> None:
        if self._warned or not self._check_every:
            return
        if self.steps % self._check_every == 0:
            self._limit = self.max_learning_rate(tolerance=1e-4)
        if lr > self._limit:
            self._warned = True
            warnings.warn(
                f"learning rate {lr:.4g} at step {self.steps} exceeds {self._limit:.4g}, the largest stable one for "
                "this kernel and loss: the predicted loss oscillates or grows, and a real network leaves the regime "
                "in which its kernel is constant",
                stacklevel=3,
            )

    @cached_property
    def _closed(self) -> ClosedForm:
        square = as_square(self._objective, self._start)
        return ClosedForm.of(self._kernel.eigen(self._start), square)

    @property
    def modes(self) -> DecayModes:
        """Eigenvalues, decay rates and shares of the initial loss, for squared error.

        Raises:
            ValueError: the loss is not a squared error.
        """
        return self._closed.modes()

    def _left(self, times: Times, lr: float, flow: bool) -> Tensor:
        speed = lr * self._closed.square.curvature * self._closed.eigen.values
        given = as_times(times, speed, whole=not flow)
        if flow:
            return flow_left(speed * (1 - self.dampening * (self.momentum > 0)) / (1 - self.momentum), given)
        return descent_left(speed, given, self.momentum, self.nesterov, self.dampening)

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
        return self._closed.loss(self._left(times, lr, flow))

    def predict_outputs(self, times: Times, lr: float, *, flow: bool = False) -> Tensor:
        """Outputs [T, N, ...] at any times; arguments as in `predict`.

        Raises:
            ValueError: as in `predict`.
        """
        return self._closed.outputs(self._start, self._left(times, lr, flow)).reshape(-1, *self._shape)

    def predict_test_outputs(self, times: Times, lr: float, *, flow: bool = False) -> Tensor:
        """Outputs [T, M, ...] of the test points at any times; arguments as in `predict`.

        Raises:
            ValueError: as in `predict`, or no test points were given.
        """
        test, left = self._with_test(), self._left(times, lr, flow)
        return torch.stack([test.outputs(s) for s in self._closed.pushes(left, self._start.shape[1])])

    def predict_test_loss(self, times: Times, lr: float, *, flow: bool = False) -> Tensor:
        """Losses [T] of the test points at any times; arguments as in `predict`.

        Raises:
            ValueError: as in `predict`, or no test points were given.
        """
        test, left = self._with_test(), self._left(times, lr, flow)
        return torch.stack([test.loss(s) for s in self._closed.pushes(left, self._start.shape[1])])

    def _with_test(self) -> "_TestPoints":
        if self._test is None:
            raise ValueError("no test points: give test_kernel, test_outputs and test_targets")
        return self._test

    def state_dict(self) -> dict[str, Any]:
        """Where the prediction stands: tensors and numbers only, for checkpoints."""
        return {
            "steps": self.steps, "field": self._field, "pushed": self._pushed, "buffer": self._buffer,
            "momentum": self.momentum,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of a predictor with the same kernel, targets and loss.

        Raises:
            ValueError: the state is of a batch of another shape.
        """
        if state["field"].shape != self._start.shape:
            raise ValueError(f"state of a batch {list(state['field'].shape)} for one of {list(self._start.shape)}")
        self._reset()
        self.steps, self.momentum = int(state["steps"]), float(state["momentum"])
        self._field, self._pushed = state["field"].to(self._start), state["pushed"].to(self._start)
        self._buffer = None if state["buffer"] is None else state["buffer"].to(self._start)
        if self._check_every and self.steps % self._check_every:
            self._limit = self.max_learning_rate(tolerance=1e-4)


class _TestPoints:
    """Points that are not trained on, moved by Θ_test s."""

    def __init__(self, kernel: FieldKernel, outputs: Tensor, objective: OutputLoss) -> None:
        self.kernel, self.start, self.objective = kernel, as_field(outputs), objective
        self.shape = outputs.shape

    @classmethod
    def of(
        cls, kernel: Tensor | KernelOperator | None, outputs: Tensor | None, targets: Any, loss_fn: LossFn, like: Tensor
    ) -> "_TestPoints | None":
        if kernel is None and outputs is None and targets is None:
            return None
        if kernel is None or outputs is None or targets is None:
            raise ValueError("test points need all of test_kernel, test_outputs and test_targets")
        field = as_field(outputs)
        if field.shape[1] != like.shape[1]:
            raise ValueError(f"test points have {field.shape[1]} outputs, train points {like.shape[1]}")
        read = field_kernel(kernel, like, rows=len(field), name="test kernel")
        return cls(read, outputs, OutputLoss(loss_fn, targets, outputs.shape, like.device))

    def field(self, pushed: Tensor) -> Tensor:
        return self.start.to(pushed.device) - self.kernel @ pushed

    def outputs(self, pushed: Tensor) -> Tensor:
        return self.field(pushed).reshape(self.shape)

    def loss(self, pushed: Tensor) -> Tensor:
        return self.objective(self.field(pushed)).detach()


def _check_sgd(momentum: float, nesterov: bool, dampening: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError("Nesterov needs momentum and no dampening, as in torch.optim.SGD")
