"""Which inputs a mask reads, and how many of them together."""

from lightning_graphon.graphon.inputs.expressivity import (
    CoveredOrder,
    active_inputs,
    common_neighbour_count,
    covered_order,
    dead_units,
    effective_inputs,
    expressivity_table,
    mean_common_neighbour_count,
)
from lightning_graphon.graphon.inputs.relevance import coordinate_relevance, input_path_density

__all__ = [
    "CoveredOrder",
    "active_inputs",
    "common_neighbour_count",
    "coordinate_relevance",
    "covered_order",
    "dead_units",
    "effective_inputs",
    "expressivity_table",
    "input_path_density",
    "mean_common_neighbour_count",
]
