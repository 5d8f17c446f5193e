"""Pruning: scores, budgets, schedules, masks, and keeping pruned weights at zero. Needs torch and scipy only."""

from lightning_graphon.pruning.enforcer import Enforcer
from lightning_graphon.pruning.layer_selection import select_weights
from lightning_graphon.pruning.macs import Macs, theoretical_macs
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.prune import LayerCollapseWarning, prune
from lightning_graphon.pruning.read_masks import read_masks
from lightning_graphon.pruning.rescale import rescale_
from lightning_graphon.pruning.scoring import ScoringContext, methods, register_method
from lightning_graphon.pruning.sharding import summon_full_params

__all__ = [
    "Enforcer",
    "LayerCollapseWarning",
    "Macs",
    "Masks",
    "ScoringContext",
    "methods",
    "prune",
    "read_masks",
    "register_method",
    "rescale_",
    "select_weights",
    "summon_full_params",
    "theoretical_macs",
]
