"""SET, sparse evolutionary training (Mocanu et al. 2018): random growth."""

from torch import Tensor

from lightning_graphon.pruning.growth.exchange import exchange
from lightning_graphon.pruning.growth.registry import GrowthContext, register_growth


@register_growth("set")
def sparse_evolution(context: GrowthContext) -> dict[str, Tensor]:
    """Every weight that is not kept is as likely to grow as any other."""
    return exchange(context, lambda name, kept, count: context.uniform(name))
