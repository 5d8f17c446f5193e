"""Pairs of positions (p, p') at which a kernel is needed, and how maps between positions move them.

A kernel of images is needed at few of its P² pairs: a network that flattens reads p = p' only, a pooling reads all
pairs of a window. Walking from the output to the input tells which.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True)
class Pairs:
    """A set of pairs of positions.

    Attributes:
        codes: Sorted numbers first · positions + second.
        positions: Number of positions.
        links: See `link`.
    """

    codes: Tensor
    positions: int
    links: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def link(self, owner: object, inputs: "Pairs", build: Callable[[], _T]) -> _T:
        """What `build` gives, once for all tiles: how an owner's pairs come from those of its input."""
        key = id(owner), id(inputs)
        if key not in self.links:
            self.links[key] = (build(), owner, inputs)  # kept alive, so that their ids stay theirs
        return self.links[key][0]

    @classmethod
    def from_ends(cls, first: Tensor, second: Tensor, positions: int) -> "Pairs":
        """The distinct pairs; those with an end outside, -1, are left out."""
        inside = (first >= 0) & (second >= 0)
        return cls((first * positions + second)[inside].unique(), positions)

    @classmethod
    def diagonal(cls, places: Tensor, positions: int) -> "Pairs":
        """Pairs (p, p)."""
        return cls.from_ends(places, places, positions)

    @property
    def first(self) -> Tensor:
        """Positions p."""
        return self.codes // self.positions

    @property
    def second(self) -> Tensor:
        """Positions p'."""
        return self.codes % self.positions

    @property
    def places(self) -> Tensor:
        """All positions that are in a pair."""
        return torch.cat([self.first, self.second]).unique()

    def __len__(self) -> int:
        return len(self.codes)

    def __or__(self, other: "Pairs") -> "Pairs":
        return Pairs(torch.cat([self.codes, other.codes]).unique(), self.positions)

    def find(self, first: Tensor, second: Tensor) -> Tensor:
        """Number of each pair in the set; -1 where an end is outside."""
        codes = first * self.positions + second
        found = torch.searchsorted(self.codes, codes).clamp_max(max(0, len(self) - 1))
        inside = (first >= 0) & (second >= 0)
        return torch.where(inside, found, -1)


class PositionMap(Protocol):
    """Which input positions an output position reads."""

    def reads(self, pairs: Pairs) -> Pairs:
        """Input pairs that these output pairs need."""
        ...


@dataclass(frozen=True)
class Nowhere:
    """No kernel of the input is read."""

    positions: int

    def reads(self, pairs: Pairs) -> Pairs:
        """Nothing."""
        return Pairs(pairs.codes[:0], self.positions)


@dataclass(frozen=True)
class Taps:
    """Output position p reads `index[τ, p]`; both ends of a pair with the same tap τ, as taps have their own weights.

    Attributes:
        index: Input positions [taps, P], -1 outside.
        positions: Number of input positions.
    """

    index: Tensor
    positions: int

    def reads(self, pairs: Pairs) -> Pairs:
        """Pairs (τ(p), τ(p'))."""
        return Pairs.from_ends(self.index[:, pairs.first], self.index[:, pairs.second], self.positions)

    def rows(self, pairs: Pairs, inputs: Pairs) -> Tensor:
        """Numbers [taps, pairs] of the input pairs; -1 outside."""
        return pairs.link(self, inputs, lambda: inputs.find(self.index[:, pairs.first], self.index[:, pairs.second]))


@dataclass(frozen=True)
class Windows:
    """Output position p is a weighted sum of positions `index[p, s]`; both ends of a pair on their own.

    Attributes:
        index: Input positions [P, window], -1 outside.
        weights: Their weights [P, window].
        positions: Number of input positions.
    """

    index: Tensor
    weights: Tensor
    positions: int

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> "Windows":
        """From a matrix [P, positions] of weights."""
        window = max(1, int((matrix != 0).sum(1).max()))
        order = (matrix != 0).long().argsort(dim=1, descending=True, stable=True)[:, :window]
        weights = matrix.gather(1, order)
        return cls(torch.where(weights != 0, order, -1), weights, matrix.shape[1])

    def reads(self, pairs: Pairs) -> Pairs:
        """All pairs of the two windows."""
        first, second = self._ends(pairs)
        return Pairs.from_ends(first, second, self.positions)

    def matrix(self, pairs: Pairs, inputs: Pairs, like: Tensor) -> Tensor:
        """Sparse matrix [pairs, input pairs]."""
        return pairs.link(self, inputs, lambda: self._matrix(pairs, inputs, like))

    def _matrix(self, pairs: Pairs, inputs: Pairs, like: Tensor) -> Tensor:
        first, second = self._ends(pairs)
        left, right = self.weights[pairs.first], self.weights[pairs.second]
        rows = inputs.find(first, second).flatten(1)
        return sparse_rows(rows, (left[:, :, None] * right[:, None, :]).flatten(1).to(like), len(inputs))

    def _ends(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        left, right = self.index[pairs.first], self.index[pairs.second]
        return torch.broadcast_tensors(left[:, :, None], right[:, None, :])


def sparse_rows(columns: Tensor, values: Tensor, width: int) -> Tensor:
    """Sparse matrix [rows, width] of values [rows, n] at columns [rows, n], none where the column is -1."""
    inside = columns >= 0
    ends = torch.cat([columns.new_zeros(1), inside.sum(1).cumsum(0)])
    values = values.expand(columns.shape)[inside]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the format beta
        return torch.sparse_csr_tensor(ends, columns[inside], values, (len(columns), width), check_invariants=False)
