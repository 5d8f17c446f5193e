"""The network inside a LightningModule as one function of one tensor, and a fixed probe batch for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_graphon.callbacks._batches import train_batches
from lightning_graphon.callbacks._training_step import TrainingStepObjective


@dataclass(frozen=True)
class Network:
    """A module, the probe inputs that `training_step` gives it, and their labels.

    Attributes:
        module: Called once by `training_step`, with one tensor.
        inputs: [N, ...], as the module gets them.
        labels: Class numbers [N], where the batches are (inputs, classes) pairs; else None.
    """

    module: nn.Module
    inputs: Tensor
    labels: Tensor | None

    def own_masks(self, pl_module: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks by the names that the parameters have inside the module."""
        by_parameter = {p: masks[n] for n, p in pl_module.named_parameters(remove_duplicate=False) if n in masks}
        own = self.module.named_parameters()
        return {name: by_parameter[p].to(p.device) for name, p in own if p in by_parameter}


def find_network(trainer: pl.Trainer, pl_module: pl.LightningModule, size: int, seed: int) -> Network:
    """Watch `training_step` on the first training batches (drawn from `seed`) until there are `size` samples.

    Raises:
        ValueError: `training_step` calls no module, several, or one with more than a single tensor.
    """
    objective = TrainingStepObjective(trainer, pl_module)
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    module: nn.Module | None = None
    for batch in train_batches(trainer, pl_module, size, seed=seed, enough=lambda seen: _samples(seen) >= size):
        module, x = _the_call(objective, pl_module, batch)
        inputs.append(x)
        labels.extend(_labels_of(batch, len(x)))
    if module is None:
        raise ValueError("there is no training data to probe the network with")
    found = torch.cat(labels)[:size] if len(labels) == len(inputs) else None
    return Network(module, torch.cat(inputs)[:size], found)


def _the_call(objective: TrainingStepObjective, pl_module: pl.LightningModule, batch: Any) -> tuple[nn.Module, Tensor]:
    calls = objective.calls(batch)
    if len(calls) == 1:
        module, args, kwargs = calls[0]
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return module, args[0].detach()
    raise ValueError(
        f"{type(pl_module).__name__}.training_step is not one call of one module with one tensor ({len(calls)} calls): "
        "its tangent kernel cannot be read; compute empirical_ntk of the module you mean"
    )


def _samples(batches: list[Any]) -> int:
    """Samples seen so far, by the first tensor of each batch."""
    tensors = [next((t for t in tree_leaves(b) if isinstance(t, Tensor) and t.ndim), None) for b in batches]
    return sum(0 if t is None else len(t) for t in tensors)


def _labels_of(batch: Any, count: int) -> list[Tensor]:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    classes = batch[1] if pair and isinstance(batch[1], Tensor) else None
    usable = classes is not None and classes.shape == (count,) and not classes.is_floating_point()
    return [classes] if usable and classes is not None else []
