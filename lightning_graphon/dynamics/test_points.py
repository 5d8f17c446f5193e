"""Test points: moved by the pushes that the train points receive, never pushing themselves."""

from typing import Any

from torch import Tensor

from lightning_graphon.dynamics.output_loss import LossFn, OutputLoss, as_output_matrix
from lightning_graphon.ntk.operators.operator import KernelOperator
from lightning_graphon.ntk.operators.output_kernel import OutputKernel, output_kernel


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
