r"""What a prediction follows: the outputs of a probe, whose loss is read, and those of a pool, which push both.

Training moves every output by what the training data push, and the probe is no part of them: with A = Θ(probe ∪ pool,
pool) the outputs f of both follow :math:`f ← f - η A ∇L_{pool}(f_{pool})`. That is one descent, with a loss that does
not depend on the probe.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon.dynamics.output_part import OutputPart, PartLoss
from lightning_graphon.dynamics.recorded_loss import RecordedLoss


@dataclass(frozen=True)
class MeasuredOutputs:
    """Outputs of a batch at the start of a prediction, and their loss.

    Attributes:
        outputs: [N, ...].
        loss: Of the outputs.
    """

    outputs: Tensor
    loss: RecordedLoss | PartLoss

    def of_part(self, part: OutputPart | None) -> "MeasuredOutputs":
        """Part of them, [n·P, V], for what the loss of all does."""
        if part is None:
            return self
        assert isinstance(self.loss, RecordedLoss)  # noqa: S101
        own = OutputPart(min(part.samples, len(self.outputs)), part.entries)
        return MeasuredOutputs(own.rows(self.outputs), PartLoss(self.loss, self.outputs, own))


class PoolLoss:
    """The pool's loss as a function of all followed outputs, those of the probe first.

    Args:
        loss: Of the pool.
        probe: Rows of the probe.
    """

    def __init__(self, loss: RecordedLoss | PartLoss, probe: int) -> None:
        self._loss, self._probe = loss, probe

    def __call__(self, outputs: Tensor, targets: None = None) -> Tensor:
        """Loss, differentiable."""
        return self._loss(outputs[self._probe :])

    def value_and_gradient(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and its gradient in all outputs, 0 in those of the probe, both without history."""
        value, slope = self._loss.value_and_gradient(outputs[self._probe :])
        return value, torch.cat([torch.zeros_like(outputs[: self._probe], dtype=slope.dtype), slope])
