"""Split the rows and the columns of one mask into parts that its singular vectors tell apart.

Nodes of equal degree may have different neighbours. Then their rows of the mask differ, and so do the projections of
these rows on the mask's leading right singular vectors. There the rows are split in two, again and again, as long as a
part is wider than chance alone would make it.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.singular_vectors import leading_singular_vectors, matmul, matmul_transposed

_RANK, _MAX_LLOYD_STEPS = 24, 20
_MIN_DISPERSION = 1e-6  # of entries without any scatter


def spectral_parts(graph: ChannelGraph, bins: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Part of every row [out] and of every column [in], int64, numbered from 0; at most `bins` of each.

    Rows that are equal, or that only chance tells apart, are in one part. Neighbouring numbers are parts that were
    separated late; of two halves the one with more edges comes first.
    """
    noise = _Noise.from_graph(graph)
    u, s, v = leading_singular_vectors(graph, rank=_RANK, floor=noise.edge)
    u, v = u[:, s > noise.edge], v[:, s > noise.edge]
    if u.shape[1] == 0:  # all vectors are noise: only the number of edges is left
        u, v = (x.new_full((len(x), 1), len(x) ** -0.5) for x in (u, v))
    rows, cols = matmul(graph, v), matmul_transposed(graph, u)
    return _split_all(rows, v, noise.dispersion, bins[0]), _split_all(cols, u, noise.dispersion, bins[1])


@dataclass(frozen=True)
class _Noise:
    """Upper bounds of the noise in a graph's entries, drawn with their probabilities.

    Attributes:
        edge: Largest singular value of the noise.
        dispersion: Variance of entries relative to that of Bernoulli draws: below 1 where they are means over taps.
    """

    edge: float
    dispersion: float

    @classmethod
    def from_graph(cls, graph: ChannelGraph) -> "_Noise":
        """From the variances inside rows and columns, to which structure can only add."""
        (m, n), (rows, cols), (row_squares, col_squares) = graph.shape, graph.degrees(), graph.sums(2)
        variances = (row_squares - rows**2 / n).clamp_min(0), (col_squares - cols**2 / m).clamp_min(0)
        # The largest standard deviations of a row sum and of a column sum, added (Bandeira and van Handel, Annals of
        # Probability 2016), and a margin of three times the scale of the Tracy-Widom law.
        largest = sum(float(v.max().sqrt()) for v in variances)
        scale = largest / (m**0.5 + n**0.5)
        bernoulli = float((rows * (1 - rows / n)).sum())
        return cls(
            largest + 1.5 * scale * (m**-0.5 + n**-0.5) ** (1 / 3),
            max(float(variances[0].sum()) / bernoulli, _MIN_DISPERSION) if bernoulli > 0 else 1.0,
        )


@dataclass(frozen=True)
class _Split:
    """The two halves of a part, and by how much it was wider than chance, times its size."""

    excess: float
    halves: tuple[Tensor, Tensor]


def _split_all(points: Tensor, directions: Tensor, dispersion: float, bins: int) -> Tensor:
    """Labels [n] of rows at `points` [n, r] along `directions` [m, r]; the widest part is split first."""
    min_size = max(1, len(points) // (4 * bins))
    parts = [torch.arange(len(points), device=points.device)]
    split = partial(_split, points, directions, dispersion, min_size)
    splits = [split(parts[0])]
    while len(parts) < bins:
        widest = max(range(len(splits)), key=lambda i: 0.0 if (s := splits[i]) is None else s.excess)
        if (chosen := splits[widest]) is None:
            break
        parts[widest : widest + 1] = chosen.halves
        splits[widest : widest + 1] = [split(half) for half in chosen.halves]
    label = torch.empty(len(points), dtype=torch.long, device=points.device)
    for number, members in enumerate(parts):
        label[members] = number
    return label


def _split(points: Tensor, directions: Tensor, dispersion: float, min_size: int, members: Tensor) -> _Split | None:
    """The part in two along its widest direction in units of chance, or None if it is no wider than that."""
    size, rank = len(members), points.shape[1]
    if size < 2 * min_size or size < 2:
        return None
    centre = points[members].mean(0)
    # In whitened coordinates [r, size] chance has the variance 1 in every direction.
    factor = dispersion**0.5 * _null_factor(centre, directions, size)
    white = torch.linalg.solve_triangular(factor, (points[members] - centre).T, upper=False)
    widths, axes = torch.linalg.eigh(white @ white.T / size)
    # Largest eigenvalue of a Gaussian cloud (Marchenko and Pastur), with three standard deviations of a variance.
    by_chance = (1 + (rank / size) ** 0.5) ** 2 * (1 + 3 * (2 / size) ** 0.5)
    if float(widths[-1]) <= by_chance:
        return None
    if (first := _lower_half(axes[:, -1] @ white, min_size)) is None:
        return None
    first = _lloyd(white, first, min_size)
    halves = members[first], members[~first]
    edges = [float((points[half] @ directions.sum(0)).mean()) for half in halves]
    return _Split(size * (float(widths[-1]) - 1), halves if edges[0] >= edges[1] else halves[::-1])


def _null_factor(centre: Tensor, directions: Tensor, size: int) -> Tensor:
    """Cholesky factor [r, r] of the covariance of coordinates if all rows of a part had the same probabilities."""
    # Their mean, read from its coordinates, with one edge and one gap added, so that nothing is certain.
    mean = (directions @ centre).clamp(0, 1)
    mean = (size * mean + 1) / (size + 2)
    return torch.linalg.cholesky((directions.T * (mean * (1 - mean))) @ directions)


def _lower_half(values: Tensor, min_size: int) -> Tensor | None:
    """Which of the values [n] are in the lower half, split so that the variance inside is least; None if all agree."""
    values = torch.round(values, decimals=9)
    ordered = values.sort().values
    count = len(values)
    left = torch.arange(1, count, device=values.device, dtype=values.dtype)
    sums = ordered.cumsum(0)
    # Least variance inside the halves is largest variance between them.
    between = sums[:-1] ** 2 / left + (sums[-1] - sums[:-1]) ** 2 / (count - left)
    allowed = (ordered.diff() > 0) & (left >= min_size) & (count - left >= min_size)
    if not bool(allowed.any()):
        return None
    best = int(between.where(allowed, between.new_tensor(-1.0)).argmax())
    return values <= ordered[best]


def _lloyd(white: Tensor, first: Tensor, min_size: int) -> Tensor:
    """Improve the half `first` [n] of points [r, n] by Lloyd's algorithm: each point goes to the nearer mean."""
    # A straight cut across the widest direction can divide a cluster that another direction would keep together.
    for _ in range(_MAX_LLOYD_STEPS):
        means = white[:, first].mean(1), white[:, ~first].mean(1)
        middle, across = (means[0] + means[1]) / 2, means[0] - means[1]
        moved = torch.round(across @ (white - middle[:, None]), decimals=9) > 0  # equal rows stay together
        if torch.equal(moved, first) or not min_size <= int(moved.sum()) <= len(moved) - min_size:
            break
        first = moved
    return first
