"""Eigenvalues of the Gram matrix of masked weights, and those that neither the mask's graphon nor its mean explains."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.graphon.limits.scaled_saliency import finite_float64
from lightning_graphon.graphon.spectra.profile import VarianceProfile

_QUANTILE = 3.0  # of the Tracy-Widom law, in its own units: 99.9 %


@dataclass(frozen=True)
class WeightSpectrum:
    """Eigenvalues of X Xᵀ (of Xᵀ X for more rows than columns), and what a matrix of independent entries would have.

    Attributes:
        eigenvalues: Those found, descending.
        edge: End of the bulk for independent entries with the variances of X.
        beyond: Where chance ends: the edge with what its fluctuation, and few weights for each unit, add to it.
        drift_outliers: Where the mean of X puts eigenvalues beyond the edge, descending.
        spikes: Those found beyond `beyond` that no outlier of the mean accounts for: structure of the weights that
            neither the mask nor a mean brings.
        grid: Points [k] of the density.
        density: Density of the bulk law at these points.
    """

    eigenvalues: Tensor
    edge: float
    beyond: float
    drift_outliers: Tensor
    spikes: Tensor
    grid: Tensor
    density: Tensor


@checked
def weight_spectrum(
    weight: Tensor, mask: Tensor | None = None, *, bins: int = 8, resolution: int = 128
) -> WeightSpectrum:
    """The spectrum of a layer against the right null: independent entries with the variance profile E − D².

    A mask with hubs has eigenvalues beyond the Marchenko-Pastur edge, which is that of equal variances, though its
    weights never trained. The variances here are a factor of the row, one of the column, and one for each of
    bins × bins groups of them by energy; the factors are shrunk by what chance explains of their spread. The mean D is
    that of each group, and its outliers are predicted apart.

    Args:
        weight: Weights [out, in, *taps]; taps are columns of their own.
        mask: Kept weights, of the same shape; None: weights that are zero are pruned.
        bins: Groups of rows and of columns.
        resolution: Number of points of the density.

    Raises:
        ValueError: Fewer than two axes, weights that are not finite or all zero, shapes that differ, or `bins` or
            `resolution` below 1.

    >>> X = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    >>> spectrum = weight_spectrum(X)
    >>> len(spectrum.spikes)
    0
    >>> round(spectrum.edge / (60**0.5 + 80**0.5) ** 2, 1)  # that of Marchenko and Pastur
    1.0
    """
    matrix = finite_float64("weight", weight, dims=2).flatten(1)
    if mask is not None:
        if mask.shape != weight.shape:
            raise ValueError(f"mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
        matrix = matrix * mask.flatten(1).to(matrix)
    if bins < 1 or resolution < 1:
        raise ValueError(f"bins and resolution must be at least 1, got {bins} and {resolution}")
    if not bool(matrix.any()):
        raise ValueError("weight has no entry that is not zero")
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    profile = estimated_profile(matrix, bins)
    found = torch.linalg.svdvals(matrix).square()
    edge = profile.edge()
    outliers = torch.tensor(profile.drift_spikes(edge), dtype=torch.float64).square()
    beyond = edge**2 * (1 + _few_weights(matrix, profile)) * (1 + _QUANTILE * _fluctuation(profile))
    grid = torch.linspace(edge / resolution, 1.05 * edge, resolution, dtype=torch.float64)
    density = profile.density(grid, edge) / (2 * grid)
    return WeightSpectrum(
        found, edge**2, beyond, outliers, _unexplained(found[found > beyond], outliers), grid.square(), density
    )


def estimated_profile(matrix: Tensor, bins: int) -> VarianceProfile:
    """Variances and means of the entries of a matrix [m, n]."""
    square = matrix.square()
    energy = square.mean()
    row_energy, col_energy = square.mean(1), square.mean(0)
    row_groups, col_groups = _groups(row_energy, bins), _groups(col_energy, bins)
    drift, cells = _cell_means(matrix, row_groups, col_groups), _cell_means(square, row_groups, col_groups)
    variance = (cells - drift.square()).clamp(min=0)
    # What the cells have beyond the product of both sides, which the factors carry.
    sides = torch.outer(_group_means(row_energy, row_groups), _group_means(col_energy, col_groups)) / energy
    interaction = torch.where(sides > 0, variance / torch.where(sides > 0, sides, 1.0), 0.0)
    rows, cols = _shrunk(row_energy, square, 1), _shrunk(col_energy, square, 0)
    return VarianceProfile(rows / energy.sqrt(), cols / energy.sqrt(), row_groups, col_groups, interaction, drift)


def _groups(energy: Tensor, bins: int) -> Tensor:
    """Group of each side's entry by energy, of equal sizes."""
    places = energy.argsort(stable=True).argsort()
    return places * min(bins, len(energy)) // len(energy)


def _group_means(values: Tensor, groups: Tensor) -> Tensor:
    count = int(groups.max()) + 1
    return values.new_zeros(count).index_add_(0, groups, values) / torch.bincount(groups, minlength=count)


def _cell_means(matrix: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    sizes = [int(groups.max()) + 1 for groups in (rows, cols)]
    sums = matrix.new_zeros(sizes[0], matrix.shape[1]).index_add_(0, rows, matrix)
    sums = matrix.new_zeros(*sizes).index_add_(1, cols, sums)
    return sums / torch.outer(torch.bincount(rows), torch.bincount(cols))


def _shrunk(energy: Tensor, square: Tensor, axis: int) -> Tensor:
    """Energies of a side, drawn to their mean by what chance explains of their variance (James and Stein 1961)."""
    chance = float((square.var(axis, correction=0) / square.shape[axis]).mean())
    spread = float(energy.var(correction=0))
    kept = max(0.0, 1 - chance / spread) if spread > 0 else 0.0
    return energy.mean() + kept * (energy - energy.mean())


def _few_weights(matrix: Tensor, profile: VarianceProfile) -> float:
    """Share by which the fourth cumulant κ of sparse entries moves the edge: κ / (s² √(m n)) (Lee, Schnelli 2018)."""
    cells = profile.interaction[profile.row_groups][:, profile.col_groups]
    squared = float((torch.outer(profile.rows, profile.cols) * cells).square().mean())
    cumulant = float(matrix.pow(4).mean()) - 3 * squared
    sides = _effective_sides(profile)
    return max(0.0, cumulant) / squared / math.sqrt(sides[0] * sides[1]) if squared > 0 else 0.0


def _effective_sides(profile: VarianceProfile) -> tuple[float, float]:
    """Numbers of rows and columns that would share the energy evenly."""
    sums = profile.apply(torch.ones_like(profile.rows), torch.ones_like(profile.cols))
    m, n = (float(side.sum() ** 2 / side.square().sum()) for side in sums)
    return m, n


def _fluctuation(profile: VarianceProfile) -> float:
    """Scale of the largest eigenvalue's fluctuation over the edge."""
    m, n = _effective_sides(profile)
    return (1 / math.sqrt(m) + 1 / math.sqrt(n)) ** (1 / 3) / (math.sqrt(m) + math.sqrt(n))


def _unexplained(found: Tensor, outliers: Tensor) -> Tensor:
    """What is found without the nearest of each outlier."""
    left = found.tolist()
    for outlier in outliers.tolist():
        if left:
            left.remove(min(left, key=lambda value: abs(value - outlier)))
    return torch.tensor(left, dtype=found.dtype)
