"""`prune`: score the weights and select those to keep, in rounds."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graphon._shared.choices import Rescore, Schedule
from lightning_graphon._shared.evaluation import uncompiled
from lightning_graphon._shared.module_state import preserve_module_state, preserve_random_state
from lightning_graphon.pruning.allocation.keep_counts import KeepCounts
from lightning_graphon.pruning.allocation.n_m import GroupKeepCounts, sparsity_of
from lightning_graphon.pruning.candidates import LayerPatterns
from lightning_graphon.pruning.config import AllocationLike, PruningConfig
from lightning_graphon.pruning.layer_selection import select_weights
from lightning_graphon.pruning.lazy_tensors import LazyTensorMapping, shapes_of
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.scoring.networks.redrawn import redrawn
from lightning_graphon.pruning.scoring.objective import LossFn, Objective, SupervisedObjective
from lightning_graphon.pruning.scoring.registry import ScoringContext
from lightning_graphon.pruning.scoring.validation import all_zero, check_any, checked_scores
from lightning_graphon.pruning.sharding import is_sharded


class LayerCollapseWarning(UserWarning):
    """No signal passes: a layer has no weight left, or the weights that are left form no path."""


def prune(
    model: nn.Module,
    method: str | Callable[..., Mapping[str, Tensor]],
    *,
    sparsity: float | None = None,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    allocation: AllocationLike = "global",
    schedule: Schedule = "exponential",
    steps: int | None = None,
    include: LayerPatterns = None,
    exclude: LayerPatterns = None,
    min_density: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    rescore: Rescore | None = None,
) -> Masks:
    """Find the masks of a sparse network at initialisation; the model itself is not changed.

    `prune(...).apply_(model)` then zeroes the pruned weights. Exactly round((1 - sparsity) · N) of the N selected
    weights are kept, ties are broken by position, and a pruned weight stays pruned in later rounds (but not of FORCE).

    Args:
        model: Any module; it is scored in its own train or eval mode.
        method: A name of `methods()`, among them "snip" and "synflow", your own (`register_method`) or a function
            `(context) -> {name: score}`; the largest scores are kept.
        sparsity: Fraction of the selected weights to remove, in [0, 1); an N:M allocation gives it by itself.
        batches: Iterable of (inputs, targets); needed by snip, grasp, force, prospr and px. SynFlow reads the
            input's shape from it.
        loss_fn: `loss_fn(outputs, targets)` -> scalar; cross-entropy when None.
        allocation: "global" (one threshold over all layers), "uniform", "er", "erk", a dict from names or patterns
            to the sparsity of those layers (the others get `sparsity`), or "2:4" and other N:M: the N best of every M
            consecutive inputs of a unit (of a convolution: input channels, at each tap).
        schedule: "exponential" or "linear" decrease of the kept number over the rounds.
        steps: Number of rounds; 1 is one-shot. Default: that of the method, 100 for SynFlow and 1 for SNIP; with N:M
            at most M - N.
        include: Weights to prune; see `select_weights`.
        exclude: Weights not to prune.
        min_density: Least fraction kept in every layer.
        seed: Seed of random methods and of dropout while scoring; the global generators are not changed.
        options: Options of the method, such as {"absolute": True} for grasp.
        rescore: "redrawn" scores other weights than those that will train: drawn from the layers' own initialisation
            (`reset_parameters`) by the seed. The masks do not depend on the model's weights then.

    Returns:
        Masks on the devices of the weights.

    Raises:
        TypeError: An argument has the wrong type, or no sparsity is given.
        ValueError: An argument is out of range, unknown or contradicts another, nothing is selected, a data method has
            no batches, the loss does not depend on the weights, or a score is not finite (the message names the layer).

    >>> net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    >>> masks = prune(net, "synflow", sparsity=0.9)
    >>> masks.kept
    75
    """
    options = {} if options is None else options
    wanted = sparsity_of(allocation, sparsity)
    config = PruningConfig(
        method, wanted, allocation, schedule, steps, include, exclude, min_density, seed, options, rescore
    )
    _check_types(model, batches, loss_fn)
    with preserve_random_state(seed):  # a shuffling DataLoader draws from the global generator
        drawn = [] if batches is None else list(batches)
    return compute_masks(model, config, SupervisedObjective(model, loss_fn), drawn)


def _check_types(model: Any, batches: Any, loss_fn: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if batches is not None and (isinstance(batches, (Tensor, str, Mapping)) or not isinstance(batches, Iterable)):
        shown = f"{type(batches).__name__} {batches!r:.80}"
        raise TypeError(f"batches must be an iterable of (inputs, targets) pairs, got {shown}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function loss_fn(outputs, targets) -> scalar, got {loss_fn!r}")


def _check_whole(weights: Mapping[str, Tensor]) -> None:
    sharded = [name for name, weight in weights.items() if is_sharded(weight)]
    if sharded:
        raise ValueError(
            f"prune scores whole weights, but {sharded[0]!r} is a shard (DTensor): prune before fully_shard, or inside "
            "`with lightning_graphon.pruning.summon_full_params(model):` on every process, or use PruneAtInit"
        )


def compute_masks(
    model: nn.Module,
    config: PruningConfig,
    objective: Objective,
    batches: Sequence[Any],
    *,
    average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    on_round: Callable[[int, int], None] = lambda step, steps: None,
    on_scores: Callable[[int, Mapping[str, Tensor]], None] = lambda step, scores: None,
) -> Masks:
    """The rounds of `prune`, for any objective.

    Args:
        model: Any module; not changed, even if scoring raises an error.
        config: What to prune and how.
        objective: Loss and flow of the model.
        batches: Batches of the form that `objective` expects.
        average: Averages a tensor over the processes of a distributed run.
        on_round: Called with (round, rounds) after each round, for progress bars.
        on_scores: Called with (round, scores by name) before the selection.
    """
    method, weights = config.resolved, select_weights(model, config.include, config.exclude)
    if any(weight.is_meta for weight in weights.values()):
        raise ValueError("the model's weights are on the meta device: give them values first (to_empty, or load them)")
    if method.needs in ("loss", "data") and not len(batches):
        by = "the loss on data" if method.needs == "loss" else "the inputs"
        raise ValueError(f"{method.name} scores weights by {by}: give at least one batch (batches=...)")
    _check_whole(weights)
    shapes = {name: weight.shape for name, weight in weights.items()}
    select = partial(_budget(model, config, shapes).select, rounds=config.rounds, schedule=config.schedule)
    originals = {name: weight.data for name, weight in weights.items()}
    # One number per layer: masks need memory only from the first selection on.
    masks = {n: torch.ones((), dtype=torch.bool, device=d.device).expand(d.shape) for n, d in originals.items()}
    zero_since = None
    with preserve_module_state(model, config.seed), torch.enable_grad(), uncompiled(model):
        for step in range(1, config.rounds + 1):
            context = ScoringContext(
                model, weights, masks, batches, objective, 1 - config.sparsity, config.seed, average
            )
            scores = checked_scores(method, _scores(config, context), shapes)
            if step == 1 and method.needs == "loss":
                check_any(method, scores)
            if step > 1 and zero_since is None and all_zero(scores):
                zero_since = step
            on_scores(step, scores)
            with torch.no_grad():
                # No name for what is selected among: it would keep the masks of the round before.
                chosen = _select_among({} if method.revives else masks, scores, partial(select, step=step))
                del scores  # the next round needs their memory
                if step < config.rounds and method.zeroed:
                    _zero_dropped(weights, masks, chosen, first=step == 1)
                masks = chosen
            on_round(step, config.rounds)
    result = Masks(masks)
    _warn_of_collapse(result, config, zero_since)
    return result


def _budget(model: nn.Module, config: PruningConfig, shapes: Mapping[str, torch.Size]) -> KeepCounts | GroupKeepCounts:
    if config.pattern is None:
        return KeepCounts.from_allocation(model, shapes, config.allocation, config.sparsity, config.min_density)
    return GroupKeepCounts.from_pattern(model, config.pattern, shapes, config.min_density)


def _zero_dropped(
    weights: Mapping[str, nn.Parameter], before: Mapping[str, Tensor], now: Mapping[str, Tensor], first: bool
) -> None:
    """Zero the pruned entries of the parameters, in one copy of the weights; the originals are restored later."""
    for name, weight in weights.items():
        if first:
            weight.data = weight.data * now[name]
        else:
            weight.data[before[name] & ~now[name]] = 0


def _scores(config: PruningConfig, context: ScoringContext) -> Mapping[str, Tensor]:
    method = config.resolved
    if config.rescore is None:
        return method.score(context, **config.options)
    with redrawn(context, "weights to rescore") as other:  # the same in every round
        if method.zeroed:
            for name, weight in other.weights.items():
                weight.data.mul_(context.masks[name])
        return method.score(other, **config.options)


def _select_among(
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    select: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Select among the weights still kept, so that a pruned weight stays pruned; among all where no masks are given."""
    chosen = select(scores)
    # Pruned weights are zero and most methods score them lowest. Only where that fails a second selection is needed.
    if any(_any_beyond(chosen[name], mask) for name, mask in masks.items()):
        chosen = select(
            LazyTensorMapping(shapes_of(scores), lambda name: torch.where(masks[name], scores[name], -torch.inf))
        )
    return chosen


def _any_beyond(flags: Tensor, others: Tensor) -> bool:
    """Whether an entry is True where the other is not."""
    if flags.device.type == others.device.type == "cpu":  # where torch takes nine times as long as numpy
        return bool((flags.numpy() > others.numpy()).any())
    return bool((flags & ~others).any())


def _warn_of_collapse(masks: Masks, config: PruningConfig, zero_since: int | None) -> None:
    empty = [row["layer"] for row in masks.table() if row["kept"] == 0]
    if not empty and zero_since is None:
        return
    left = "weights that pass no signal from the inputs to the loss."
    if empty:
        left = f"{len(empty)} of {len(masks)} layers without a single weight: {', '.join(empty)}. Signals pass "
        left += "around them where there are residual connections, and nowhere else."
    if zero_since is not None:
        left += (
            f" Every score was zero from round {zero_since} of {config.rounds} on, so what was left to prune was "
            "chosen by position."
        )
    method = config.resolved.name
    warnings.warn(
        f"layer collapse: {method} at sparsity {config.sparsity} left {left} Set min_density (e.g. 0.01), another "
        "allocation (e.g. 'erk') or a lower sparsity.",
        LayerCollapseWarning,
        stacklevel=4,
    )
