"""Masks of a LightningModule inside a Trainer, scored on its own data by its own loss."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_graphon._shared.module_state import preserve_module_state
from lightning_graphon.callbacks._distributed.agreement import average
from lightning_graphon.callbacks._distributed.sharded_analysis import check_memory_on_all_ranks
from lightning_graphon.callbacks._logging.progress import progress_shown
from lightning_graphon.callbacks._module.batches import scoring_batches
from lightning_graphon.callbacks._module.training_step import ModuleLoss, TrainingStepObjective
from lightning_graphon.pruning import Masks, PruningConfig, compute_masks, summon_full_params, without_copies

_NO_ROOM = (
    ", which PruneAtInit gathers to score them: find the masks elsewhere and use PruneAtInit.from_masks('masks.pt')"
)


def score_module(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    config: PruningConfig,
    *,
    batches: int | Sequence[Any],
    loss_fn: ModuleLoss | None,
    eval_mode: bool,
    show_progress: bool,
    on_first_scores: Callable[[dict[str, Tensor]], None] | None = None,
) -> Masks:
    """Find masks; the module, its gradients, random numbers and the order of the data are as before afterwards.

    Every process must call it; scores are averaged over their data.

    Args:
        trainer: Gives the train dataloader, the precision and the strategy.
        pl_module: To be pruned.
        config: What to prune and how.
        batches: How many batches of the train dataloader to score on, or the batches themselves.
        loss_fn: `loss_fn(pl_module, batch)` -> scalar, in place of `training_step`.
        eval_mode: Score in eval mode; else the modules stay in the mode they are in.
        show_progress: Show a bar where it takes long.
        on_first_scores: Called with the scores of the first round, by the weight's name.

    Raises:
        MemoryError: The whole weights of a sharded network do not fit on every process.
        ValueError: As `compute_masks`.
    """
    check_memory_on_all_ranks(trainer.strategy, pl_module, advice=_NO_ROOM)
    drawn = scoring_batches(trainer, pl_module, batches, config.resolved.needs)
    objective = TrainingStepObjective(trainer, pl_module, loss_fn, drawn)
    title, rounds = f"pruning by {config.resolved.name}", config.rounds if config.rounds > 1 else None
    shown = progress_shown(trainer, title, verbose=show_progress, total=rounds)

    def on_scores(step: int, scores: Any) -> None:
        if step == 1 and on_first_scores is not None:
            on_first_scores(dict(scores))

    untrained = untrained_parameters(trainer, pl_module)
    with summon_full_params(pl_module), preserve_module_state(pl_module), shown as done:
        for name in untrained:
            pl_module.get_parameter(name).requires_grad_(False)
        config = without_copies(pl_module, config, untrained)
        if eval_mode:
            pl_module.eval()
        return compute_masks(
            pl_module, config, objective, drawn, average=average, on_scores=on_scores,
            on_round=lambda step, steps: done(step),
        )  # fmt: skip


def untrained_parameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
    """Parameters that are frozen or that no optimizer moves, such as those of a target network."""
    moved = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return [n for n, p in pl_module.named_parameters() if not p.requires_grad or (moved and p not in moved)]
