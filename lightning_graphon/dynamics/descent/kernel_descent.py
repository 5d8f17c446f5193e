r"""Predicted loss: gradient descent in function space with the kernel frozen at initialisation.

.. math:: f_{k+1} = f_k - η_k\, Θ\, ∇_f L(f_k)

for any loss of the outputs (Jacot et al. 2018; Lee et al. 2019, section 2.2), at the learning rates really used.
Momentum and Nesterov are linear in the gradients, so they carry over exactly. For squared error there is also
the closed form by modes.
"""

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.dynamics.descent.closed_form import ClosedFormPredictions
from lightning_graphon.dynamics.descent.output_loss import LossFn, OutputLoss, TestPoints, as_output_matrix
from lightning_graphon.dynamics.descent.stability import check_sgd, largest_curvature, stability_limit
from lightning_graphon.ntk.operators.operator import KernelOperator
from lightning_graphon.ntk.operators.output_kernel import output_kernel


class LossDecayPredictor(ClosedFormPredictions):
    r"""Predicts the loss of a batch while `torch.optim.SGD` trains on it, from the kernel at initialisation.

    The loss is taken as the model computes it: its own mean, its own factors. So the kernel is the plain
    Σ ∂f ∂f' over parameters (`empirical_ntk(..., parameterization="standard")` for a module), not divided by
    samples or outputs. Everything is float64, on the device of `outputs` (on the CPU for mps). Weight decay
    is not predicted; groups with their own learning rates and adaptive optimizers are, through the kernel's
    `preconditioner` (`optimizer_preconditioner`).

    Args:
        kernel: Θ between the N samples: [N, N] the same for every output, [C, N, N] one an output, the full
            [N, C, N, C] or [N·C, N·C]; or a `KernelOperator` over N or N·C, such as `kronecker_ntk` gives.
        outputs: f_0 [N, ...], floating point, measured at initialisation; trailing dimensions are the C
            outputs.
        targets: second argument of `loss_fn`; floating point tensors become float64.
        loss_fn: (outputs, targets) to a scalar tensor.
        momentum: μ of SGD.
        nesterov: as in SGD.
        dampening: as in SGD.
        velocity: what the optimizer's momentum buffer holds at the start, pushed through the network [N, ...]: the
            outputs move by −η times it even without a gradient. The closed form and test points know nothing of it.
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

    @checked
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
        velocity: Tensor | None = None,
        test_kernel: Tensor | KernelOperator | None = None,
        test_outputs: Tensor | None = None,
        test_targets: Any = None,
        check_every: int = 25,
    ) -> None:
        check_sgd(momentum, nesterov, dampening)
        self.momentum, self.nesterov, self.dampening = momentum, nesterov, dampening
        self._start = as_output_matrix(outputs)
        self._shape = outputs.shape
        self._velocity = None if velocity is None else velocity.reshape(self._start.shape).to(self._start)
        self._kernel = output_kernel(kernel, self._start)
        self._objective = OutputLoss(loss_fn, targets, outputs, self._start.device)
        self._test = TestPoints.from_arguments(test_kernel, test_outputs, test_targets, loss_fn, self._start)
        self._check_every, self._top, self._warned = check_every, 0.0, False
        self._reset()
        self._evaluate()

    def _reset(self) -> None:
        self.steps = 0
        self._field = self._start
        self._pushed = torch.zeros_like(self._start)  # s_k with f_k = f_0 − Θ s_k
        # The first buffer of SGD is the gradient; that of an optimizer which has one already begins at 0 beside it.
        self._buffer: Tensor | None = None if self._velocity is None else torch.zeros_like(self._start)
        self._carried = 1.0  # part of the first velocity that is left
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
        """−dL/dt now, gᵀΘg for g = ∇_f L, how fast the loss falls per unit of learning rate × steps."""
        gradient = self._evaluate()[1]
        return float((gradient * (self._kernel @ gradient)).sum())

    def fall_by_mode(self) -> Tensor:
        """Share of `speed` now in each mode of the kernel, the largest eigenvalue first; float64, they sum to 1.

        [N] where all outputs share the kernel, else [N·C]. Modes of zero kernels and zero gradients have share 0.
        """
        eigen = self._kernel.eigen(self._start)
        parts = eigen.values * eigen.project(self._evaluate()[1]).square()
        each = parts.sum(1) if eigen.form == "shared" else parts.T.flatten()
        order = (eigen.values[:, 0] if eigen.form == "shared" else eigen.values.T.flatten()).argsort(descending=True)
        total = each.sum()
        return each[order] / total if total > 0 else torch.zeros_like(each)

    @property
    def test_outputs(self) -> Tensor:
        """Predicted outputs of the test points now, [M, ...].

        Raises:
            ValueError: no test points were given.
        """
        return self._with_test().outputs(self._pushed)

    @property
    def test_loss(self) -> float:
        """Predicted loss of the test points now; needs them as `test_outputs` does."""
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
        lr, mu = float(lr), self.momentum if momentum is None else float(momentum)
        if not lr >= 0:
            raise ValueError(f"lr must be 0 or more, got {lr!r}")
        check_sgd(mu)
        self._check(lr, mu)
        push = lr * self._direction(self._evaluate()[1], mu)
        self._pushed = self._pushed + push
        self._field = self._field - self._kernel @ push
        if self._velocity is not None:
            self._carried *= mu
            self._field = self._field - lr * self._carried * (mu if self.nesterov else 1.0) * self._velocity
        self.steps += 1
        self._now = None

    def run(self, lrs: Iterable[float]) -> Tensor:
        """Step through a schedule; errors as in `step`.

        Returns:
            Losses [T + 1], float64 on the CPU, the current one first.
        """
        losses = [self.loss]
        for lr in lrs:
            self.step(lr)
            losses.append(self.loss)
        return torch.tensor(losses, dtype=torch.float64)

    def _direction(self, gradient: Tensor, momentum: float) -> Tensor:
        """What SGD subtracts, before the kernel: gradient, buffer, or Nesterov's sum of both."""
        if momentum == 0:
            return gradient
        if self._buffer is None:
            self._buffer = gradient
        else:
            self._buffer = momentum * self._buffer + (1 - self.dampening) * gradient
        return gradient + momentum * self._buffer if self.nesterov else self._buffer

    def max_learning_rate(self, tolerance: float = 1e-10) -> float:
        """Largest stable learning rate at the current outputs.

        2/λ_max of Θ times the Hessian of the loss; with momentum the factor is that of `stability_limit`. The
        kernel is taken to be positive semi-definite.

        Args:
            tolerance: relative accuracy of λ_max.

        Returns:
            inf where the loss has no positive curvature along the kernel.
        """
        top = self._largest_curvature(tolerance)
        return stability_limit(self.momentum, self.nesterov, self.dampening) / top if top > 0 else float("inf")

    def _largest_curvature(self, tolerance: float) -> float:
        hessian = partial(self._objective.curvature, self._field)
        return largest_curvature(self._kernel, hessian, self._field, tolerance=tolerance)

    def _check(self, lr: float, momentum: float) -> None:
        if self._warned or not self._check_every:
            return
        if self.steps % self._check_every == 0:
            self._top = self._largest_curvature(tolerance=1e-3)
        limit = stability_limit(momentum, self.nesterov, self.dampening)
        if lr * self._top > limit:
            self._warned = True
            warnings.warn(
                f"learning rate {lr:.4g} at step {self.steps} exceeds {limit / self._top:.4g}, the largest stable one "
                "for this kernel and loss: the predicted loss oscillates or grows, and a real network leaves the "
                "regime in which its kernel is constant",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the prediction stands: tensors and numbers only, for checkpoints."""
        return {
            "steps": self.steps, "field": self._field, "pushed": self._pushed, "buffer": self._buffer,
            "carried": self._carried,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of a predictor with the same kernel, targets and loss.

        Raises:
            ValueError: the state is of a batch of another shape.
        """
        if state["field"].shape != self._start.shape:
            raise ValueError(f"state of a batch {list(state['field'].shape)} for one of {list(self._start.shape)}")
        self._reset()
        self.steps = int(state["steps"])
        self._field = state["field"].to(self._start)
        if state["pushed"] is not None:  # test points alone need it
            self._pushed = state["pushed"].to(self._start)
        self._buffer = None if state["buffer"] is None else state["buffer"].to(self._start)
        self._carried = float(state.get("carried", 1.0))  # older checkpoints have none
        if self._check_every and self.steps % self._check_every:
            self._top = self._largest_curvature(tolerance=1e-3)
