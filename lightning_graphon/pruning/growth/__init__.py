"""Masks that change during training: what to drop, what to grow, and when."""

from lightning_graphon.pruning.growth import (  # noqa: F401  (registers the methods)
    constant_fan_in,
    gradient_growth,
    gradual_magnitude,
    graphon_growth,
    sparse_evolution,
)
from lightning_graphon.pruning.growth.beginning import beginning_masks
from lightning_graphon.pruning.growth.config import GrowthConfig
from lightning_graphon.pruning.growth.mask_updater import MaskUpdater
from lightning_graphon.pruning.growth.registry import (
    GrowthContext,
    GrowthMethod,
    get_growth,
    growth_methods,
    register_growth,
)
from lightning_graphon.pruning.growth.schedule import GrowthSchedule

__all__ = [
    "GrowthConfig",
    "GrowthContext",
    "GrowthMethod",
    "GrowthSchedule",
    "MaskUpdater",
    "beginning_masks",
    "get_growth",
    "growth_methods",
    "register_growth",
]
