"""Masks that change during training: what to drop, what to grow, and when."""

from lightning_graphon.pruning.growth import (  # noqa: F401  (registers the methods)
    constant_fan_in,
    gradient_growth,
    gradual_magnitude,
    graphon_growth,
    sparse_evolution,
)
from lightning_graphon.pruning.growth.registry import (
    GrowthContext,
    GrowthMethod,
    get_growth,
    growth_methods,
    register_growth,
)
from lightning_graphon.pruning.growth.schedule import GrowthSchedule

__all__ = ["GrowthContext", "GrowthMethod", "GrowthSchedule", "get_growth", "growth_methods", "register_growth"]
