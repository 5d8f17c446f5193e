"""RigL (Evci et al. 2020) and growth like that of SNFS (Dettmers & Zettlemoyer 2019): where gradients are large."""

from torch import Tensor

from lightning_graphon.pruning.growth.exchange import exchange
from lightning_graphon.pruning.growth.registry import GrowthContext, register_growth


@register_growth("rigl", needs="gradient")
def rigl(context: GrowthContext) -> dict[str, Tensor]:
    """The weights grow whose gradient, of the batches of the update's step, is largest in magnitude."""
    return exchange(context, lambda name, kept, count: context.gradients[name].abs())


@register_growth("snfs", needs="momentum")
def snfs(context: GrowthContext, *, momentum: float = 0.9) -> dict[str, Tensor]:
    """As RigL, by an average of the last gradients.

    Args:
        context: Its gradients are averages Σ momentum^k · g of the gradients k steps ago.
        momentum: Weight of a gradient relative to that of the step after it.
    """
    return exchange(context, lambda name, kept, count: context.gradients[name].abs())
