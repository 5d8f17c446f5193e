"""How many weights are kept after each round, of all layers together or of each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_graphon._shared.choices import Schedule
from lightning_graphon._shared.weight_layout import layout_of
from lightning_graphon.pruning.allocation import layer_budgets
from lightning_graphon.pruning.allocation.schedules import kept_after
from lightning_graphon.pruning.allocation.top_k import keep_largest


@dataclass(frozen=True)
class KeepCounts:
    """Numbers of weights to keep in the end, of all layers together (under the name "") or of each.

    Attributes:
        sizes: Numbers of weights.
        densities: Fractions to keep.
        kept: Numbers to keep.
        floors: Least numbers to keep in single layers.
    """

    sizes: Mapping[str, int]
    densities: Mapping[str, float]
    kept: Mapping[str, int]
    floors: Mapping[str, int]

    @classmethod
    def from_allocation(
        cls,
        model: nn.Module,
        shapes: Mapping[str, torch.Size],
        allocation: str | Mapping[str, float],
        sparsity: float,
        min_density: float | None,
    ) -> "KeepCounts":
        """Numbers from the arguments of `prune`, for weights of these shapes."""
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        total = sum(sizes.values())
        # To ten digits, so that 1 - 0.9 is 0.1.
        density, keep = round(1 - sparsity, 10), layer_budgets.keep_count(total, sparsity)
        if isinstance(allocation, Mapping):
            kept = layer_budgets.given_layer_budgets(model, shapes, allocation, sparsity)
            floors = layer_budgets.floor_counts(shapes, min_density, sum(kept.values()))
            kept = {name: max(count, floors.get(name, 0)) for name, count in kept.items()}
            return cls(sizes, {name: count / sizes[name] for name, count in kept.items()}, kept, floors)
        floors = layer_budgets.floor_counts(shapes, min_density, keep)
        if allocation == "global":
            return cls({"": total}, {"": density}, {"": keep}, floors)
        matrices = {name: layout_of(model, name).matrix(shape) for name, shape in shapes.items()}
        kept = layer_budgets.layer_budgets(shapes, keep, allocation, floors, matrices)
        densities = {name: count / sizes[name] for name, count in kept.items()}
        # The asked density, not the one rounded to whole weights: early rounds of an iterative method depend on it.
        if allocation == "uniform" and not floors:
            densities = dict.fromkeys(sizes, density)
        return cls(sizes, densities, kept, floors)

    def select(self, scores: Mapping[str, Tensor], step: int, rounds: int, schedule: Schedule) -> dict[str, Tensor]:
        """The masks after round `step` of `rounds`."""
        now = {
            name: kept_after(size, self.densities[name], self.kept[name], step, rounds, schedule)
            for name, size in self.sizes.items()
        }
        if "" in now:
            return layer_budgets.select_globally(scores, now[""], self.floors)
        return {name: keep_largest({name: score}, now[name])[name] for name, score in scores.items()}
