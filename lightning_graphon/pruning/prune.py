"""`prune`: score, select, repeat."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graphon._checks import check_choice, check_sparsity, nearest
from lightning_graphon.pruning import budgets
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.methods import Method, Problem, get_method
from lightning_graphon.pruning.objective import LossFn, Objective, SupervisedObjective
from lightning_graphon.pruning.schedules import SCHEDULES, kept_after
from lightning_graphon.pruning.select import keep_largest
from lightning_graphon.pruning.targets import Patterns, select_weights
from lightning_graphon.pruning.untouched import untouched

Allocation = str | Mapping[str, float]


class LayerCollapseWarning(UserWarning):
    """A layer kept no weight at all: no signal passes through it."""


@dataclass(frozen=True)
class Plan:
    """What to prune and how; the arguments of `prune`, checked.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that is not allowed; the message names it and the nearest match.
    """

    method: str | Callable[..., dict[str, Tensor]]
    sparsity: float
    allocation: Allocation = "global"
    schedule: str = "exponential"
    steps: int | None = None
    include: Patterns = None
    exclude: Patterns = None
    min_density: float | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        budgets.check_allocation(self.allocation)
        check_choice("schedule", self.schedule, SCHEDULES)
        budgets.floor_counts({}, self.min_density, 0)
        steps = self.steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps must be a whole number of rounds, at least 1, got {steps!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        _check_options(self.resolved, self.options)

    @property
    def resolved(self) -> Method:
        """The registered method."""
        return get_method(self.method)

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return self.steps or self.resolved.steps


def prune(
    model: nn.Module,
    method: str | Callable[..., dict[str, Tensor]],
    *,
    sparsity: float,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    allocation: Allocation = "global",
    schedule: str = "exponential",
    steps: int | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    min_density: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Masks:
    """Find the masks of a sparse network at initialisation; the model itself is left exactly as it was.

    `prune(...).apply_(model)` then zeroes the pruned weights. Exactly round((1 - sparsity) · N) of the N selected
    weights are kept, ties broken by position, and a weight once pruned stays pruned through the rounds.

    Args:
        model: Any module, in the train or eval mode in which it is to be scored.
        method: "random", "magnitude", "snip", "grasp", "synflow", a name given to `register_method`, or a function
            `(problem) -> {name: score}`; larger scores stay.
        sparsity: Fraction of the selected weights to remove, in [0, 1).
        batches: Iterable of (inputs, targets); needed by snip and grasp. SynFlow takes the input's shape from it.
        loss_fn: `loss_fn(outputs, targets)` -> scalar; cross-entropy when None.
        allocation: "global" (one threshold over all layers), "uniform", "er", "erk", or a dict from names or patterns
            to the sparsity of those layers (the others get `sparsity`).
        schedule: "exponential" or "linear" fall of the kept number over the rounds.
        steps: Number of rounds; 1 is one-shot. None: 100 for SynFlow, 1 for the others.
        include: Which weights; see `select_weights`.
        exclude: Which weights not.
        min_density: Least fraction kept in every layer.
        seed: Seed of random methods and of dropout while scoring; the global generators are not touched.
        options: Options of the method, such as {"absolute": True} for grasp.

    Returns:
        Masks, bool tensors on the device of each weight.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range or unknown, nothing is selected, a data method has no batches, the
            loss does not depend on the weights, or a score is not finite (the message names the layer).

    >>> net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    >>> masks = prune(net, "synflow", sparsity=0.9)
    >>> masks.kept
    75
    """
    plan = Plan(
        method,
        sparsity,
        allocation,
        schedule,
        steps,
        include,
        exclude,
        min_density,
        seed,
        dict(options or {}),
    )
    return compute_masks(model, plan, SupervisedObjective(model, loss_fn), list(batches or ()))


def compute_masks(
    model: nn.Module,
    plan: Plan,
    objective: Objective,
    batches: Sequence[Any],
    *,
    average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    on_round: Callable[[int, int], None] = lambda step, steps: None,
) -> Masks:
    """The rounds behind `prune`, for any objective.

    Args:
        model: Any module; left exactly as it was, also when scoring raises.
        plan: What to prune and how.
        objective: Loss and flow of the model.
        batches: What `objective` understands.
        average: Averages a tensor over the processes of a distributed run.
        on_round: Called with (round, rounds) after each one, for progress bars.
    """
    method, weights = plan.resolved, select_weights(model, plan.include, plan.exclude)
    if method.needs == "loss" and not len(batches):
        raise ValueError(f"{method.name} scores weights by the loss on data: give at least one batch (batches=...)")
    shapes = {name: weight.shape for name, weight in weights.items()}
    budget = _Budget.of(model, plan, shapes)
    originals = {name: weight.data for name, weight in weights.items()}
    masks = {name: torch.ones_like(data, dtype=torch.bool) for name, data in originals.items()}
    with untouched(model, plan.seed), torch.enable_grad(), _eager():
        for step in range(1, plan.rounds + 1):
            if step > 1:
                _zero_pruned(weights, originals, masks)
            problem = Problem(model, weights, masks, batches, objective, plan.seed, average)
            scores = _checked_scores(method, method.score(problem, **plan.options), shapes)
            with torch.no_grad():
                masks = _select_among(masks, scores, partial(budget.select, step=step, plan=plan))
            on_round(step, plan.rounds)
    result = Masks(masks)
    _warn_of_collapse(result, plan)
    return result


@dataclass(frozen=True)
class _Budget:
    """Densities and numbers to keep in the end: of all layers together (""), or of each."""

    sizes: Mapping[str, int]
    densities: Mapping[str, float]
    kept: Mapping[str, int]
    floors: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, plan: Plan, shapes: Mapping[str, torch.Size]) -> "_Budget":
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

    def select(self, scores: Mapping[str, Tensor], step: int, plan: Plan) -> dict[str, Tensor]:
        """The masks after round `step`."""
        now = {
            name: kept_after(size, self.densities[name], self.kept[name], step, plan.rounds, plan.schedule)
            for name, size in self.sizes.items()
        }
        if "" in now:
            return budgets.select_globally(scores, now[""], self.floors)
        return {name: keep_largest({name: score}, now[name])[name] for name, score in scores.items()}


@torch.no_grad()
def _zero_pruned(
    weights: Mapping[str, nn.Parameter], originals: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> None:
    """Let the parameters hold the effective weights, in one copy beside the originals."""
    for name, weight in weights.items():
        if weight.data.data_ptr() == originals[name].data_ptr():
            weight.data = originals[name] * masks[name]
        else:
            weight.data.mul_(masks[name])


def _select_among(
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    select: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Select among the weights still kept: once pruned, always pruned."""
    chosen = select(scores)
    # Pruned weights are zero and most saliencies score them lowest; only where that failed is the pass below needed.
    if any(bool((chosen[name] & ~mask).any()) for name, mask in masks.items()):
        chosen = select({name: torch.where(masks[name], score, -torch.inf) for name, score in scores.items()})
    return chosen


