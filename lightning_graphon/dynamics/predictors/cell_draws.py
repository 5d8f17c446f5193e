"""Draw masks and weights of a layer: from the cells of its graphon, or with its degrees only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

Fields: TypeAlias = Literal["WED", "WE", "W", "degrees"]


def units_of_bins(label: Tensor, count: int, source: torch.Generator) -> Tensor:
    """For each of `count` new neurons a neuron [count] of the network whose place it takes.

    Bins get their share of the new neurons, exactly where that is a whole number; inside a bin any neuron may be taken.

    Args:
        label: Bin of each neuron, 0 to k - 1, none empty.
        count: Number of new neurons.
        source: Of the random numbers.
    """
    label = label.cpu()
    # Systematic sampling: one random shift of an even comb. Every neuron has the same chance, also with more bins
    # than new neurons.
    shift = torch.rand(1, generator=source, dtype=torch.float64)
    comb = (torch.arange(count, dtype=torch.float64) + shift) / count * len(label)
    size = torch.bincount(label)
    ends = size.cumsum(0)
    bins = torch.searchsorted(ends.double(), comb, right=True).clamp_max(len(size) - 1)
    place = (torch.rand(count, generator=source, dtype=torch.float64) * size[bins]).long()
    return label.argsort(stable=True)[(ends - size)[bins] + place]


@dataclass(frozen=True)
class Cells:
    """A layer's graphons at its cells, float64: values [row bins, column bins].

    Attributes:
        density: Share of weights that are kept.
        mean: Mean of a kept weight; 0 where nothing is kept.
        variance: Its variance.
    """

    density: Tensor
    mean: Tensor
    variance: Tensor


def cells_of(mask: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, fields: Fields) -> Cells:
    """Cells of a layer.

    Args:
        mask: Bool [out, in].
        weight: Of that shape.
        rows: Bin [out] of each row, 0 to k - 1, none empty.
        columns: Bin [in] of each column.
        fields: With "WED" mean and variance are those of the cell, with "WE" there is no mean, with "W" both are those
            of the layer.
    """
    kept = mask.double().cpu()
    values = kept * weight.detach().double().cpu()
    count = torch.outer(torch.bincount(rows), torch.bincount(columns))
    density, energy, drift = (_sums(t, rows, columns) / count for t in (kept, values.square(), values))
    some = density.clamp_min(torch.finfo(torch.float64).tiny)
    mean, square = drift / some, energy / some
    if fields == "W":
        total = kept.sum().clamp_min(1)
        mean, square = (torch.full_like(density, float(t.sum() / total)) for t in (values, values.square()))
    if fields == "WE":
        mean = torch.zeros_like(mean)
    return Cells(density, mean, (square - mean.square()).clamp_min(0))


def _sums(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sums [row bins, column bins] of a matrix."""
    by_row = values.new_zeros(int(rows.max()) + 1, values.shape[1]).index_add_(0, rows, values)
    return by_row.new_zeros(len(by_row), int(columns.max()) + 1).index_add_(1, columns, by_row)


def narrowed_variance(density: Tensor, mean: Tensor, variance: Tensor, ratio: float) -> Tensor:
    """Variance of a kept weight of mean m / r that leaves the variance of a sum over r times as many inputs as it was.

    s² / r alone would not: the mean, r times as small, makes the mask's own noise larger. Where that noise alone is
    already too large there is none left.
    """
    return (variance / ratio - (1 - density) * mean.square() * (ratio**-2 - 1 / ratio)).clamp_min(0)


def draw_layer(
    cells: Cells, rows: Tensor, columns: Tensor, *, ratio: float,
    fluctuation: Literal["sum", "unit"], source: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mask [out, in], bool, and weights [out, in], float64, with normal fluctuations.

    Args:
        cells: Of the wide layer.
        rows: Bin of each output [out].
        columns: Bin of each input [in].
        ratio: Inputs of the new layer over those of the wide one.
        fluctuation: "sum" keeps the variance of a unit's input, "unit" scales the fluctuations as the mean (the output
            layer of μP).
        source: Of the random numbers.
    """
    density, mean, variance = cells.density, cells.mean, cells.variance
    scaled = narrowed_variance(density, mean, variance, ratio) if fluctuation == "sum" else variance / ratio**2
    density, mean, deviation = (t[rows][:, columns] for t in (density, mean / ratio, scaled.sqrt()))
    mask = torch.rand(density.shape, generator=source, dtype=torch.float64) < density
    noise = torch.randn(density.shape, generator=source, dtype=torch.float64)
    return mask, mask * (mean + deviation * noise)


def draw_with_degrees(mask: Tensor, weight: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random mask with the same number of kept weights in every row and column, and the kept weights in any order.

    Args:
        mask: Bool [out, in].
        weight: Of that shape.
        source: Of the random numbers.
    """
    numbers = np.random.default_rng(int(torch.randint(2**62, (1,), generator=source)))
    drawn = _shuffled_with_degrees(mask.cpu().numpy(), numbers.permutation)
    kept = weight.detach().double().cpu()[mask.cpu()]
    weights = torch.zeros(mask.shape, dtype=torch.float64)
    weights[drawn] = kept[torch.randperm(len(kept), generator=source)]
    return drawn, weights


def _shuffled_with_degrees(mask: np.ndarray, permutation: Callable[..., np.ndarray], rounds: int = 20) -> Tensor:
    """Curveball (Strona et al. 2014): pairs of rows deal out anew the entries that only one of them has."""
    drawn = mask.copy()
    for _ in range(rounds):
        order = permutation(len(drawn))
        for a, b in zip(order[::2], order[1::2], strict=False):
            differ = np.flatnonzero(drawn[a] != drawn[b])
            dealt = permutation(drawn[a, differ])
            drawn[a, differ], drawn[b, differ] = dealt, ~dealt
    return torch.from_numpy(drawn)
