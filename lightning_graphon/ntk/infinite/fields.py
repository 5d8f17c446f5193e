"""Kernels of one step of a network at its bins of units and pairs of positions."""

from dataclasses import dataclass, replace

from torch import Tensor

from lightning_graphon.ntk.infinite.pairs import Pairs


@dataclass(frozen=True)
class Moments:
    """What each sample has for itself.

    Attributes:
        mean: Means [P, K, N] of the units at each position; None where all are zero.
        square: Second moments [P, K, N], of those positions that are needed.
    """

    mean: Tensor | None
    square: Tensor | None

    def select(self, samples: slice) -> "Moments":
        """Those of some samples."""
        return Moments(*(None if t is None else t[..., samples] for t in (self.mean, self.square)))


@dataclass(frozen=True)
class Field:
    """Kernels between samples x and x' at pairs of positions.

    Attributes:
        pairs: The R pairs.
        k: Second moments E[h h'] [R, K, n, m]; with `paired` samples [R, K, n, 1], x' the same as x.
        t: Tangent kernel of the same shape; None where it is zero or not asked for.
        left: Moments of x.
        right: Moments of x'.
        paired: Whether x' is x, one by one.
    """

    pairs: Pairs
    k: Tensor
    t: Tensor | None
    left: Moments
    right: Moments
    paired: bool

    def at(self, pairs: Pairs) -> "Field":
        """The field at some of its pairs."""
        if len(pairs) == len(self.pairs):
            return self
        rows = pairs.link(self.pairs, self.pairs, lambda: self.pairs.find(pairs.first, pairs.second)).to(self.k.device)
        return replace(self, pairs=pairs, k=self.k[rows], t=None if self.t is None else self.t[rows])

    @property
    def means(self) -> tuple[Tensor, Tensor] | None:
        """E[h] of x and of x' at the two ends of each pair, so that they broadcast; None where both are zero."""
        if self.left.mean is None or self.right.mean is None:
            return None
        return self._ends(self.left.mean, self.right.mean)

    @property
    def squares(self) -> tuple[Tensor, Tensor]:
        """E[h²] of x and of x' at the two ends of each pair."""
        assert self.left.square is not None  # noqa: S101
        assert self.right.square is not None  # noqa: S101
        return self._ends(self.left.square, self.right.square)

    def ends(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Values [P, K, n] and [P, K, m] at the two ends of each pair, so that they broadcast."""
        return self._ends(left, right)

    def _ends(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        at_first, at_second = left[self.pairs.first][..., None], right[self.pairs.second]
        return at_first, at_second[..., None] if self.paired else at_second[:, :, None, :]
