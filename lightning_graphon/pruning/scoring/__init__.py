"""Pruning methods: how each scores weights, and their registry."""

from lightning_graphon.pruning.scoring import first_order, graphon, grasp, synflow  # noqa: F401  (registers the methods)
from lightning_graphon.pruning.scoring.registry import ScoringContext, methods, register_method

__all__ = ["ScoringContext", "methods", "register_method"]
