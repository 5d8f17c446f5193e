"""The object: step graphons, named families, sampling."""

from lightning_graphon.graphon.core.at_density import values_at_density
from lightning_graphon.graphon.core.families import FAMILIES, as_graphon, block, constant, power_law, product
from lightning_graphon.graphon.core.step_graphon import StepGraphon, common_refinement

__all__ = [
    "FAMILIES",
    "StepGraphon",
    "as_graphon",
    "block",
    "common_refinement",
    "constant",
    "power_law",
    "product",
    "values_at_density",
]
