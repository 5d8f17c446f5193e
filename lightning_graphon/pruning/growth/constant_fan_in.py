"""SRigL (Lasby et al. 2023): RigL with the same fan-in for every unit, and units that are ablated."""

import torch
from torch import Tensor

from lightning_graphon.pruning.allocation.top_k import keep_largest, true_count
from lightning_graphon.pruning.growth.exchange import among, keep_largest_weights
from lightning_graphon.pruning.growth.registry import GrowthContext, register_growth
from lightning_graphon.pruning.growth.schedule import count_of


@register_growth("srigl", needs="gradient", begins="constant fan-in")
def srigl(context: GrowthContext, *, min_salient: float = 0.3, ablate_last: bool = False) -> dict[str, Tensor]:
    """Every unit has the same number of inputs, or none at all.

    A layer with room for n weights gives each of its units n // (number of units) of them, at least one. Salient are
    the weights that stay for their magnitude and those that RigL would grow. A unit with fewer of them than the share
    `min_salient` of its inputs is ablated, and the others share its weights; it may come back at a later update.

    Args:
        context: Weights, masks, gradients and counts.
        min_salient: Share of its inputs that a unit needs to be salient; 0: no unit is ablated.
        ablate_last: Whether units of the last layer, the network's outputs, may be ablated, too.
    """
    masks, last = {}, list(context.masks)[-1:]
    for name, mask in context.masks.items():
        layout, share = context.layout(name), 0.0 if [name] == last and not ablate_last else min_salient
        weight, gradient, kept = (
            layout.rows(tensor).flatten(1) for tensor in (context.weights[name], context.gradients[name], mask)
        )
        rows = _updated(torch.nan_to_num(weight).abs(), gradient.abs(), kept, context, name, share)
        masks[name] = layout.stored(rows.reshape(layout.rows(mask).shape)).contiguous()
    return masks


def _updated(weight: Tensor, gradient: Tensor, mask: Tensor, context: GrowthContext, name: str, share: float) -> Tensor:
    """The new mask [units, inputs]."""
    count, kept = context.counts[name], true_count(mask)
    dropped = count_of(context.fraction, kept)
    survivors = keep_largest_weights(weight, mask, kept - dropped)
    active = _active_units(survivors, gradient, dropped, count, share)
    fan_in = fan_in_of(count, int(active.count_nonzero()), mask.shape[1], context.floors.get(name, 0))
    survivors &= active[:, None]
    present = counts_of_rows(survivors)
    if bool((present > fan_in).any()):  # the smallest leave of units with more than the others have inputs
        present = present.clamp(max=fan_in)
        survivors = keep_in_rows(among(survivors, weight), present)
    missing = (fan_in - present) * active
    return survivors | keep_in_rows(among(~survivors, gradient), missing)


def _active_units(survivors: Tensor, gradient: Tensor, dropped: int, count: int, share: float) -> Tensor:
    """Units with enough salient weights, and at least as many of them as can hold all the weights."""
    units, inputs = survivors.shape
    if not share:
        return torch.ones(units, dtype=torch.bool, device=survivors.device)
    salient = counts_of_rows(survivors | keep_largest({"": gradient}, dropped)[""])
    least = max(1, count_of(share, fan_in_of(count, units, inputs)))
    needed = min(units, max(1, -(-count // inputs)))
    best = salient.sort(descending=True, stable=True).indices[:needed]
    return (salient >= least).index_fill_(0, best, True)


def fan_in_of(count: int, units: int, inputs: int, floor: int = 0) -> int:
    """Inputs of each of so many units that share `count` weights, rounded down; at least one, at most all.

    One more where all of them together would be fewer than `floor`.

    >>> fan_in_of(100, 30, 50), fan_in_of(100, 30, 50, floor=100)
    (3, 4)
    """
    fan_in = count // units
    return min(inputs, max(1, fan_in + (fan_in * units < floor)))


def keep_in_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """Mask [rows, n] of the largest scores of each row, by row as many as `counts` [rows] has; of equals the earlier.

    >>> keep_in_rows(torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 5.0]]), torch.tensor([1, 2])).int()
    tensor([[0, 0, 1],
            [1, 1, 0]], dtype=torch.int32)
    """
    most = max(1, int(counts.max()))
    smallest = scores.topk(most, dim=1).values.gather(1, (counts - 1).clamp(min=0)[:, None])
    taken = (scores >= smallest) & (counts > 0)[:, None]
    if true_count(taken) > int(counts.sum()):  # of the ties that are too many the earlier stay
        above = scores > smallest
        ties = taken & ~above
        taken = (above & taken) | (ties & (ties.cumsum(1) <= (counts - counts_of_rows(above))[:, None]))
    return taken


def counts_of_rows(flags: Tensor) -> Tensor:
    """Numbers [rows] of True entries."""
    return flags.float().sum(1).long()  # sums of bools are slow
