"""Distances between graphons."""

from lightning_graphon.graphon.distances.cut_norm import CutNorm, cut_norm
from lightning_graphon.graphon.distances.distances import (
    CutDistance,
    cut_distance,
    l1_distance,
    l2_distance,
    transport_distance,
)

__all__ = ["CutDistance", "CutNorm", "cut_distance", "cut_norm", "l1_distance", "l2_distance", "transport_distance"]
