"""One position for every neuron of a layer, shared by its incoming and its outgoing mask.

Neurons that a rule cannot tell apart share a bin. So labels do not depend on the order of the neurons, and there may
be fewer bins than asked for, of unequal size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_graphon.graphon.estimation.binning import rounded_keys
from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.singular_vectors import exact_singular_vectors, matmul, matmul_transposed


def quantile_labels(keys: Tensor, bins: int, within: Tensor | None = None) -> Tensor:
    """Label [n] of each item's quantile by descending key, inside each group `within` [n]; equal keys share a bin.

    >>> import torch
    >>> quantile_labels(torch.tensor([1.0, 9.0, 1.0, 5.0]), 2)
    tensor([1, 0, 1, 0])
    """
    group = torch.zeros(len(keys), dtype=torch.long, device=keys.device) if within is None else within
    # Keys lie in [-1, 1], so with steps of 4 the groups do not overlap, and one sort serves them all.
    _, tied, count = torch.unique(4.0 * group - rounded_keys(keys), return_inverse=True, return_counts=True)
    size = torch.bincount(group)
    first = size.cumsum(0) - size
    middle = (count.cumsum(0) - count / 2)[tied] - first[group]
    return (middle * bins / size[group]).floor().long().clamp_max(bins - 1)


def nested_quantile_labels(first: Tensor, second: Tensor, bins: int) -> Tensor:
    """Label [n] by quantiles of `first`, then of `second` inside each of them; labels are 0..k-1, k <= bins.

    About as many quantiles of the one as of the other: 64 bins are 8 times 8, 32 are 5 times 6.
    """
    outer = quantile_labels(first, max(1, int(bins**0.5))).unique(return_inverse=True)[1]
    inner = max(1, bins // (int(outer.max()) + 1))
    return (outer * inner + quantile_labels(second, inner, outer)).unique(return_inverse=True)[1]


def spectral_labels(incoming: ChannelGraph, outgoing: ChannelGraph, column_neuron: Tensor, bins: int) -> Tensor:
    """Label [n] by halving the neurons along leading singular vectors of their two graphs.

    A neuron's coordinates are the projections of its edges, in the incoming and in the outgoing graph, on the leading
    singular vectors of each. The neurons are split at the median of their widest coordinate, and so is each part, while
    there are at most `bins` parts.

    Args:
        incoming: Graph [n, n_before].
        outgoing: Graph [n_after, m], m a multiple of n.
        column_neuron: Neuron [m] of each column of `outgoing`.
        bins: Largest number of parts.
    """
    values, vectors = exact_singular_vectors(incoming, rank=_RANK + 1)[1:]
    before = _coordinates(lambda x: matmul(incoming, x), values, vectors)
    vectors, values, _ = exact_singular_vectors(outgoing, rank=_RANK + 1)
    after = _coordinates(
        lambda x: sum_by_neuron(matmul_transposed(outgoing, x), column_neuron, len(before)), values, vectors
    )
    points = torch.cat([before, after.to(before)], 1)
    label = torch.zeros(len(points), dtype=torch.long, device=points.device)
    parts = 1
    while 2 * parts <= bins:
        halves = torch.zeros_like(label)
        for part in label.unique():
            members = label == part
            # By the median of the widest coordinate, the first of equally wide ones; equal points stay together.
            widest = rounded_keys(points[members].var(0, correction=0)).argmax()
            halves[members] = quantile_labels(points[members, widest], 2)
        label = 2 * label + halves
        parts *= 2
    return label.unique(return_inverse=True)[1]


def sum_by_neuron(values: Tensor, neuron: Tensor, count: int) -> Tensor:
    """Sums [count, ...] of the values [m, ...] that belong to each neuron."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, neuron.to(values.device), values)


_RANK = 2
_TIE = 1e-6  # relative: singular values this close are equal


def _coordinates(project: Callable[[Tensor], Tensor], values: Tensor, vectors: Tensor) -> Tensor:
    """Neurons' coordinates [n, r] along the leading vectors that are unique, of norm 1; along ones if none is."""
    # Vectors of equal singular values could be any orthonormal basis of their span, so they are left out.
    unique = values > _TIE * values[0]
    gap = values.diff().abs() > _TIE * values[0]
    unique[1:] &= gap
    unique[:-1] &= gap
    chosen = vectors[:, :_RANK][:, unique[:_RANK]]
    points = project(chosen if chosen.shape[1] else torch.ones_like(vectors[:, :1]))
    points = points / points.norm().clamp_min(1e-300)
    # A singular vector's sign is arbitrary: it is fixed by the skewness, or dropped where a symmetry makes that zero.
    skew = (points**3).sum(0)
    symmetric = skew.abs() <= _TIE * points.abs().pow(3).sum(0)
    return torch.round(torch.where(symmetric, points.abs(), points * skew.sign()), decimals=9)
