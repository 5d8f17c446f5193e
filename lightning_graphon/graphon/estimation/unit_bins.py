"""One position for every unit of a traced network: residual streams in one order for all their blocks."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_graphon._shared.checks import nearest
from lightning_graphon._shared.choices import Positions
from lightning_graphon.graphon.estimation.binning import one_hot
from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.joint_positions import nested_quantile_labels, spectral_labels
from lightning_graphon.tracing import Trace
from lightning_graphon.tracing.axes import exchangeable_groups, same_units
from lightning_graphon.tracing.steps import Affine

UnitPositions: TypeAlias = Literal[Positions, "drift"]
_POWERS = {"degree": 0, "drift": 1, "energy": 2, "spectral": 2}  # of the weights that are summed


def unit_bins(trace: Trace, masks: Mapping[str, Tensor], bins: int, positions: UnitPositions) -> Tensor:
    """Bin [units] of every unit id of a traced network.

    Units of one residual stream are in one bin in all its blocks. Quantiles are those of `layer_graphons` with
    `order="joint"`, where sums run over all that writes into a unit and all that reads it.

    Args:
        trace: The network's steps.
        masks: Mask of each layer by the name of its weight; dense where there is none.
        bins: Largest number of bins of units that lie in the same steps.
        positions: "degree", "energy" or "spectral"; or "drift" for the sums of w·M, whose signs tell units apart that
            push signals up from those that push them down.
    """
    classes = same_units(trace)
    written, read = _degrees(trace, masks, classes, positions)
    group = exchangeable_groups(trace, classes)
    label, start = torch.empty_like(group), 0
    for number in group.unique().tolist():
        members = (group == number).nonzero()[:, 0]
        own = number < 0
        if own:
            part = torch.arange(len(members))
        elif positions == "spectral":
            part = _spectral(trace, masks, classes, members, bins)
        else:
            part = nested_quantile_labels(written[members], read[members], bins)
        label[members] = part + start
        start += int(part.max()) + 1
    return label[classes]


def _spectral(trace: Trace, masks: Mapping[str, Tensor], classes: Tensor, members: Tensor, bins: int) -> Tensor:
    """Labels by the singular vectors of w²M of all layers that write into the units, and of all that read them."""
    place = torch.full((int(classes.max()) + 1,), -1)
    place[members] = torch.arange(len(members))
    incoming, outgoing = [], []
    for step in trace.steps:
        if not isinstance(step, Affine):
            continue
        (source,) = step.inputs
        rows = place[classes[step.units]]
        columns = place[classes[trace.steps[source].units[step.features]]]
        if bool((rows >= 0).any()):
            values = _weights(step, masks, 2)[rows >= 0]
            incoming.append(values.new_zeros(len(members), values.shape[1]).index_add_(0, rows[rows >= 0], values))
        if bool((columns >= 0).any()):
            values = _weights(step, masks, 2)[:, columns >= 0]
            taken = values.new_zeros(len(values), len(members)).index_add_(1, columns[columns >= 0], values)
            outgoing.append(taken)
    if not incoming or not outgoing:
        return torch.zeros(len(members), dtype=torch.long)
    into, out_of = (ChannelGraph(torch.ones_like(t), t) for t in (torch.cat(incoming, 1), torch.cat(outgoing)))
    return spectral_labels(into, out_of, torch.arange(len(members)), bins)


def _weights(step: Affine, masks: Mapping[str, Tensor], power: int) -> Tensor:
    """w^power · M of a layer, [out, features], float64."""
    values = step.weight.detach().double() ** power
    mask = masks.get(step.weight_name)
    return step.matrix(values if mask is None else values * (mask != 0)).cpu()


def _degrees(
    trace: Trace, masks: Mapping[str, Tensor], classes: Tensor, positions: UnitPositions
) -> tuple[Tensor, Tensor]:
    """Sums of M, w·M or w²M over all that writes into each class of units, and over all that reads it."""
    written = torch.zeros(int(classes.max()) + 1, dtype=torch.float64)
    read = torch.zeros_like(written)
    for step in trace.steps:
        if not isinstance(step, Affine):
            continue
        values = _weights(step, masks, _POWERS[positions])
        written.index_add_(0, classes[step.units], values.sum(1))
        (source,) = step.inputs
        read.index_add_(0, classes[trace.steps[source].units[step.features]], values.sum(0))
    return written, read


def layer_memberships(
    trace: Trace, masks: Mapping[str, Tensor], bins: int, positions: Positions
) -> dict[str, tuple[Tensor, Tensor]]:
    """Membership of the rows [out, row bins] and columns [in, column bins] of every mask, by `unit_bins`.

    Raises:
        KeyError: A mask is of no Linear layer or convolution of the network.
    """
    bin_of = unit_bins(trace, masks, bins, positions)
    steps: dict[str, list[Affine]] = {}
    for step in trace.steps:
        if isinstance(step, Affine):
            steps.setdefault(step.weight_name, []).append(step)
    for name in masks:
        if name not in steps:
            raise KeyError(f"mask {name!r} is of no Linear layer or convolution that is read. {nearest(name, steps)}")
    return {name: _memberships(trace, steps[name], bin_of) for name in masks}


def _memberships(trace: Trace, parts: list[Affine], bin_of: Tensor) -> tuple[Tensor, Tensor]:
    # Queries, keys and values are rows of one weight, and read the same units.
    ordered = sorted(parts, key=lambda step: step.rows.start if step.rows else 0)
    rows = torch.cat([step.units for step in ordered])
    step = ordered[0]
    (source,) = step.inputs
    features = step.features if step.weight.ndim == 2 else step.features[:: step.weight[0, 0].numel()]
    columns = trace.steps[source].units[features]
    return tuple(one_hot(bin_of[units].unique(return_inverse=True)[1]) for units in (rows, columns))  # type: ignore[return-value]
