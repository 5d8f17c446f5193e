"""A loss as a function of the outputs alone: value, gradient, curvature, and whether it is a square; test points."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graphon.ntk.operators.operator import KernelOperator
from lightning_graphon.ntk.operators.output_kernel import OutputKernel, output_kernel

LossFn = Callable[[Tensor, Any], Tensor]


def as_output_matrix(outputs: Tensor) -> Tensor:
    """Outputs [N, ...] as a float64 copy [N, C] without history.

    Raises:
        ValueError: no samples, or not floating point.
    """
    if outputs.ndim == 0 or outputs.numel() == 0 or not outputs.is_floating_point():
        raise ValueError(
            f"outputs must be floating point [N, C] with N, C > 0, got {outputs.dtype} of shape {tuple(outputs.shape)}"
        )
    with torch.inference_mode(False):
        device = torch.device("cpu") if outputs.device.type == "mps" else outputs.device  # mps has no float64
        return outputs.detach().reshape(len(outputs), -1).to(dtype=torch.float64, device=device, copy=True)


def _target(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A copy of a target tensor outside inference mode, floating point in `dtype`."""
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(False):
        kind = dtype if value.is_floating_point() else value.dtype
        return value.detach().to(device=device, dtype=kind, copy=True)


class OutputLoss:
    """`loss_fn` at fixed targets, as a function of a field [N, C].

    Evaluated in float64. A function that holds single-precision tensors of its own (class weights in a closure)
    and cannot take that is evaluated in the dtype of the outputs instead.

    Args:
        loss_fn: (outputs of the original shape, targets) to a scalar. A module is copied to float64.
        targets: tensor, or whatever `loss_fn` takes.
        like: outputs [N, ...] as the model gave them, for shape and dtype.
        device: to evaluate on.

    Raises:
        TypeError: `loss_fn` is not callable.
    """

    def __init__(self, loss_fn: LossFn, targets: Any, like: Tensor, device: torch.device) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(outputs, targets), got {type(loss_fn).__name__}")
        self.fn = copy.deepcopy(loss_fn).double() if isinstance(loss_fn, nn.Module) else loss_fn
        # A loss that knows its gradient saves autograd's work at every step.
        self._known = getattr(loss_fn, "value_and_gradient", None)
        self.shape, self.dtype, self._own = like.shape, torch.float64, like.dtype
        self.targets = _target(targets, device, torch.float64)

    def __call__(self, field: Tensor) -> Tensor:
        """Loss, 0-dimensional, float64.

        Raises:
            ValueError: the loss is not a scalar.
            RuntimeError: as `loss_fn` raises it.
        """
        try:
            loss = self._evaluate(field)
        except RuntimeError:
            if self.dtype == self._own:
                raise
            loss = self._in_own_dtype(field)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return one number as a tensor (its own mean), got {got}")
        return loss.reshape(()).double()

    def _evaluate(self, field: Tensor) -> Tensor:
        return self.fn(field.reshape(self.shape).to(self.dtype), self.targets)

    def _in_own_dtype(self, field: Tensor) -> Tensor:
        before = self.dtype, self.targets
        self.dtype, self.targets = self._own, _target(self.targets, field.device, self._own)
        try:
            return self._evaluate(field)
        except RuntimeError:
            self.dtype, self.targets = before
            return self._evaluate(field)  # the error of float64 is the one to show

    def gradient(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and ∇_f L [N, C]; works under `no_grad` and in inference mode.

        Raises:
            ValueError: the loss is not a scalar or does not depend on the outputs.
        """
        if self._known is not None:
            value, slope = self._known(field.reshape(self.shape))
            return value, slope.reshape(field.shape)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = field.clone().requires_grad_()
            loss = self(leaf)
            if not loss.requires_grad:
                raise ValueError("the loss does not depend on the outputs; its decay cannot be predicted")
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def curvature(self, field: Tensor, direction: Tensor) -> Tensor:
        """Hessian of the loss in the outputs times a direction, [N, C]."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = field.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self(leaf), leaf, create_graph=True)
            if not slope.requires_grad:
                return torch.zeros_like(field)  # linear in the outputs
            product = torch.autograd.grad(slope, leaf, direction.clone(), allow_unused=True)[0]
            return torch.zeros_like(field) if product is None else product


@dataclass(frozen=True)
class SquaredError:
    """A loss floor + ½ c ‖f − y‖².

    Attributes:
        curvature: c: 2/(N·C) for torch's `mse_loss`, 1/(N·C) for ½·mean, 2 for reduction="sum".
        residual: f_0 − y, [N, C].
        floor: smallest loss.
    """

    curvature: float
    residual: Tensor
    floor: float


def as_squared_error(objective: OutputLoss, field: Tensor) -> SquaredError:
    """Read c, f − y and the floor from the loss itself, so that no convention has to be named.

    Raises:
        ValueError: the Hessian is not a positive multiple of the identity.
    """
    probe = torch.cos(torch.arange(1, field.numel() + 1, dtype=field.dtype, device=field.device)).reshape(field.shape)
    here, there = objective.curvature(field, probe), objective.curvature(field + probe, probe)
    c = float((here * probe).sum() / probe.square().sum())
    error = max(float((h - c * probe).abs().max()) for h in (here, there))
    rounding = 1e-9 if objective.dtype == torch.float64 else 1e-4
    if not (c > 0 and error <= rounding * c):
        raise ValueError(
            "the closed form needs a squared error (a loss whose Hessian in the outputs is a multiple of the "
            "identity); use step() for this loss"
        )
    loss, gradient = objective.gradient(field)
    residual = gradient / c
    floor = float(loss) - 0.5 * c * float(residual.square().sum())
    return SquaredError(c, residual, 0.0 if abs(floor) <= 1e-3 * rounding * float(loss) else floor)


class TestPoints:
    """Points that are not trained on: f_0 − Θ_test s for the pushes s of the train points."""

    def __init__(self, kernel: OutputKernel, outputs: Tensor, objective: OutputLoss) -> None:
        self.kernel, self.start, self.objective = kernel, as_output_matrix(outputs), objective
        self.shape = outputs.shape

    @classmethod
    def from_arguments(
        cls, kernel: Tensor | KernelOperator | None, outputs: Tensor | None, targets: Any, loss_fn: LossFn, like: Tensor
    ) -> "TestPoints | None":
        """Read what the user gave: everything, or nothing.

        Raises:
            ValueError: something is missing or does not fit.
        """
        if kernel is None and outputs is None and targets is None:
            return None
        if kernel is None or outputs is None or targets is None:
            raise ValueError("test points need all of test_kernel, test_outputs and test_targets")
        field = as_output_matrix(outputs)
        if field.shape[1] != like.shape[1]:
            raise ValueError(f"test points have {field.shape[1]} outputs, train points {like.shape[1]}")
        read = output_kernel(kernel, like, rows=len(field), name="test kernel")
        return cls(read, outputs, OutputLoss(loss_fn, targets, outputs, like.device))

    def field(self, pushed: Tensor) -> Tensor:
        """Outputs [M, C] after the pushes s [N, C]."""
        return self.start.to(pushed.device) - self.kernel @ pushed

    def outputs(self, pushed: Tensor) -> Tensor:
        """Outputs in the shape they were given."""
        return self.field(pushed).reshape(self.shape)

    def loss(self, pushed: Tensor) -> Tensor:
        """Their loss."""
        return self.objective(self.field(pushed)).detach()
