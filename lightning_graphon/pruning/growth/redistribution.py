"""Counts that move between layers, to where gradients are large (SNFS, Dettmers & Zettlemoyer 2019)."""

from collections.abc import Mapping

from torch import Tensor

from lightning_graphon.pruning.allocation.layer_budgets import proportional_counts
from lightning_graphon.pruning.allocation.top_k import true_count
from lightning_graphon.pruning.growth.registry import GrowthContext


def moved_counts(context: GrowthContext, survivors: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers to keep: all that were dropped are handed out in proportion to the mean |gradient| of kept weights.

    No layer gets more than it has room for, or less than its floor; the sum is that of `context.counts`.
    """
    kept = {name: true_count(mask) for name, mask in survivors.items()}
    means = {name: _mean_magnitude(context.gradients[name], context.masks[name]) for name in survivors}
    if not any(means.values()):
        means = dict.fromkeys(means, 1.0)
    room = {name: mask.numel() - kept[name] for name, mask in survivors.items()}
    floors = {name: max(0, context.floors.get(name, 0) - kept[name]) for name in survivors}
    freed = sum(context.counts[name] for name in survivors) - sum(kept.values())
    grown = proportional_counts(means, room, floors, freed)
    return {name: kept[name] + grown[name] for name in survivors}


def _mean_magnitude(gradient: Tensor, mask: Tensor) -> float:
    # In float64, as counts must not depend on the order of summation of a device.
    kept = gradient[mask].double().abs()
    return float(kept.mean()) if kept.numel() else 0.0