def _checked_scores(
    method: Method, scores: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The scores, detached, in network order.

    Raises:
        ValueError: A score is missing, has another shape, or is not finite; or all scores of a data method are zero.
    """
    checked = {}
    for name, shape in shapes.items():
        score = scores.get(name)
        if score is None or score.shape != shape:
            got = "nothing" if score is None else f"a tensor of shape {tuple(score.shape)}"
            raise ValueError(f"method {method.name!r} must score {name!r} with shape {tuple(shape)}, got {got}")
        checked[name] = score.detach()
        low, high = checked[name].aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = int((~torch.isfinite(checked[name])).count_nonzero())
            raise ValueError(
                f"{method.name} scores of layer {name!r} are not finite ({bad} of {score.numel()}): check the inputs, "
                "the loss and the initial weights for overflow or NaN"
            )
    if method.needs == "loss" and not any(bool(s.any()) for s in checked.values()):
        raise ValueError(
            f"{method.name}: the loss does not depend on the weights: its gradient is zero in every selected layer "
            f"({', '.join(list(shapes)[:5])})"
        )
    return checked


def _check_options(method: Method, options: Mapping[str, Any]) -> None:
    allowed = [
        p.name for p in inspect.signature(method.score).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for name in options:
        if name not in allowed:
            hint = nearest(name, allowed) if allowed else "It has none."
            raise TypeError(f"method {method.name!r} has no option {name!r}. {hint}")


def _warn_of_collapse(masks: Masks, plan: Plan) -> None:
    empty = [row["layer"] for row in masks.table() if row["kept"] == 0]
    if empty:
        warnings.warn(
            f"layer collapse: {plan.resolved.name} at sparsity {plan.sparsity} left {len(empty)} of {len(masks)} "
            f"layers without a single weight: {', '.join(empty)}. No signal passes through them. Set min_density "
            "(e.g. 0.01), another allocation (e.g. 'erk') or a lower sparsity.",
            LayerCollapseWarning,
            stacklevel=4,
        )


def _eager() -> AbstractContextManager[Any]:
    """Compiled graphs have no double backward and would recompile for scoring; run them eagerly."""
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()
