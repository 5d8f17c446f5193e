"""Which weights die: saliency, budgets, schedules, masks. Needs torch only."""

from lightning_graphon.pruning import baselines, grasp, snip, synflow  # noqa: F401  (registers the methods)
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.methods import Problem, methods, register_method
from lightning_graphon.pruning.prune import LayerCollapseWarning, prune
from lightning_graphon.pruning.targets import select_weights

__all__ = [
    "LayerCollapseWarning",
    "Masks",
    "Problem",
    "methods",
    "prune",
    "register_method",
    "select_weights",
]
