"""The losses of copies of a training, ahead of it: how many steps of which there is time for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._module.pool import TrainingData
from lightning_graphon.callbacks._module.training_step import ModuleLoss, TrainingStepObjective
from lightning_graphon.callbacks._rehearsal.changed_copies import NetworkPlace, expanded, redrawn
from lightning_graphon.callbacks._rehearsal.rehearse import Change, rehearse_fit
from lightning_graphon.dynamics import PredictedLoss, UnsupportedTrainingError, extrapolate_widths
from lightning_graphon.pruning import Masks

PORTION = 0.5  # of the time budget, for all copies
_WIDTHS = (1 / 4, 1 / 8)  # of siblings, from which the width itself is extrapolated
_COSTS = {"rehearsal": 1.0, "replay": 1.7}  # training steps per step; second derivatives three times as much
_LARGEST_HORIZON = 1000  # steps, where training has no end
_WAIT = 600.0  # seconds that other processes may wait for the one that rehearses


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


@dataclass
class CopiesAhead:
    """What copies of a training say of its loss.

    Attributes:
        predictions: "rehearsal", "replay" and "sibling", as far as they were made.
        refused: Name -> why there is no such prediction.
        rates: Learning rates [groups] of each step that was rehearsed.
        seconds: That all of it took.
    """

    predictions: dict[str, PredictedLoss] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rates: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def until(self) -> int:
        """Last step that is predicted; -1 without any."""
        return max((p.until for p in self.predictions.values() if p.until is not None), default=-1)

    def at(self, step: int) -> dict[str, float]:
        """Name -> loss predicted for a step, where it is."""
        found = {name: (p.steps == step).nonzero().flatten().tolist() for name, p in self.predictions.items()}
        return {name: float(self.predictions[name].mean[i[0]]) for name, i in found.items() if i}

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings only."""
        curves = {name: [p.steps, p.losses, p.cost] for name, p in self.predictions.items()}
        return {"curves": curves, "refused": dict(self.refused), "rates": self.rates, "seconds": self.seconds}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "CopiesAhead":
        """What `state_dict()` is of."""
        made = {name: PredictedLoss(name, *values) for name, values in state["curves"].items()}
        return cls(made, dict(state["refused"]), list(state["rates"]), float(state["seconds"]))


def steps_to_look_at(first: int, last: int, every: int) -> list[int]:
    """Optimizer steps at which copies and training are compared: all at first, then fewer, and each `every`-th.

    >>> steps_to_look_at(0, 20, 10)
    [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 19, 20]
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
        progress: Is told the share of all that is done.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, data: TrainingData, masks: Masks | None,
        budget: TimeBudget, *, loss_fn: ModuleLoss | None, seed: int, progress: Callable[[float], object] | None = None,
    ) -> None:  # fmt: skip
        self._trainer, self._module, self._data, self._masks = trainer, pl_module, data, masks
        self._budget, self._loss_fn, self._seed, self._progress = budget, loss_fn, seed, progress

    def predict(
        self, names: Sequence[str], *, horizon: int | None, every: int, orders: int, taylor_order: int
    ) -> CopiesAhead:
        """Train copies as far as there is time for all of them.

        Args:
            names: "rehearsal", "replay", "sibling".
            horizon: Steps, at most; None: all of training.
            every: Compare after every n-th step at least.
            orders: Of batches, of the rehearsal.
            taylor_order: Of the replay.
        """
        made, start = CopiesAhead(), perf_counter()
        runs = _runs(names, orders, taylor_order)
        first = self._trainer.global_step
        asked = steps_to_look_at(first, first + self._horizon(horizon), every)
        rows: dict[tuple[str, float], list[list[float]]] = {}
        end = start + self._seconds()
        for number, run in enumerate(runs):
            if run.name in made.refused or not asked:
                continue
            now, rest = perf_counter(), sum(other.cost for other in runs[number:])
            seconds = (end - now) * run.cost / rest
            try:
                losses = self._losses(run, asked, seconds, taylor_order, made)
            except UnsupportedTrainingError as error:
                made.refused[run.name] = str(error)
                continue
            rows.setdefault((run.name, run.width), []).append(losses)
            asked = asked[: len(losses)]
            if self._progress is not None:
                self._progress(1 - (rest - run.cost) / sum(other.cost for other in runs))
        steps = torch.tensor(asked, dtype=torch.int64)
        found = {key: torch.tensor([r[: len(asked)] for r in rs]).double() for key, rs in rows.items()}
        for name in dict.fromkeys(name for name, _ in found):
            if name not in made.refused and len(asked) > 1:
                losses = self._combined(name, found)
                made.predictions[name] = PredictedLoss(name, steps, losses, _cost(name, taylor_order))
        made.seconds = perf_counter() - start
        return made

    def _horizon(self, horizon: int | None) -> int:
        planned = self._budget.planned
        most = _LARGEST_HORIZON if math.isinf(planned) else int(planned)
        return most if horizon is None else min(horizon, most)

    def _seconds(self) -> float:
        seconds = self._budget.portion(PORTION)
        return seconds if self._trainer.world_size == 1 else min(seconds, _WAIT)

    def _losses(
        self, run: Run, asked: list[int], seconds: float, taylor_order: int, made: CopiesAhead
    ) -> list[float]:
        first = self._trainer.global_step
        found = rehearse_fit(
            self._trainer, self._module, pool=self._data.drawn, probe=self._data.probe,
            steps=[step - first for step in asked], seed=self._seed + run.order, masks=self._masks,
            change=self._change(run, taylor_order), seconds=seconds, loss_fn=self._loss_fn,
        )  # fmt: skip
        if run.name == "rehearsal":
            made.rates = found.rates
        finite = next((i for i, loss in enumerate(found.losses) if not math.isfinite(loss)), len(found.losses))
        return found.losses[: finite + 1]

    def _change(self, run: Run, taylor_order: int) -> Change | None:
        if run.name == "rehearsal":
            return None
        objective = TrainingStepObjective(self._trainer, self._module, self._loss_fn)
        place = NetworkPlace.of(self._module, objective, self._data.probe)
        if run.name == "replay":
            return expanded(place, taylor_order)
        return redrawn(place, self._masks or {}, width=run.width, seed=self._seed)

    @staticmethod
    def _combined(name: str, found: dict[tuple[str, float], torch.Tensor]) -> torch.Tensor:
        if name != "sibling":
            return found[name, 1.0]
        return extrapolate_widths(*(found[name, width] for width in _WIDTHS), _WIDTHS)


def _runs(names: Sequence[str], orders: int, taylor_order: int) -> list[Run]:
    """What says most first: one order of batches, theory, other orders, siblings."""
    rehearsals = [Run("rehearsal", order, _cost("rehearsal", 1)) for order in range(orders)]
    runs = rehearsals[:1] if "rehearsal" in names else []
    if "replay" in names:
        runs.append(Run("replay", 0, _cost("replay", taylor_order)))
    runs += rehearsals[1:] if "rehearsal" in names else []
    if "sibling" in names:
        runs += [Run("sibling", 0, 2 * width, width) for width in _WIDTHS]
    return runs


def _cost(name: str, taylor_order: int) -> float:
    if name == "sibling":
        return 2 * sum(_WIDTHS)
    return _COSTS[name] * (3 ** (taylor_order - 1) if name == "replay" else 1)
