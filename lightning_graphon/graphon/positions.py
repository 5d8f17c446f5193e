"""One position for every neuron of a layer, shared by the mask it ends in and the mask it leaves from.

Every rule maps two profiles of the neurons to a bin label. Neurons that the rule cannot tell apart share a
bin, so the labels do not depend on the order of the neurons, and bins may be fewer than asked and unequal.
"""

import torch
from torch import Tensor

from lightning_graphon.graphon._binning import quantised
from lightning_graphon.graphon._channels import ChannelGraph
from lightning_graphon.graphon._singular import leading, leading_of, times, times_transposed

POSITIONS = ("degree", "energy", "spectral")


def quantile_labels(keys: Tensor, bins: int, within: Tensor | None = None) -> Tensor:
    """Label [n] of each item's quantile by descending key; equal keys share the bin of their middle place.

    Args:
        keys: [n].
        bins: number of quantiles.
        within: group [n] of each item, 0..k-1; quantiles are taken inside each group.

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

    A neuron's coordinates are its entries in the first left singular vectors of the graph that ends in it
    and in the first right singular vectors of the graph that leaves from it, each scaled by its singular
    value. The set is halved at the median of its widest coordinate, and again, while there are at most
    `bins` parts.

    Args:
        incoming: graph [n, n_before].
        outgoing: graph [n_after, m], m a multiple of n.
        owner: neuron [m] of each column of `outgoing`.
        bins: largest number of parts.
    """
    left = _leading_left(incoming)
    right = _leading_left_transposed(outgoing, owner, incoming.shape[0])
    coordinates = torch.cat([left, right.to(left)], 1)
    label = torch.zeros(len(coordinates), dtype=torch.long, device=coordinates.device)
    parts = 1
    while 2 * parts <= bins:
        halves = torch.zeros_like(label)
        for part in range(parts):
            here = label == part
            if bool(here.any()):
                halves[here] = _half(coordinates[here])
        label = 2 * label + halves
        parts *= 2
    return label.unique(return_inverse=True)[1]


def _half(points: Tensor) -> Tensor:
    """0 or 1 by the median of the coordinate with the largest spread; equal points stay together."""
    widest = points.var(0, correction=0).argmax()
    return quantile_labels(points[:, widest], 2)


_RANK = 2


def _leading_left(graph: ChannelGraph) -> Tensor:
    """First left singular vectors [out, rank], each times its share of the singular values."""
    return _scaled(*leading_of(graph, rank=_RANK))


def _leading_left_transposed(graph: ChannelGraph, owner: Tensor, neurons: int) -> Tensor:
    """The same for the transposed graph, columns of one neuron added up."""

    def forward(x: Tensor) -> Tensor:
        out = x.new_zeros(neurons, x.shape[1])
        return out.index_add_(0, owner, times_transposed(graph, x))

    shape = neurons, graph.shape[0]
    return _scaled(*leading(forward, lambda y: times(graph, y[owner]), shape, graph.device, rank=_RANK))


def _scaled(u: Tensor, s: Tensor, _: Tensor) -> Tensor:
    keep = u * (s / s.norm().clamp_min(1e-300))
    sign = torch.where((keep**3).sum(0) < 0, -1.0, 1.0).to(keep)
    return torch.round(keep * sign, decimals=9)
