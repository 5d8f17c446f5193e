"""Which weights die: saliency, budgets, schedules, masks. Needs torch only."""

from lightning_graphon.pruning import baselines, from_graphon, grasp, snip, synflow  # noqa: F401  (registers the methods)
from lightning_graphon.pruning.enforce import Enforcer
from lightning_graphon.pruning.macs import Macs, theoretical_macs
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.methods import Problem, methods, register_method
from lightning_graphon.pruning.prune import LayerCollapseWarning, prune
from lightning_graphon.pruning.read import read_masks
from lightning_graphon.pruning.rescale import rescale_
from lightning_graphon.pruning.shards import gathered
from lightning_graphon.pruning.targets import select_weights

__all__ = [
    "Enforcer",
    "LayerCollapseWarning",
    "Macs",
    "Masks",
    "Problem",
    "gathered",
    "methods",
    "prune",
    "read_masks",
    "register_method",
    "rescale_",
    "select_weights",
    "theoretical_macs",
]
