"""Parts of the rows and of the columns of one mask that its singular vectors tell apart.

Degrees say nothing of nodes that have as many neighbours, but others. Their rows of the mask differ, though, and so do
the projections of these rows on the mask's leading right singular vectors. There the rows are cut in two, and again,
as long as a part is wider than chance alone would make it.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.singular_vectors import leading, times, times_transposed

_RANK, _MOST_MOVES = 24, 20
_LEAST = 1e-6  # dispersion of entries that do not scatter at all


def spectral_parts(graph: ChannelGraph, bins: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Part of every row [out] and of every column [in], int64, numbered from 0; at most `bins` of each.

    Equal rows are in one part, and so are all rows where nothing but chance tells them apart. Neighbouring numbers are
    parts that were separated late; of two halves the one with more edges comes first.
    """
    noise = _Noise.from_graph(graph)
    u, s, v = leading(graph, rank=_RANK, floor=noise.edge)
    u, v = u[:, s > noise.edge], v[:, s > noise.edge]
    if u.shape[1] == 0:  # all vectors are noise: what is left is the number of edges
        u, v = (x.new_full((len(x), 1), len(x) ** -0.5) for x in (u, v))
    rows, cols = times(graph, v), times_transposed(graph, u)
    return _parts(rows, v, noise.dispersion, bins[0]), _parts(cols, u, noise.dispersion, bins[1])


@dataclass(frozen=True)
class _Noise:
    """What chance adds to the probabilities of a graph's entries, from above.

    Attributes:
        edge: Largest singular value.
        dispersion: Variance of entries, relative to that of draws of 0 or 1: less where they are means over taps.
    """

    edge: float
    dispersion: float

    @classmethod
    def from_graph(cls, graph: ChannelGraph) -> "_Noise":
        """From the variances inside rows and columns, which are those of sums of draws, and of structure on top.

        The edge is the largest standard deviations of a row sum and of a column sum, added (Bandeira and van Handel,
        Annals of Probability 2016), and a margin of three times the scale of the Tracy-Widom law.
        """
        (m, n), (rows, cols), (row_squares, col_squares) = graph.shape, graph.degrees(), _squares(graph)
        variances = (row_squares - rows**2 / n).clamp_min(0), (col_squares - cols**2 / m).clamp_min(0)
        largest = sum(float(v.max().sqrt()) for v in variances)
        scale = largest / (m**0.5 + n**0.5)
        of_draws = float((rows * (1 - rows / n)).sum())
        return cls(
            largest + 1.5 * scale * (m**-0.5 + n**-0.5) ** (1 / 3),
            max(float(variances[0].sum()) / of_draws, _LEAST) if of_draws > 0 else 1.0,
        )


def _squares(graph: ChannelGraph) -> tuple[Tensor, Tensor]:
    """Sums of squared entries of rows [out] and columns [in]."""
    rows, cols = [], torch.zeros(graph.shape[1], dtype=torch.float64, device=graph.device)
    for _, part in graph.chunks():
        squares = part.square()
        rows.append(squares.sum(1))
        cols += squares.sum(0)
    return torch.cat(rows), cols


@dataclass(frozen=True)
class _Cut:
    """A part of rows in two, and how much wider it was than chance, times its size."""

    excess: float
    halves: tuple[Tensor, Tensor]


def _parts(points: Tensor, directions: Tensor, dispersion: float, bins: int) -> Tensor:
    """Labels [n] of rows with the coordinates `points` [n, r] along `directions` [m, r], the widest part cut first."""
    smallest = max(1, len(points) // (4 * bins))
    leaves = [torch.arange(len(points), device=points.device)]
    cut_up = partial(_cut, points, directions, dispersion, smallest)
    cuts = [cut_up(leaves[0])]
    while len(leaves) < bins:
        widest = max(range(len(cuts)), key=lambda i: 0.0 if (cut := cuts[i]) is None else cut.excess)
        if (cut := cuts[widest]) is None:
            break
        leaves[widest : widest + 1] = cut.halves
        cuts[widest : widest + 1] = [cut_up(half) for half in cut.halves]
    label = torch.empty(len(points), dtype=torch.long, device=points.device)
    for number, members in enumerate(leaves):
        label[members] = number
    return label


def _cut(points: Tensor, directions: Tensor, dispersion: float, smallest: int, members: Tensor) -> _Cut | None:
    """The part in two along its widest direction in units of chance, or None if it is no wider than that."""
    size, rank = len(members), points.shape[1]
    if size < 2 * smallest or size < 2:
        return None
    centre = points[members].mean(0)
    chance = dispersion**0.5 * _chance(centre, directions, size)
    away = torch.linalg.solve_triangular(chance, (points[members] - centre).T, upper=False)
    widths, axes = torch.linalg.eigh(away @ away.T / size)
    # Of a Gaussian cloud of `size` points in `rank` directions; three standard deviations of a variance on top.
    by_chance = (1 + (rank / size) ** 0.5) ** 2 * (1 + 3 * (2 / size) ** 0.5)
    if float(widths[-1]) <= by_chance:
        return None
    first = _lower(axes[:, -1] @ away, smallest)
    if first is None:
        return None
    first = _nearer(away, first, smallest)
    halves = members[first], members[~first]
    edges = [float((points[half] @ directions.sum(0)).mean()) for half in halves]
    return _Cut(size * (float(widths[-1]) - 1), halves if edges[0] >= edges[1] else halves[::-1])


def _chance(centre: Tensor, directions: Tensor, size: int) -> Tensor:
    """Cholesky factor [r, r] of the covariance of coordinates if all rows of a part had the same probabilities.

    These are their mean, read from its coordinates, with one edge and one gap added, so that nothing is certain.
    """
    mean = (directions @ centre).clamp(0, 1)
    mean = (size * mean + 1) / (size + 2)
    return torch.linalg.cholesky((directions.T * (mean * (1 - mean))) @ directions)


def _lower(places: Tensor, smallest: int) -> Tensor | None:
    """Which points [n] are in the lower of the two halves with the least variance inside them; None: all are equal."""
    places = torch.round(places, decimals=9)
    ordered = places.sort().values
    count = len(places)
    left = torch.arange(1, count, device=places.device, dtype=places.dtype)
    sums = ordered.cumsum(0)
    between = sums[:-1] ** 2 / left + (sums[-1] - sums[:-1]) ** 2 / (count - left)
    allowed = (ordered.diff() > 0) & (left >= smallest) & (count - left >= smallest)
    if not bool(allowed.any()):
        return None
    best = int(between.where(allowed, between.new_tensor(-1.0)).argmax())
    return places <= ordered[best]


def _nearer(away: Tensor, first: Tensor, smallest: int) -> Tensor:
    """The half [n] of points [r, n] after each went to the nearer of the two means, again and again (Lloyd).

    A straight cut across the widest direction can go through a cluster that another direction would leave whole.
    """
    for _ in range(_MOST_MOVES):
        means = away[:, first].mean(1), away[:, ~first].mean(1)
        middle, across = (means[0] + means[1]) / 2, means[0] - means[1]
        moved = torch.round(across @ (away - middle[:, None]), decimals=9) > 0  # equal rows stay together
        if torch.equal(moved, first) or not smallest <= int(moved.sum()) <= len(moved) - smallest:
            break
        first = moved
    return first
