"""Gradual magnitude pruning (Zhu & Gupta 2017): for those who begin dense."""

from torch import Tensor

from lightning_graphon.pruning.allocation.layer_budgets import select_globally
from lightning_graphon.pruning.growth.exchange import among, keep_largest_weights
from lightning_graphon.pruning.growth.registry import GrowthContext, register_growth
from lightning_graphon.pruning.growth.schedule import count_of
from lightning_graphon.pruning.lazy_tensors import LazyTensorMapping


@register_growth("gmp", begins="dense")
def gradual_magnitude(context: GrowthContext) -> dict[str, Tensor]:
    """Keep the largest weights, as many as the cubic schedule has: final + (all - final) · (1 - progress)³.

    With one threshold over all layers where `counts` has their total, else layer by layer. Nothing grows back.
    """
    left = round((1 - context.progress) ** 3, 12)
    sizes = {name: mask.numel() for name, mask in context.masks.items()}
    if "" in context.counts:
        total = sum(sizes.values())
        keep = context.counts[""] + count_of(left, total - context.counts[""])
        shapes = {name: mask.shape for name, mask in context.masks.items()}
        magnitudes = LazyTensorMapping(
            shapes, lambda name: among(context.masks[name], context.weights[name].nan_to_num().abs())
        )
        return select_globally(magnitudes, keep, context.floors)
    keeps = {n: context.counts[n] + count_of(left, size - context.counts[n]) for n, size in sizes.items()}
    return {n: keep_largest_weights(context.weights[n], mask, keeps[n]) for n, mask in context.masks.items()}
