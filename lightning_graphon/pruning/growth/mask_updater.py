"""`MaskUpdater`: counts steps, knows when masks change, and computes the new ones; without Lightning."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graphon._shared.weight_layout import layout_of
from lightning_graphon.pruning.allocation.layer_budgets import floor_counts
from lightning_graphon.pruning.allocation.top_k import true_count
from lightning_graphon.pruning.config import PruningConfig
from lightning_graphon.pruning.growth.beginning import keep_counts
from lightning_graphon.pruning.growth.config import GrowthConfig
from lightning_graphon.pruning.growth.registry import GrowthContext
from lightning_graphon.pruning.growth.schedule import GrowthSchedule
from lightning_graphon.pruning.masks import Masks


class MaskUpdater:
    """Which weights leave and which grow, step by step.

    All random numbers come of the seed and the number of the update, so nothing but `state_dict` has to be kept.

    Args:
        model: Says which axes of weights are outputs and inputs.
        masks: To begin with; not changed.
        config: How masks change.
        updates: When they change.
        pruning: Budget: the final one of methods that begin dense, and `min_density`; None: the counts of `masks` stay.
        seed: Seed of random growth.

    >>> net = nn.Linear(4, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[0.1, 2.0, 0.0, 0.0]]))
    >>> masks = Masks({"weight": torch.tensor([[True, True, False, False]])})
    >>> updater = MaskUpdater(net, masks, GrowthConfig("rigl"), GrowthSchedule(1, 0.6, last=100))
    >>> updater.step()
    True
    >>> updater.update({"weight": net.weight.data}, {"weight": torch.tensor([[0.0, 0.0, 1.0, -3.0]])}, masks)
    {'weight': tensor([[False,  True, False,  True]])}
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        config: GrowthConfig,
        updates: GrowthSchedule,
        pruning: PruningConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.config, self.schedule, self.seed, self.steps = config, updates, seed, 0
        self._layouts = {name: layout_of(model, name) for name in masks}
        shapes = {name: mask.shape for name, mask in masks.items()}
        self.counts = {name: true_count(mask) for name, mask in masks.items()}
        if pruning is not None and config.resolved.begins in ("dense", "constant fan-in"):
            self.counts = dict(keep_counts(model, pruning, masks).kept)
        self._floors = floor_counts(shapes, pruning.min_density if pruning else None, sum(self.counts.values()))
        self._momentum: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Of the weights whose masks it changes."""
        return list(self._layouts)

    @property
    def next_update(self) -> int | None:
        """After how many steps from now the next update comes; None where there is none any more."""
        every = self.schedule.every_n_steps
        due = (self.steps // every + 1) * every
        return due - self.steps if self.schedule.is_due(due) else None

    @property
    def needs_gradients(self) -> bool:
        """Whether dense gradients of the step that comes are needed."""
        every, coming = self.schedule.every_n_steps, self.steps + 1
        due = -(-coming // every) * every
        return due - coming < self.config.window and self.schedule.is_due(due)

    def step(self) -> bool:
        """Count a step of the optimizers; whether masks are to be updated after it."""
        self.steps += 1
        return self.schedule.is_due(self.steps)

    @torch.no_grad()
    def add_to_momentum(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the dense gradients of a step to their average, if the method has one."""
        if self.config.needs == "momentum":
            for name, gradient in gradients.items():
                before = self._momentum.get(name)
                self._momentum[name] = gradient if before is None else gradient + self.config.momentum * before

    @torch.no_grad()
    def update(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """New masks of the layers that are given; the others stay.

        Args:
            weights: Name -> whole weight, in network order.
            gradients: Name -> dense gradient, whole and averaged over processes; of methods that have a momentum, it
                is taken in place of them.
            masks: Name -> mask so far.
        """
        known = self._momentum if self.config.needs == "momentum" else gradients
        names = [n for n in masks if n in weights and (self.config.needs == "nothing" or n in known)]
        context = GrowthContext(
            weights=weights,
            masks={name: masks[name] for name in names},
            gradients=known,
            counts=self.counts,
            floors=self._floors,
            layouts=self._layouts,
            fraction=self.schedule.fraction_at(self.steps),
            progress=self.schedule.progress_at(self.steps),
            moves=self.config.redistribute,
            seed=self.seed,
            update=self.steps // self.schedule.every_n_steps,
        )
        options = self.config.options
        new = self.config.resolved.update(context, **options) if names else {}
        if self.config.redistribute:
            self.counts.update({name: true_count(mask) for name, mask in new.items()})
        self._momentum = {}
        return new

    def changes(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, tuple[int, int, int]]:
        """Name -> numbers of weights kept before, kept now, and kept now but not before."""
        return {n: (true_count(old[n]), true_count(mask), true_count(mask & ~old[n])) for n, mask in new.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors: what goes on where it was left."""
        momentum = {name: tensor.cpu() for name, tensor in self._momentum.items()}
        last = self.schedule.last
        return {"steps": self.steps, "last": last, "counts": dict(self.counts), "momentum": momentum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; with the schedule that it was planned with."""
        self.steps, self.counts = int(state["steps"]), {name: int(n) for name, n in state["counts"].items()}
        self.schedule = GrowthSchedule(self.schedule.every_n_steps, self.schedule.fraction, int(state["last"]))
        self._momentum = dict(state["momentum"])
