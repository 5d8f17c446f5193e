"""Partitions of [0, 1] into intervals: the axes of a step graphon.

A partition is a vector of interval lengths ("measure") that sums to one. Edges are float64 whatever the dtype of the
graphon, so that equal partitions stay equal.
"""

import torch
from torch import Tensor


def tolerance(*measures: Tensor) -> float:
    """Distance below which two edges count as one: cumulative sums of the same lengths differ by rounding."""
    return 1e-9 if all(m.dtype == torch.float64 for m in measures) else 1e-6


def edges(measure: Tensor) -> Tensor:
    """Edges [k + 1] of the intervals, from exactly 0 to exactly 1, float64."""
    ends = measure.detach().to(torch.float64).cumsum(0)
    out = torch.cat([ends.new_zeros(1), ends])
    out[-1] = 1.0  # the sum of the lengths is 1 only up to rounding
    return out


def same_partition(a: Tensor, b: Tensor) -> bool:
    """Whether two measures describe the same partition, up to `tolerance`."""
    return a.shape == b.shape and bool((edges(a) - edges(b).to(a.device)).abs().max() <= tolerance(a, b))


def locate(points: Tensor, measure: Tensor) -> Tensor:
    """Index of the interval that holds each point; intervals are closed on the left, 1 is in the last one."""
    inner = edges(measure)[1:-1]
    return torch.searchsorted(inner, points.to(inner).contiguous(), right=True)


def refine(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coarsest partition that refines both `a` and `b`.

    Returns:
        Its measure [k] (float64) and, for each of its intervals, the index of the interval of `a` and of `b`.
    """
    if same_partition(a, b):
        index = torch.arange(len(a), device=a.device)
        return a.detach().to(torch.float64), index, index
    cuts = torch.cat([edges(a), edges(b).to(a.device)]).sort().values
    keep = torch.cat([cuts.new_ones(1, dtype=torch.bool), cuts.diff() > tolerance(a, b)])
    cuts = cuts[keep]
    cuts[-1] = 1.0
    # Midpoints are far from every edge, so rounding cannot put them into the wrong interval.
    middle = (cuts[1:] + cuts[:-1]) / 2
    return cuts.diff(), locate(middle, a), locate(middle, b.to(a.device))


def overlap(new: Tensor, old: Tensor) -> Tensor:
    """Share [new, old] of each new interval that lies in each old one; rows sum to one, float64."""
    new_edges, old_edges = edges(new), edges(old).to(new.device)
    low = torch.maximum(new_edges[:-1, None], old_edges[None, :-1])
    high = torch.minimum(new_edges[1:, None], old_edges[None, 1:])
    share = (high - low).clamp_min(0)
    return share / share.sum(1, keepdim=True)
