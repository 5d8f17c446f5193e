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


class PushingLoss:
    """What training descends, as a function of all followed outputs, those of the probe first.

    The pool stands for the training data that are not measured. The probe's samples are training data, too, and push as
    often as each of them comes in training.

    Args:
        pool: Loss of the pool.
        probe: Loss of the probe.
        rows: Of the probe.
        weights: Of the pool's and of the probe's loss.
    """

    def __init__(
        self, pool: RecordedLoss | PartLoss, probe: RecordedLoss | PartLoss, rows: int, weights: tuple[float, float]
    ) -> None:
        self._pool, self._probe, self._rows, self._weights = pool, probe, rows, weights

    def __call__(self, outputs: Tensor, targets: None = None) -> Tensor:
        """Loss, differentiable."""
        of_pool, of_probe = self._weights
        return of_pool * self._pool(outputs[self._rows :]) + of_probe * self._probe(outputs[: self._rows])

    def value_and_gradient(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and its gradient in all outputs, both without history."""
        of_pool, of_probe = self._weights
        value, slope = self._pool.value_and_gradient(outputs[self._rows :])
        own, own_slope = self._probe.value_and_gradient(outputs[: self._rows])
        return of_pool * value + of_probe * own, torch.cat([of_probe * own_slope, of_pool * slope])
