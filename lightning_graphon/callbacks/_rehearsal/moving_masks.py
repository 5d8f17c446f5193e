"""Masks of a copy that change as those of the module itself will."""

import copy
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_graphon.callbacks._distributed.dense_gradients import loss_scale
from lightning_graphon.pruning import Enforcer, Masks, MaskUpdater


class MovingMasks(Callback):
    """Updates the masks of a copy during its nested fit, as `DynamicSparsity` does, in one process and without logs.

    A copy's batch is that of all processes, so its gradients are already what they would be averaged to.

    Args:
        masks: In force at the start; copied.
        updaters: Where those of the module stand; copied.
        twin: The copy of the module.
        nested: Its trainer, with optimizers.
    """

    def __init__(
        self, masks: Masks, updaters: Sequence[MaskUpdater], twin: pl.LightningModule, nested: pl.Trainer
    ) -> None:
        self._masks = Masks({name: mask.clone() for name, mask in masks.items()})
        self._updaters = copy.deepcopy(list(updaters))
        self._enforcer = Enforcer(twin, self._masks, *nested.optimizers)
        self._seen_step, self._scale = nested.global_step, 1.0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if any(updater.needs_gradients for updater in self._updaters):
            self._enforcer.collect_gradients()
            self._scale = loss_scale(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen_step:
            return  # gradients are still accumulated
        self._seen_step, found = trainer.global_step, None
        for updater in self._updaters:
            collected, due = updater.needs_gradients, updater.step()
            if collected or due:
                found = self._gradients() if found is None else found
                self._update(updater, pl_module, found, due)

    def _update(
        self, updater: MaskUpdater, pl_module: pl.LightningModule, gradients: dict[str, Tensor], due: bool
    ) -> None:
        own = {name: self._masks[name] for name in updater.names if name in self._masks}
        mine = {name: gradients[name] for name in own if name in gradients}
        updater.add_to_momentum(mine)
        if due:
            parameters = dict(pl_module.named_parameters(remove_duplicate=False))
            weights = {name: parameters[name].detach() for name in own if parameters[name].requires_grad}
            self._enforcer.update(updater.update(weights, mine, own))

    def _gradients(self) -> dict[str, Tensor]:
        """None of them where one is not finite, as after an overflow under mixed precision."""
        found = self._enforcer.take_gradients()
        if not all(bool(torch.isfinite(gradient).all()) for gradient in found.values()):
            return {}
        return {name: g if self._scale == 1 else g / self._scale for name, g in found.items()}
