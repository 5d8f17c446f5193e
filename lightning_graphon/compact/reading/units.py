"""Units of a network by label: which have to go together, and which have to stay."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

FIXED = 0  # label of whatever belongs to no unit that could go


@dataclass
class Units:
    """Labels of units, from 1 on.

    Attributes:
        count: Number of labels, with `FIXED`.
        joined: Pairs of labels [n], [n] that go together or stay together.
        pinned: Labels [n] that stay, and why.
        doubtful: Labels [n] that may have to stay, and why: code has numbers in it that may be theirs.
    """

    count: int = 1
    joined: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pinned: list[tuple[Tensor, str]] = field(default_factory=list)
    doubtful: list[tuple[Tensor, str]] = field(default_factory=list)

    def new(self, count: int) -> Tensor:
        """Labels [count] that were not there before."""
        self.count += count
        return torch.arange(self.count - count, self.count)

    def join(self, left: Tensor, right: Tensor) -> None:
        """Labels of the same shape that are one unit, entry by entry."""
        if not torch.equal(left, right):
            self.joined.append((left.reshape(-1), right.reshape(-1)))

    def pin(self, labels: Tensor, reason: str) -> None:
        """These stay."""
        self.pinned.append((labels.unique(), reason))

    def doubt(self, labels: Tensor, reason: str) -> None:
        """These stay if the network does not work without them."""
        self.doubtful.append((labels.unique(), reason))

    def classes(self) -> Tensor:
        """Number [count] of each label's class: those that go together."""
        if not self.joined:
            return torch.arange(self.count)
        left, right = (torch.cat(side).numpy() for side in zip(*self.joined, strict=True))
        graph = coo_matrix((np.ones(len(left)), (left, right)), (self.count, self.count))
        return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of a tensor of the forward pass; all three have its shape.

    Attributes:
        labels: Unit of each entry.
        varies: Whether an entry depends on the input; in training: whether it is ever anything else than zero.
        constant: The entries that do not vary; 0 elsewhere.
        fresh: Whether the labels are those of a parameter that nothing has met yet.
    """

    labels: Tensor
    varies: Tensor
    constant: Tensor
    fresh: bool = False

    def map(self, function: Callable[[Tensor], Tensor]) -> "Value":
        """The same function of all three, as a reshape."""
        return Value(function(self.labels), function(self.varies), function(self.constant), self.fresh)

    def axes(self) -> list[int]:
        """Axes along which units differ."""
        return [dim for dim in range(self.labels.ndim) if _differs(self.labels, dim)]

    def along(self, dim: int) -> Tensor | None:
        """Labels of an axis; None where other axes have units, too."""
        dim %= self.labels.ndim
        if any(axis != dim for axis in self.axes()):
            return None
        return self.labels.movedim(dim, -1).reshape(-1, self.labels.shape[dim])[0].contiguous()

    def varies_along(self, dim: int) -> Tensor:
        """Whether anything varies at each index of an axis."""
        return self.varies.movedim(dim, -1).reshape(-1, self.labels.shape[dim]).any(0)


def _differs(labels: Tensor, dim: int) -> bool:
    if labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    return not bool((labels == labels.narrow(dim, 0, 1)).all())


def spread(labels: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """Labels of an axis as those of a whole tensor, without copies.

    >>> spread(torch.tensor([3, 4]), torch.Size([5, 2, 7]), 1)[0, :, 0]
    tensor([3, 4])
    """
    size = [1] * len(shape)
    size[dim] = -1
    return labels.reshape(size).expand(shape)
