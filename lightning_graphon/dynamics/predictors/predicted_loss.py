"""A loss curve ahead of training, its band, and where two curves part."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PredictedLoss:
    """The loss of a probe at some steps of a training that has not been done.

    Attributes:
        name: Of the predictor.
        steps: [K] int64, ascending, optimizer steps since the beginning of training.
        losses: [O, K] float64, one row for each order of batches; one that is not finite is the last.
        cost: Work of one predicted step in one order, in training steps.

    >>> PredictedLoss("rehearsal", torch.tensor([0, 5]), torch.tensor([[2.0, 1.0], [2.0, 1.5]])).mean
    tensor([2.0000, 1.2500], dtype=torch.float64)
    """

    name: str
    steps: Tensor
    losses: Tensor
    cost: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", torch.as_tensor(self.losses, dtype=torch.float64))
        if self.losses.ndim != 2 or self.losses.shape[1:] != self.steps.shape:
            raise ValueError(f"losses must be [orders, {len(self.steps)}], one per step, got {list(self.losses.shape)}")

    @property
    def mean(self) -> Tensor:
        """[K], of the orders."""
        return self.losses.mean(0)

    @property
    def lower(self) -> Tensor:
        """[K], least of the orders."""
        return self.losses.amin(0)

    @property
    def upper(self) -> Tensor:
        """[K], largest of the orders."""
        return self.losses.amax(0)

    @property
    def until(self) -> int | None:
        """Last step at which a finite loss is predicted; None where none is."""
        finite = self.steps[self.losses.isfinite().all(0)]
        return int(finite[-1]) if len(finite) else None

    def place(self, step: int) -> int | None:
        """Number of a step among those that are predicted; None where it is not."""
        found = (self.steps == step).nonzero().flatten().tolist()
        return found[0] if found else None

    def band(self, tolerance: float = 0.1) -> tuple[Tensor, Tensor]:
        """Lower and upper end [K] of what agrees with the prediction: what the orders span, times (1 ± tolerance)."""
        return self.lower - tolerance * self.lower.abs(), self.upper + tolerance * self.upper.abs()


def first_outside(
    predicted: PredictedLoss, steps: Sequence[int] | Tensor, losses: Tensor, tolerance: float = 0.1
) -> int | None:
    """First step at which other losses leave the prediction's band.

    Args:
        predicted: With its band.
        steps: [M], at which the others are known; those that are not predicted are passed over.
        losses: [M]; one that is not finite is outside.
        tolerance: Of the band.

    Returns:
        The step; None where they stay inside as far as both are known.

    >>> predicted = PredictedLoss("replay", torch.tensor([0, 1, 2]), torch.tensor([[4.0, 2.0, 1.0]]))
    >>> first_outside(predicted, [0, 2], torch.tensor([4.2, 1.2]))
    2
    """
    lower, upper = predicted.band(tolerance)
    for step, loss in zip(map(int, steps), torch.as_tensor(losses).tolist(), strict=True):
        i = predicted.place(step)
        if i is not None and not float(lower[i]) <= loss <= float(upper[i]):
            return step
    return None


def lazy_until(theory: PredictedLoss, rehearsal: PredictedLoss, tolerance: float = 0.1) -> int | None:
    """First step at which theory leaves the rehearsal's band: from there on it is not true of this training.

    Args:
        theory: A replay, or another prediction of the linearised network.
        rehearsal: Of the network itself.
        tolerance: Of the band.

    Returns:
        The step; None for "not before the last step that both predict".

    >>> steps = torch.tensor([0, 1, 2])
    >>> theory = PredictedLoss("replay", steps, torch.tensor([[4.0, 2.0, 0.5]]))
    >>> lazy_until(theory, PredictedLoss("rehearsal", steps, torch.tensor([[4.0, 2.1, 1.0], [4.0, 1.9, 1.1]])))
    2
    """
    return first_outside(rehearsal, theory.steps, theory.mean, tolerance)
