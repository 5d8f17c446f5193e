"""Pruning: scores, budgets, schedules, masks, and keeping pruned weights at zero. Needs torch and scipy only."""

from lightning_graphon._shared.weight_layout import register_layer
from lightning_graphon.pruning.allocation.n_m import sparsity_of
from lightning_graphon.pruning.config import PruningConfig
from lightning_graphon.pruning.copies import CopyWatch, find_copies, without_copies
from lightning_graphon.pruning.enforcer import Enforcer
from lightning_graphon.pruning.growth import (
    GrowthConfig,
    GrowthContext,
    GrowthSchedule,
    MaskUpdater,
    beginning_masks,
    growth_methods,
    register_growth,
)
from lightning_graphon.pruning.layer_selection import select_weights
from lightning_graphon.pruning.lazy_tensors import LazyTensorMapping
from lightning_graphon.pruning.macs import Macs, theoretical_macs
from lightning_graphon.pruning.masks import GivenMasks, Masks, as_masks
from lightning_graphon.pruning.prune import LayerCollapseWarning, compute_masks, prune
from lightning_graphon.pruning.read_masks import check_readable, read_masks
from lightning_graphon.pruning.rescale import rescale_
from lightning_graphon.pruning.scoring import ScoringContext, methods, register_method
from lightning_graphon.pruning.sharding import full_tensor, is_sharded, local_shard, summon_full_params

__all__ = [
    "CopyWatch",
    "Enforcer",
    "GivenMasks",
    "GrowthConfig",
    "GrowthContext",
    "GrowthSchedule",
    "LayerCollapseWarning",
    "LazyTensorMapping",
    "Macs",
    "MaskUpdater",
    "Masks",
    "PruningConfig",
    "ScoringContext",
    "as_masks",
    "beginning_masks",
    "check_readable",
    "compute_masks",
    "find_copies",
    "full_tensor",
    "growth_methods",
    "is_sharded",
    "local_shard",
    "methods",
    "prune",
    "read_masks",
    "register_growth",
    "register_layer",
    "register_method",
    "rescale_",
    "select_weights",
    "sparsity_of",
    "summon_full_params",
    "theoretical_macs",
    "without_copies",
]
