"""The losses of copies of a training, ahead of it: how many steps of which there is time for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_graphon.callbacks._analysis.masks_in_use import first_update, planned_updates
from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._analysis.wanted import Predicting
from lightning_graphon.callbacks._distributed.first_process import OtherProcessesNeededError
from lightning_graphon.callbacks._module.pool import TrainingData
from lightning_graphon.callbacks._module.probe import samples, training_batch_size
from lightning_graphon.callbacks._module.training_step import ModuleLoss, TrainingStepObjective
from lightning_graphon.callbacks._rehearsal.changed_copies import NetworkPlace, expanded, redrawn
from lightning_graphon.callbacks._rehearsal.rehearse import Change, rehearse_fit
from lightning_graphon.dynamics import (
    PredictedLoss,
    PredictionsAhead,
    UnsupportedTrainingError,
    extrapolate_widths,
    linearize,
)
from lightning_graphon.pruning import Masks

_PORTION = 0.6  # of the time budget, for all copies
_AT_FIRST = 1.0  # seconds that the first of them may take in any case, or two fifths of all: a nested fit has to begin
_WIDTHS = (1 / 4, 1 / 8)  # of siblings, from which the width itself is extrapolated
# Draws of each width: one of a narrow network is far from their mean. With few kept inputs no limit is near.
_NARROW, _SAME, _FEWEST = {1 / 4: 2, 1 / 8: 4}, {1.0: 2}, 8.0
_NO_TIME = "time_budget leaves no time for a step"
_LARGEST_HORIZON = 1000  # steps, where training has no end
_WAIT = 300.0  # seconds that other processes may wait for the one that rehearses: half of what NCCL allows


@dataclass(frozen=True)
class Run:
    """One copy that trains.

    Attributes:
        name: Of the prediction that it is part of.
        order: Number of its order of batches.
        cost: Of a step, in training steps.
        width: Of a sibling, over that of the network.
    """

    name: str
    order: int
    cost: float
    width: float = 1.0


def steps_to_look_at(first: int, last: int, every: int) -> list[int]:
    """Optimizer steps at which copies and training are compared: all at first, then fewer, and each `every`-th.

    >>> steps_to_look_at(0, 20, 10)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 20]
    """
    steps, step = {first, last}, 0
    while first + step < last:
        steps.add(first + step)
        step += max(1, step // 4)
    return sorted(steps | set(range(first + -first % every, last + 1, every)))


class CopyTrainer:
    """Trains copies of a module ahead of its own training.

    Args:
        trainer: Fits the module.
        pl_module: The module.
        data: What is measured and what pushes.
        masks: In force.
        budget: Says how long all copies together may take.
        loss_fn: In place of `training_step`, for the probe.
        seed: Of the orders of batches.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, data: TrainingData, masks: Masks | None,
        budget: TimeBudget, *, loss_fn: ModuleLoss | None, seed: int,
    ) -> None:  # fmt: skip
        self._trainer, self._module, self._data, self._masks = trainer, pl_module, data, masks
        self._budget, self._loss_fn, self._seed = budget, loss_fn, seed
        self._moving = planned_updates(trainer, pl_module)
        self._objective = TrainingStepObjective(trainer, pl_module, loss_fn, alone=True)

    def predict(self, names: Sequence[str], options: Predicting, every: int) -> PredictionsAhead:
        """Train copies as far as there is time for all of them.

        Args:
            names: "rehearsal", "replay", "sibling".
            options: How far, in how many orders of batches.
            every: Compare after every n-th step at least.
        """
        horizon, orders, taylor_order = options.horizon, options.batch_orders, options.taylor_order
        first, moves = self._trainer.global_step, first_update(self._trainer, self._module)
        made = PredictionsAhead(masks_move=moves)
        runs = _runs(names, orders, taylor_order, self._widths())
        asked = steps_to_look_at(first, first + self._horizon(horizon), every)
        if "replay" in names:
            linearize(torch.nn.Identity())  # torch loads derivatives for half a second, once in a process
        if self._budget.step_seconds is None:
            self._estimate_step()
        rows: dict[tuple[str, float], list[list[float]]] = {}
        start = perf_counter()
        end = start + self._seconds()
        for number, run in enumerate(runs):
            if run.name in made.refused:
                continue
            left = end - perf_counter()
            seconds = left * run.cost / sum(other.cost for other in runs[number:])
            if not rows:
                seconds = max(seconds, min(_AT_FIRST, 0.4 * left))
            try:
                # A network that is drawn from graphons has no weights to exchange.
                until = math.inf if moves is None or run.name != "sibling" else moves
                losses = self._losses(run, [s for s in asked if s < until], seconds, taylor_order, made)
                if len(losses) < 2:
                    raise UnsupportedTrainingError(_NO_TIME)
            except (UnsupportedTrainingError, OtherProcessesNeededError) as error:
                if isinstance(error, OtherProcessesNeededError) and self._loss_fn is None:
                    raise  # nor can the loss be measured
                made.refused[run.name] = str(error)
                if str(error) == _NO_TIME and not rows:  # nor is there any for others, which take as long
                    made.refused.update((name, _NO_TIME) for name in names)
                continue
            rows.setdefault((run.name, run.width), []).append(losses)
            asked = asked[: len(losses)] if len(rows) == 1 else asked  # no other need go farther than the first
        for name in dict.fromkeys(name for name, _ in rows):
            if name not in made.refused:
                curves = _curves(name, rows)
                cost = sum(run.cost for run in runs if run.name == name) / len(curves)
                steps = torch.tensor(asked[: curves.shape[1]], dtype=torch.int64)
                made.predictions[name] = PredictedLoss(name, steps, curves, cost)
        made.seconds = perf_counter() - start
        return made

    def _horizon(self, horizon: int | None) -> int:
        planned = self._budget.planned
        most = _LARGEST_HORIZON if math.isinf(planned) else int(planned)
        return most if horizon is None else min(horizon, most)

    def _estimate_step(self) -> None:
        """Tell the budget how long a step takes, which nobody has measured yet."""
        self._objective.observed(self._data.probe)  # the first pass takes longer
        start, probe = perf_counter(), max(1, samples(self._data.probe))
        self._objective.observed(self._data.probe)
        self._budget.estimate_step((perf_counter() - start) * (training_batch_size(self._trainer) or probe) / probe)

    @cached_property
    def _place(self) -> NetworkPlace:
        """Where the network is, for which `training_step` has to run some times."""
        return NetworkPlace.of(self._module, self._objective, self._data.probe)

    def _widths(self) -> dict[float, int]:
        """Width of siblings -> draws: narrow ones where their units still have some inputs, else of the same width."""
        masks: Mapping[str, torch.Tensor] = self._masks or {}
        layers = [
            m for m in self._module.named_modules() if isinstance(m[1], nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ]
        inputs = [
            float((masks[f"{name}.weight"] != 0).sum() / len(layer.weight))
            if f"{name}.weight" in masks
            else float(layer.weight[0].numel())
            for name, layer in layers[1:]  # the network's own inputs stay
        ]
        return _NARROW if min(inputs, default=0.0) * min(_WIDTHS) >= _FEWEST else _SAME

    def _seconds(self) -> float:
        seconds = self._budget.portion(_PORTION)
        return seconds if self._trainer.world_size == 1 else min(seconds, _WAIT)

    def _losses(
        self, run: Run, asked: list[int], seconds: float, taylor_order: int, made: PredictionsAhead
    ) -> list[float]:
        first = self._trainer.global_step
        found = rehearse_fit(
            self._trainer, self._module, pool=self._data.drawn, probe=self._data.probe,
            others=self._data.measured if self._data.share else (), share=self._data.share,
            steps=[step - first for step in asked], seed=self._seed + run.order, masks=self._masks,
            moving=self._moving if run.name != "sibling" else (), change=self._change(run, taylor_order),
            seconds=seconds, loss_fn=self._loss_fn,
        )  # fmt: skip
        if run.name == "rehearsal":
            made.rates = found.rates
        finite = next((i for i, loss in enumerate(found.losses) if not math.isfinite(loss)), len(found.losses))
        return found.losses[: finite + 1]

    def _change(self, run: Run, taylor_order: int) -> Change | None:
        if run.name == "rehearsal":
            return None
        if run.name == "replay":
            return expanded(self._place, taylor_order)
        if self._trainer.gradient_clip_val:
            raise UnsupportedTrainingError("gradients are clipped, at a norm that is another one at another width")
        return redrawn(self._place, self._masks or {}, width=run.width, seed=self._seed + run.order)


def _curves(name: str, rows: Mapping[tuple[str, float], list[list[float]]]) -> torch.Tensor:
    """[orders, steps], as far as all copies of a prediction went."""
    own = {width: losses for (other, width), losses in rows.items() if other == name}
    count = min(len(losses) for curves in own.values() for losses in curves)
    curves = {width: torch.tensor([c[:count] for c in own[width]], dtype=torch.float64) for width in own}
    if name != "sibling":
        return curves[1.0]
    mean = {width: drawn.clamp_min(0).log().mean(0, keepdim=True).exp() for width, drawn in curves.items()}
    if 1.0 in mean:
        return mean[1.0]
    wide, narrow = (mean[width] for width in _WIDTHS)
    return extrapolate_widths(wide, narrow, _WIDTHS)


def _runs(names: Sequence[str], orders: int, taylor_order: int, widths: Mapping[float, int]) -> list[Run]:
    """What says most first: one order of batches, theory, other orders, siblings."""
    rehearsals = [Run("rehearsal", order, 1.0) for order in range(orders)]
    runs = rehearsals[:1] if "rehearsal" in names else []
    if "replay" in names:
        runs.append(Run("replay", 0, 1.7 * 2.5 ** (taylor_order - 1)))
    runs += rehearsals[1:] if "rehearsal" in names else []
    if "sibling" in names:
        # Small networks cost more than their share of units.
        runs += [Run("sibling", d, min(1.0, 2 * w), w) for w, draws in widths.items() for d in range(draws)]
    return runs
