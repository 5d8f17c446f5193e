"""One position for every neuron of a layer, shared by the mask it ends in and the mask it leaves from.

Every rule maps two profiles of the neurons to a bin label. Neurons that the rule cannot tell apart share a
bin, so the labels do not depend on the order of the neurons, and bins may be fewer than asked and unequal.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_graphon.graphon.estimation.binning import quantised
from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.singular_vectors import leading_exact, times, times_transposed


def quantile_labels(keys: Tensor, bins: int, within: Tensor | None = None) -> Tensor:
    """Label [n] of each item's quantile by descending key; equal keys share the bin of their middle place.

    Args:
        keys: [n].
        bins: Number of quantiles.
        within: Group [n] of each item, 0..k-1; quantiles are taken inside each group.

    >>> import torch
    >>> quantile_labels(torch.tensor([1.0, 9.0, 1.0, 5.0]), 2)
    tensor([1, 0, 1, 0])
    """
    group = torch.zeros(len(keys), dtype=torch.long, device=keys.device) if within is None else within
    # Keys lie in [-1, 1], so those of one group come before those of the next.
    _, tied, count = torch.unique(4.0 * group - quantised(keys), return_inverse=True, return_counts=True)
    size = torch.bincount(group)
    first = size.cumsum(0) - size
    middle = (count.cumsum(0) - count / 2)[tied] - first[group]
    return (middle * bins / size[group]).floor().long().clamp_max(bins - 1)


def nested_quantile_labels(first: Tensor, second: Tensor, bins: int) -> Tensor:
    """Label [n] by quantiles of `first`, then of `second` inside each of them; labels are 0..k-1, k <= bins.

    About as many quantiles of one as of the other: 64 bins are 8 times 8, 32 are 5 times 6.
    """
    outer = quantile_labels(first, max(1, int(bins**0.5))).unique(return_inverse=True)[1]
    inner = max(1, bins // (int(outer.max()) + 1))
    return (outer * inner + quantile_labels(second, inner, outer)).unique(return_inverse=True)[1]


def spectral_labels(incoming: ChannelGraph, outgoing: ChannelGraph, owner: Tensor, bins: int) -> Tensor:
    """Label [n] by halving the neurons along leading singular vectors of their two graphs.

    A neuron's coordinates are its edges in the graph that ends in it along that graph's first singular vectors, and its
    edges in the graph that leaves from it along those of that one. Vectors whose value another one has too are left
    out: they could be any in a plane. The neurons are halved at the median of their widest coordinate, and each half
    again, while there are at most `bins` parts.

    Args:
        incoming: Graph [n, n_before].
        outgoing: Graph [n_after, m], m a multiple of n.
        owner: Neuron [m] of each column of `outgoing`.
        bins: Largest number of parts.
    """
    before = _along(lambda x: times(incoming, x), *leading_exact(incoming, rank=_RANK + 1)[1:])
    u, s, _ = leading_exact(outgoing, rank=_RANK + 1)
    after = _along(lambda x: added_up(times_transposed(outgoing, x), owner, len(before)), s, u)
    points = torch.cat([before, after.to(before)], 1)
    label = torch.zeros(len(points), dtype=torch.long, device=points.device)
    parts = 1
    while 2 * parts <= bins:
        halves = torch.zeros_like(label)
        for part in label.unique():
            here = label == part
            halves[here] = _half(points[here])
        label = 2 * label + halves
        parts *= 2
    return label.unique(return_inverse=True)[1]


def added_up(values: Tensor, owner: Tensor, neurons: int) -> Tensor:
    """Sums [neurons, ...] of the values [m, ...] that belong to one neuron each."""
    return values.new_zeros(neurons, *values.shape[1:]).index_add_(0, owner.to(values.device), values)


_RANK = 2
_TIE = 1e-6  # relative: singular values this close are equal


def _along(edges: Callable[[Tensor], Tensor], s: Tensor, vectors: Tensor) -> Tensor:
    """Neurons' edges [n, r] along those of the first vectors that are determined, of norm 1; their sums if none is."""
    apart = s > _TIE * s[0]
    far = s.diff().abs() > _TIE * s[0]
    apart[1:] &= far
    apart[:-1] &= far
    chosen = vectors[:, :_RANK][:, apart[:_RANK]]
    points = edges(chosen if chosen.shape[1] else torch.ones_like(vectors[:, :1]))
    points = points / points.norm().clamp_min(1e-300)
    skew = (points**3).sum(0)
    mirrored = skew.abs() <= _TIE * points.abs().pow(3).sum(0)  # its sign is chance: a symmetry exchanges both ends
    return torch.round(torch.where(mirrored, points.abs(), points * skew.sign()), decimals=9)


def _half(points: Tensor) -> Tensor:
    """0 or 1 by the median of the widest coordinate, the first of equally wide ones; equal points stay together."""
    widest = quantised(points.var(0, correction=0)).argmax()
    return quantile_labels(points[:, widest], 2)
