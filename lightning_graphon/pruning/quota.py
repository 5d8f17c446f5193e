"""How many weights stay after each round: for all layers together, or for each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_graphon.pruning import budgets
from lightning_graphon.pruning.plan import Plan
from lightning_graphon.pruning.schedules import kept_after
from lightning_graphon.pruning.select import keep_largest


@dataclass(frozen=True)
class Quota:
    """Densities and numbers to keep in the end: of all layers together (""), or of each."""

    sizes: Mapping[str, int]
    densities: Mapping[str, float]
    kept: Mapping[str, int]
    floors: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, plan: Plan, shapes: Mapping[str, torch.Size]) -> "Quota":
        """The numbers that a plan means for weights of these shapes."""
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        total = sum(sizes.values())
        # Ten digits, so that 1 - 0.9 is 0.1.
        density, keep = round(1 - plan.sparsity, 10), budgets.kept_count(total, plan.sparsity)
        if isinstance(plan.allocation, Mapping):
            kept = budgets.budgets_by_hand(model, shapes, plan.allocation, plan.sparsity)
            floors = budgets.floor_counts(shapes, plan.min_density, sum(kept.values()))
            kept = {name: max(count, floors.get(name, 0)) for name, count in kept.items()}
            return cls(sizes, {name: count / sizes[name] for name, count in kept.items()}, kept, floors)
        floors = budgets.floor_counts(shapes, plan.min_density, keep)
        if plan.allocation == "global":
            return cls({"": total}, {"": density}, {"": keep}, floors)
        kept = budgets.layer_budgets(shapes, keep, plan.allocation, floors)
        densities = {name: count / sizes[name] for name, count in kept.items()}
        if plan.allocation == "uniform" and not floors:
            densities = dict.fromkeys(sizes, density)
        return cls(sizes, densities, kept, floors)

    def select(self, scores: Mapping[str, Tensor], step: int, rounds: int, schedule: str) -> dict[str, Tensor]:
        """The masks after round `step` of `rounds`."""
        now = {
            name: kept_after(size, self.densities[name], self.kept[name], step, rounds, schedule)
            for name, size in self.sizes.items()
        }
        if "" in now:
            return budgets.select_globally(scores, now[""], self.floors)
        return {name: keep_largest({name: score}, now[name])[name] for name, score in scores.items()}
