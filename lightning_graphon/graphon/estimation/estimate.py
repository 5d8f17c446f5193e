"""Estimate the graphon of one mask by sorting and averaging."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from lightning_graphon._shared.checks import check_choice, checked, plain
from lightning_graphon._shared.choices import LayerOrder, Order, Ties
from lightning_graphon.graphon.core.step_graphon import StepGraphon
from lightning_graphon.graphon.estimation.binning import (
    average_ties,
    cell_means,
    effective_count,
    index_ties,
    measure,
    one_hot,
)
from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.spectral_order import spectral_parts
from lightning_graphon.graphon.estimation.total_variation import total_variation


@checked
def estimate_graphon(
    mask: Tensor,
    bins: int | Sequence[int] = 64,
    order: Order = "degree",
    *,
    ties: Ties = "average",
    smoothing: float = 0.0,
    groups: int = 1,
) -> StepGraphon:
    """Step graphon of one mask: sort rows and columns by degree, cut into bins, average the cells.

    This is the estimator of [P1] (Pham et al., NeurIPS 2025, arXiv:2510.17515, Section 4), the sort-and-smooth
    estimator of Chan and Airoldi (A Consistent Histogram Estimator for Exchangeable Graph Models, ICML 2014)
    for bipartite graphs: rows by in-degree, columns by out-degree, both descending. The mean of the estimate
    is the density of the mask, because bins that cannot be equal have unequal measures.

    Sorting by degree is consistent where the degree functions are strictly monotone; it mixes rows that differ in
    their neighbours but not in their degree. `order="spectral"` separates these: rows (and columns) are projected on
    the leading singular vectors of the mask and split in two as long as a part is wider than chance alone would make
    it (three standard deviations). There are then as many bins as the mask has evidence for, at most `bins`, of
    unequal measure; a homogeneous mask has one. This estimator is our own, in the spirit of spectral clustering
    (Rohe, Chatterjee and Yu 2011).

    Tied degrees: with `ties="average"` tied rows share their places. That is the mean of [P1]'s estimate over all
    orders of the tied rows (and columns), so it does not depend on the given order. `ties="index"` is [P1]'s own
    stable sort: it keeps the given order among equal degrees (the blocks of a grouped convolution stay visible), but
    another order of the same mask then gives another picture.

    Args:
        mask: [out, in], bool, or numbers in [0, 1]; or [out, in / groups, *taps] of a convolution, read as
            the graph between channels whose edge weight is the mean over the taps.
        bins: Number of intervals of each axis, or a pair (rows, columns); the largest number with "spectral". Never
            more than the side.
        order: "degree", "spectral", or "none" to keep the given order of rows and columns.
        ties: "average" or "index", see above; used with `order="degree"`.
        smoothing: Weight of total-variation denoising of the cells (the second step of Chan and Airoldi), in
            units of the typical standard error of a cell; 1 is a good start, 0 (as in [P1]) is off. The mean is kept.
        groups: Number of groups of the convolution; entries between groups are 0.

    Returns:
        Values, measures, `std_error` and `sparse_cells` in float64, on the mask's device (for MPS on the CPU). The
        standard error of a cell is that of n independent draws, without the error of the sort; `sparse_cells` marks
        cells where density × n < 5. Both describe the cells before smoothing.

    Raises:
        ValueError: Unknown `order` or `ties`, `bins` below 1, negative smoothing, a mask with fewer than two
            axes, an empty axis or entries outside [0, 1].

    Example:
        >>> import torch
        >>> mask = torch.tensor([[0, 0, 1], [1, 1, 1]], dtype=torch.bool)
        >>> estimate_graphon(mask).values
        tensor([[1., 1., 1.],
                [1., 0., 0.]], dtype=torch.float64)
    """
    check_choice("order", order, get_args(Order))
    check_choice("ties", ties, get_args(Ties))
    if not 0 <= smoothing < float("inf"):
        raise ValueError(f"smoothing must be a finite number >= 0, got {smoothing!r}")
    graph = ChannelGraph(mask, groups=groups)
    rows, cols = memberships(graph, bins, order, ties)
    return from_memberships(graph, rows, cols, smoothing=smoothing)


def memberships(graph: ChannelGraph, bins: int | Sequence[int], order: LayerOrder, ties: Ties) -> tuple[Tensor, Tensor]:
    """Membership of rows [out, row bins] and of columns [in, col bins] for one mask sorted for itself."""
    n_row, n_col = _bins(bins, graph.shape)
    if order == "spectral":
        row_parts, col_parts = spectral_parts(graph, (n_row, n_col))
        return one_hot(row_parts), one_hot(col_parts)
    row_keys, col_keys = graph.degrees()
    if order == "none":  # all are equal, and ties keep the given order
        row_keys, col_keys = torch.zeros_like(row_keys), torch.zeros_like(col_keys)
    elif ties == "average":
        return average_ties(row_keys, n_row), average_ties(col_keys, n_col)
    return index_ties(row_keys, n_row), index_ties(col_keys, n_col)


def from_memberships(
    graph: ChannelGraph,
    rows: Tensor | None,
    cols: Tensor | None,
    *,
    energy: Tensor | None = None,
    drift: Tensor | None = None,
    smoothing: float = 0.0,
) -> StepGraphon:
    """Step graphon of a channel graph whose rows and columns lie in the given bins."""
    values = cell_means(graph, rows, cols).clamp(0, 1)
    row_measure = measure(rows, graph.shape[0], graph.device)
    col_measure = measure(cols, graph.shape[1], graph.device)
    row_count = effective_count(rows, graph.shape[0], graph.device)
    entries = row_count[:, None] * effective_count(cols, graph.shape[1], graph.device)
    # Agresti and Coull's interval: two successes and two failures more, so that a cell without edges is not certain.
    p = (entries * values + 2) / (entries + 4)
    std_error = (p * (1 - p) / (entries + 4)).sqrt()
    density = row_measure @ values @ col_measure
    if smoothing > 0:
        # The noise is the unit of the denoising weight, so one setting serves any size and density.
        weight = smoothing * float((std_error**2).mean().sqrt())
        values = total_variation(values, row_measure, col_measure, weight)
    return StepGraphon(
        values,
        row_measure,
        col_measure,
        energy=energy,
        drift=drift,
        std_error=std_error,
        sparse_cells=density * entries < 5,
    )


def _bins(bins: int | Sequence[int], shape: tuple[int, int]) -> tuple[int, int]:
    bins = plain(bins)
    pair = (bins, bins) if isinstance(bins, int) else tuple(bins)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"bins must be at least 1, one number or a pair (rows, columns), got {bins!r}")
    return min(pair[0], shape[0]), min(pair[1], shape[1])
