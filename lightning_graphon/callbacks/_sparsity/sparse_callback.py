"""Keeps a module sparse through validation, checkpoints and exceptions, whoever found the masks."""

import warnings
import weakref
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_graphon.callbacks._distributed import agreement
from lightning_graphon.callbacks._logging.scalars import log_layer_table, log_scalars
from lightning_graphon.callbacks._module.pickling import state_without_module
from lightning_graphon.callbacks._module.scoring import untrained_parameters
from lightning_graphon.graphon import StepGraphon
from lightning_graphon.pruning import CopyWatch, Enforcer, Masks, MaskUpdater, find_copies


class SparseCallback(Callback):
    """Holds the masks of one module and what enforces them; subclasses find the masks.

    Args:
        verbose: Tell what is pruned.
        layer_scalars: Log the scalars of layers to TensorBoard, too, a chart for each.
    """

    moves: ClassVar[bool] = False  # whether masks change during training

    def __init__(self, verbose: bool, layer_scalars: bool) -> None:
        self.verbose, self.layer_scalars = verbose, layer_scalars
        self._fresh, self._resumes = False, True
        self.updates = 0  # of masks, in this fit
        self.start_limits: dict[str, StepGraphon] = {}  # to which masks of its method tend, by layer
        self._masks: Masks | None = None
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._enforcer: Enforcer | None = None
        self._copies: CopyWatch | None = None

    @property
    def masks(self) -> Masks | None:
        """The masks, from fit start on."""
        return self._masks

    def plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> MaskUpdater | None:
        """What will change the masks from this step on; None where they stay. For the start of training."""
        return None

    def _search(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Masks:
        """Masks for this module; every process calls it."""
        raise NotImplementedError

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        agreement.refuse_other_package(trainer, type(self).__name__)
        self._resumes = stage == "fit"
        if self._resumes:
            agreement.refuse_flattened(trainer, type(self).__name__)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Some strategies restore a checkpoint, and our masks with it, only after this hook.
        if not trainer.strategy.restore_checkpoint_after_setup:
            self.install(trainer, pl_module)

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.install(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _, enforcer = self.install(trainer, pl_module)
        if self._fresh and trainer.global_step > 0:
            warnings.warn(
                f"{type(self).__name__} pruned weights that were already trained for {trainer.global_step} steps: the "
                "checkpoint that was resumed has no masks",
                stacklevel=2,
            )
        self._fresh = False
        enforcer.zero_state()  # the optimizers' states may have been restored since
        layers = self._log_sparsity(trainer)
        log_layer_table(trainer, "sparsity/layers", layers)

    def _log_sparsity(self, trainer: pl.Trainer) -> dict[str, float]:
        """Log the fractions removed; those of layers."""
        masks = self._masks or Masks({})
        layers = {**{f"sparsity/{row['layer']}": row["sparsity"] for row in masks.table()}, **self._layer_numbers()}
        scalars = {**layers, "sparsity/total": masks.sparsity, "sparsity/model": _model_sparsity(trainer)}
        log_scalars(trainer, scalars, () if self.layer_scalars else layers)
        return layers

    def _layer_numbers(self) -> dict[str, float]:
        """Further numbers of layers to log when training starts."""
        return {}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._resumes:
            return
        states = checkpoint.get("callbacks") or {}
        others = [key for key in states if key.startswith(type(self).__qualname__) and states[key]]
        mine = {c.state_key for c in getattr(trainer, "callbacks", []) if isinstance(c, SparseCallback)}
        if self.state_key not in states and set(others) - mine:
            raise ValueError(
                f"the checkpoint has masks of {', '.join(others)} but none of this {self.state_key}: resume with the "
                "same include and exclude"
            )

    def install(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[Masks, Enforcer]:
        """Find the masks if there are none for this module yet, and start to enforce them.

        Every process must call it.

        Raises:
            ValueError: A weight has masks of another callback, and those of one of them change.
        """
        if self._masks is None or self._enforcer is None:
            other = self._module is not None and self._module() is not pl_module
            masks = self._find(trainer, pl_module) if self._masks is None or other else self._masks
            self._refuse_shared_weights(trainer, pl_module, masks)
            return masks, self._enforce(trainer, pl_module, masks)
        return self._masks, self._enforcer

    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Masks:
        """The masks, the same on all processes."""
        masks = self._search(trainer, pl_module)
        masks.pairs(pl_module)
        agreement.check_same_masks(trainer, pl_module, masks)
        self._fresh = True
        self._watch_copies(trainer, pl_module, masks)
        return masks

    def _refuse_shared_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Masks) -> None:
        for other in sparse_callbacks(trainer):
            of_same = other is not self and other._module is not None and other._module() is pl_module
            if of_same and (self.moves or other.moves) and (both := [*(masks.keys() & (other.masks or {}).keys())]):
                raise ValueError(
                    f"{self.state_key} and {other.state_key} both have masks of {', '.join(sorted(both))}: masks that "
                    "change must be the only ones of a weight; leave it out of one of them (include, exclude)"
                )

    def _watch_copies(self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Masks) -> None:
        copies = find_copies(pl_module, masks, untrained_parameters(trainer, pl_module))
        self._copies = CopyWatch(pl_module, copies)
        if copies and self.verbose:
            name = type(self).__name__
            rank_zero_info(f"{name} prunes {', '.join(copies)}, copies of weights, once they follow their weights")

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


def sparse_callbacks(trainer: pl.Trainer) -> list[SparseCallback]:
    """Those of the trainer that hold masks, or will."""
    return [c for c in getattr(trainer, "callbacks", []) if isinstance(c, SparseCallback)]


def _model_sparsity(trainer: pl.Trainer) -> float:
    """Fraction of all parameters that the callbacks of the trainer remove together."""
    masks = [c.masks for c in sparse_callbacks(trainer) if c.masks is not None]
    return sum(m.total - m.kept for m in masks) / sum(p.numel() for p in trainer.lightning_module.parameters())
