"""Which coordinates of the input a network reads, and which of them tell the classes apart."""

from collections.abc import Sequence
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon._shared.choices import Relevance
from lightning_graphon.graphon.core.partition import same_partition
from lightning_graphon.graphon.core.step_graphon import StepGraphon
from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.singular_vectors import matmul_transposed


@checked
def input_path_density(layers: Sequence[StepGraphon | Tensor]) -> Tensor:
    """Share of all possible paths from each input coordinate to the outputs that a network has.

    This is W₁* ⋯ W_{L+1}* 1 with the adjoint operators; its mean over the inputs is `path_density`.

    Args:
        layers: StepGraphons (consecutive ones on one partition of the neurons, as `layer_graphons` with
            order="joint" makes them) or 0/1 masks [out, in], input side first. A mask with taps enters with
            the mean over its taps.

    Returns:
        Float64 [cols of the first layer], in [0, 1].

    Raises:
        ValueError: No layer, graphons mixed with masks, or sides that do not fit.

    >>> input_path_density([torch.tensor([[1, 0], [1, 1]]), torch.tensor([[1, 0]])])
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    if not layers:
        raise ValueError("input_path_density needs at least one layer")
    chain: list[StepGraphon | Tensor] = list(layers)
    _check_chain(chain)
    share = torch.ones(chain[-1].shape[0], dtype=torch.float64, device=chain[-1].device)
    for layer in reversed(chain):
        # The mean over a layer's outputs of `share` along its edges.
        if isinstance(layer, StepGraphon):
            share = layer.to(dtype=torch.float64).apply_adjoint(share)
        else:
            share = matmul_transposed(ChannelGraph(layer), share[:, None])[:, 0] / layer.shape[0]
    return share


def _check_chain(layers: Sequence[StepGraphon | Tensor]) -> None:
    """One kind of layer, and every layer's inputs are the outputs of the one before."""
    if len({isinstance(layer, StepGraphon) for layer in layers}) > 1:
        raise ValueError("layers must be all graphons or all masks, not a mixture")
    for index, (before, after) in enumerate(pairwise(layers)):
        fits = before.shape[0] == after.shape[1]
        if fits and isinstance(before, StepGraphon) and isinstance(after, StepGraphon):
            fits = same_partition(before.row_measure, after.col_measure)
        if not fits:
            raise ValueError(
                f"the outputs of layer {index} ({before.shape[0]}) are not the inputs of layer {index + 1} "
                f"({after.shape[1]}); masks must be a chain in network order, graphons must share positions: "
                "layer_graphons(masks, order='joint')"
            )


@checked
def coordinate_relevance(x: Tensor, labels: Tensor, kind: Relevance = "mean_difference") -> Tensor:
    """How much each input coordinate alone tells about the class.

    Args:
        x: Samples [N, ...], flattened to [N, d].
        labels: Class numbers [N].
        kind: "mean_difference" is the standard deviation of the class means, weighted by class: for two equally
            frequent classes half of the absolute difference of their means, in the units of the input.
            "correlation_ratio" is Fisher's η², the share of the coordinate's variance that lies between the
            classes, in [0, 1]; 0 for a constant coordinate. A network's kernel depends on the scale of an input, so
            compare path densities with the first.

    Returns:
        Float64 [d], not negative, finite.

    Raises:
        ValueError: An unknown kind, labels that are not [N] whole numbers, or a single class.

    >>> coordinate_relevance(torch.tensor([[0.0, 3.0], [1.0, 3.0]]), torch.tensor([0, 1]))
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    check_choice("kind", kind, get_args(Relevance))
    if labels.shape != x.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be class numbers [{len(x)}], got {tuple(labels.shape)} of {labels.dtype}")
    centred = x.detach().flatten(1).to(torch.float64)
    centred = centred - centred.mean(0)
    classes, index, count = labels.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError("relevance needs at least two classes among the labels, got one")
    sums = centred.new_zeros(len(classes), centred.shape[1]).index_add(0, index, centred)
    between = (sums.square() / count[:, None]).sum(0) / len(x)
    if kind == "mean_difference":
        return between.sqrt()
    total = centred.square().mean(0)
    return torch.where(total > 0, between / torch.where(total > 0, total, 1.0), 0.0)
