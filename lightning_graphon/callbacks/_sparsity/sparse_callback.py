"""Keeps a module sparse through validation, checkpoints and exceptions, whoever found the masks."""

import warnings
import weakref
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_graphon.callbacks._module.pickling import state_without_module
from lightning_graphon.pruning import CopyWatch, Enforcer, Masks


class SparseCallback(Callback):
    """Holds the masks of one module and what enforces them; subclasses find the masks and attach the enforcer."""

    def __init__(self) -> None:
        self._masks: Masks | None = None
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._enforcer: Enforcer | None = None
        self._copies: CopyWatch | None = None

    @property
    def masks(self) -> Masks | None:
        """The masks, from fit start on."""
        return self._masks

    def _enforce(self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Masks) -> Enforcer:
        """Keep the weights of these masks at zero from here on."""
        self._masks, self._module = masks, weakref.ref(pl_module)
        self._enforcer = Enforcer(pl_module, masks, *trainer.optimizers)
        return self._enforcer

    def _follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to parameters and optimizers that have taken the place of others."""
        if self._masks is None or self._enforcer is None:
            return
        if not self._enforcer.is_of(pl_module, trainer.optimizers):
            masks = self._masks.fitting(pl_module)
            if lost := [name for name in self._masks if name not in masks]:
                warnings.warn(f"dense from now on, as their parameters were replaced: {', '.join(lost)}", stacklevel=2)
            self._detach()
            self._enforce(trainer, pl_module, masks)
        if self._copies is not None and (changed := self._copies.prune_changed(pl_module, self._masks)):
            rank_zero_info(f"pruned like the weights that they follow: {', '.join(changed)}")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # After the hooks of an epoch's start, those of the module too; and after the first step, for copies.
        if batch_idx < 2:
            self._follow(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow(trainer, pl_module)
        self._zero_weights()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._follow(trainer, pl_module)
        self._zero_weights()
        if self._enforcer is not None:
            self._enforcer.zero_state()
            # Strategies that gather weights have copied them already.
            self._enforcer.zero_saved(checkpoint.get("state_dict", {}))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow(trainer, pl_module)
        self._zero_weights()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._detach()

    def _zero_weights(self) -> None:
        if self._enforcer is not None:
            self._enforcer.zero_weights()

    def _detach(self) -> None:
        if self._enforcer is not None:
            self._enforcer.detach()
            self._enforcer = None

    def __getstate__(self) -> dict[str, Any]:
        return state_without_module(self, "_module", "_enforcer", "_copies")
