"""The masks that a trainer's model trains under, whoever made them."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch

from lightning_graphon.callbacks._distributed.sharded_analysis import check_memory_on_all_ranks
from lightning_graphon.callbacks._sparsity.sparse_callback import sparse_callbacks
from lightning_graphon.graphon import StepGraphon
from lightning_graphon.pruning import Masks, MaskUpdater, read_masks


def ensure_pruned(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let every PruneAtInit and DynamicSparsity prune that has not yet; every process must call it.

    Strategies that restore checkpoints late make it wait until training starts, perhaps behind who asks for the masks.
    """
    for callback in sparse_callbacks(trainer):
        callback.install(trainer, pl_module)


def enforced_masks(trainer: pl.Trainer) -> Masks | None:
    """The masks that callbacks keep in force, together; None without any."""
    masks = [callback.masks for callback in sparse_callbacks(trainer) if callback.masks is not None]
    return Masks({name: mask for own in masks for name, mask in own.items()}) if masks else None


def masks_move(trainer: pl.Trainer) -> bool:
    """Whether a callback changes masks during training."""
    return any(callback.moves for callback in sparse_callbacks(trainer))


def mask_updates(trainer: pl.Trainer) -> int:
    """How often masks have changed in this fit."""
    return sum(callback.updates for callback in sparse_callbacks(trainer))


def planned_updates(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[MaskUpdater]:
    """What will change masks from this step on; for the start of training, in any order of callbacks."""
    planned = [callback.plan(trainer, pl_module) for callback in sparse_callbacks(trainer)]
    return [updater for updater in planned if updater is not None and updater.next_update is not None]


def first_update(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
    """Optimizer step, as the trainer counts them, after which masks change first; None where they stay."""
    waits = (updater.next_update for updater in planned_updates(trainer, pl_module))
    each = max(1, len(trainer.optimizers))
    return min((trainer.global_step + each * wait for wait in waits if wait is not None), default=None)


def start_limits(trainer: pl.Trainer) -> dict[str, StepGraphon]:
    """Layer -> to which the masks of the start tend, where a callback knows it."""
    return {name: limit for c in sparse_callbacks(trainer) for name, limit in c.start_limits.items()}


def masks_in_use(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Masks:
    """The masks of a PruneAtInit or DynamicSparsity as they are; anything else from the model.

    Raises:
        InsufficientMemoryError: They are to be gathered, and do not fit.
        ValueError: There is no weight to read.
    """
    pruners = [c for c in sparse_callbacks(trainer) if c.masks is not None]
    if include is None and exclude is None and (len(pruners) == 1 or any(c.moves for c in pruners)):
        # Weights that have just grown are zero, so masks that move cannot be read from the model.
        return Masks({name: mask for c in pruners for name, mask in (c.masks or {}).items()})
    check_memory_on_all_ranks(trainer.strategy, pl_module, dtype=torch.bool)
    return read_masks(pl_module, include, exclude)
