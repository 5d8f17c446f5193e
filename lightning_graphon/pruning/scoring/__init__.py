"""Pruning methods: how each scores weights, and their registry."""

from lightning_graphon.pruning.scoring import (  # noqa: F401  (registers the methods)
    first_order,
    force,
    graphon,
    grasp,
    ntk_sap,
    prospr,
    px,
    ramanujan,
    synflow,
    synflow_l2,
)
from lightning_graphon.pruning.scoring.registry import ScoringContext, methods, register_method

__all__ = ["ScoringContext", "methods", "register_method"]
