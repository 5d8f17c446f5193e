"""Which inputs a mask listens to, and how many of them at a time."""

from lightning_graphon.graphon.inputs.expressivity import (
    CoveredOrder,
    active_inputs,
    covered_order,
    dead_units,
    effective_inputs,
    expressivity_table,
    joined_units,
    mean_joined_units,
)
from lightning_graphon.graphon.inputs.relevance import coordinate_relevance, input_path_density, rank_correlation

__all__ = [
    "CoveredOrder",
    "active_inputs",
    "coordinate_relevance",
    "covered_order",
    "dead_units",
    "effective_inputs",
    "expressivity_table",
    "input_path_density",
    "joined_units",
    "mean_joined_units",
    "rank_correlation",
]
