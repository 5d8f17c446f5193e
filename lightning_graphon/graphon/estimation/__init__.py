"""From masks to step graphons."""

from lightning_graphon.graphon.estimation.estimate import estimate_graphon
from lightning_graphon.graphon.estimation.layers import layer_graphons

__all__ = ["estimate_graphon", "layer_graphons"]
