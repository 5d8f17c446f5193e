"""The masks that growth begins with where no method of `prune` finds them, and how many weights layers are to keep."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_graphon._shared.random import generator
from lightning_graphon._shared.weight_layout import layout_of
from lightning_graphon.pruning.allocation.keep_counts import KeepCounts
from lightning_graphon.pruning.allocation.layer_budgets import floor_counts
from lightning_graphon.pruning.config import PruningConfig
from lightning_graphon.pruning.growth.constant_fan_in import fan_in_of, keep_in_rows
from lightning_graphon.pruning.layer_selection import select_weights
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.sharding import local_shard


def beginning_masks(model: nn.Module, config: PruningConfig, constant_fan_in: bool) -> Masks:
    """Masks that keep every weight that `config` selects; or random ones that give all units of a layer one fan-in.

    Then a layer's count is rounded down to a multiple of its units, at least one weight per unit.
    """
    weights = select_weights(model, config.include, config.exclude)
    dense = {n: torch.ones(w.shape, dtype=torch.bool, device=local_shard(w).device) for n, w in weights.items()}
    return Masks(_constant_fan_in(model, config, dense) if constant_fan_in else dense)


def _constant_fan_in(model: nn.Module, config: PruningConfig, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    source, counts, masks = generator(config.seed, "constant fan-in"), keep_counts(model, config, dense), {}
    for name, mask in dense.items():
        layout = layout_of(model, name)
        rows = layout.rows(torch.rand(mask.shape, generator=source))
        units, inputs = rows.flatten(1).shape
        floor = floor_counts({name: mask.shape}, config.min_density, mask.numel()).get(name, 0)
        fan_in = torch.full((units,), fan_in_of(counts.kept[name], units, inputs, floor))
        kept = keep_in_rows(rows.flatten(1), fan_in).reshape(rows.shape)
        masks[name] = layout.stored(kept).contiguous().to(mask.device)
    return masks


def keep_counts(model: nn.Module, config: PruningConfig, masks: Mapping[str, Tensor]) -> KeepCounts:
    """Numbers of weights to keep in the end; of all together under "" where one threshold is to decide."""
    shapes = {name: mask.shape for name, mask in masks.items()}
    return KeepCounts.from_allocation(model, shapes, config.allocation, config.sparsity, config.min_density)
