"""From an order of rows and columns to cell means, without a second copy of the mask."""

import torch
from torch import Tensor

from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph


def rounded_keys(keys: Tensor) -> Tensor:
    """Keys in [-1, 1], relative to the largest, without their last digits."""
    # Sums of the same weights in another order differ by rounding and must still be ties.
    keys = keys.to(torch.float64)
    scale = keys.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.round(keys / scale, decimals=11)


def bin_sizes(count: int, bins: int, device: torch.device) -> Tensor:
    """Sizes of `bins` bins for `count` items, as equal as can be, the larger ones first (float64)."""
    out = torch.full((bins,), float(count // bins), dtype=torch.float64, device=device)
    out[: count % bins] += 1
    return out


def average_ties(keys: Tensor, bins: int) -> Tensor:
    """Membership [n, bins] of items sorted by descending key, items of equal key sharing their places.

    A group of equal keys covers a range of places; every item of the group lies in each bin with the share
    of the range that the bin covers. Cell means with this membership are the expectation over all orders of
    the tied items, so they do not depend on the given order.
    """
    n = len(keys)
    _, group = torch.unique(-rounded_keys(keys), return_inverse=True)
    count = torch.bincount(group).to(torch.float64)
    last = count.cumsum(0)
    first = last - count
    ends = bin_sizes(n, bins, keys.device).cumsum(0)
    starts = ends - bin_sizes(n, bins, keys.device)
    # Length of the overlap of each group's range of places with each bin's.
    covered = torch.minimum(last[:, None], ends) - torch.maximum(first[:, None], starts)
    return (covered.clamp_min(0) / count[:, None])[group]


def index_ties(keys: Tensor, bins: int) -> Tensor:
    """Membership [n, bins] of items sorted by descending key, ties in the given order."""
    order = rounded_keys(keys).argsort(descending=True, stable=True)
    label = torch.empty_like(order)
    counts = bin_sizes(len(keys), bins, keys.device).long()
    label[order] = torch.arange(bins, device=keys.device).repeat_interleave(counts)
    return one_hot(label, bins)


def one_hot(label: Tensor, bins: int = -1) -> Tensor:
    """Membership [n, bins] of items in the bin of their label, float64; as many bins as there are labels by default."""
    return torch.nn.functional.one_hot(label, bins).to(torch.float64)


def cell_means(graph: ChannelGraph, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """Mean of the graph's entries in each cell, float64.

    Args:
        graph: The channel graph, [out, in].
        rows: Membership [out, row bins], or None where every row is its own bin.
        cols: Membership [in, col bins], or None where every column is its own bin.
    """
    sums = []
    total: Tensor | None = None
    for span, part in graph.chunks():
        # Columns first: the product of a chunk of rows with them is small, whatever the number of inputs.
        block = part if cols is None else part @ cols
        if rows is None:
            sums.append(block)
        else:
            block = rows[span].T @ block
            total = block if total is None else total.add_(block)
    table = torch.cat(sums) if total is None else total
    if rows is not None:
        table = table / sizes(rows)[:, None]
    return table if cols is None else table / sizes(cols)


def sizes(membership: Tensor) -> Tensor:
    """Number of items in each bin; whole numbers, though single items may be shared between bins."""
    return membership.sum(0).round()


def effective_count(membership: Tensor | None, n: int, device: torch.device) -> Tensor:
    """Kish's effective number of items in each bin, (Σ a)² / Σ a² of the memberships a; 1 without membership."""
    if membership is None:
        return torch.ones(n, dtype=torch.float64, device=device)
    return sizes(membership) ** 2 / (membership**2).sum(0)


def measure(membership: Tensor | None, n: int, device: torch.device) -> Tensor:
    """Share of the items in each bin, float64."""
    if membership is None:
        return torch.full((n,), 1 / n, dtype=torch.float64, device=device)
    return sizes(membership) / n
