"""All that predictors have said of one training before it, and until when theory is true of it."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_graphon.dynamics.loss_tracker import LossTracker
from lightning_graphon.dynamics.predictors.predicted_loss import PredictedLoss, lazy_until
from lightning_graphon.dynamics.probed_network import UnsupportedTrainingError


@dataclass
class PredictionsAhead:
    """What has been said of the loss of a training before it.

    Attributes:
        predictions: "rehearsal", "replay", "sibling" and "kernel", as far as they were made.
        refused: Name -> why there is no such prediction.
        rates: Learning rates [groups] of each step that was rehearsed.
        seconds: That all of it took.
        lazy_until: First step at which theory leaves the band of the rehearsals; None where it does not, or where there
            are not both.
        masks_move: Step after which masks change first; None where they stay.
    """

    predictions: dict[str, PredictedLoss] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rates: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    lazy_until: int | None = None
    masks_move: int | None = None

    @property
    def steps(self) -> list[int]:
        """That copies predict, ascending."""
        return max((p.steps.tolist() for name, p in self.predictions.items() if name != "kernel"), key=len, default=[])

    @property
    def theory(self) -> PredictedLoss | None:
        """What the linearised network says, where it is known ahead of training."""
        return self.predictions.get("kernel") or self.predictions.get("replay")

    def compare_with_kernel(self, tracker: LossTracker, tolerance: float) -> None:
        """Roll the kernel's prediction out at the rehearsed learning rates, and find how long theory is true."""
        rehearsal, initial = self.predictions.get("rehearsal"), tracker.initial
        if rehearsal is None or initial is None or initial.start != int(rehearsal.steps[0]):
            return
        steps = (rehearsal.steps - initial.start).tolist()
        rates = [[tracker.gradient_scale * rate for rate in step] for step in self.rates[: steps[-1]]]
        with suppress(UnsupportedTrainingError):  # no time, or groups that no longer share a learning rate
            losses = torch.tensor([initial.rolled_out(rates, steps)], dtype=torch.float64)
            self.predictions["kernel"] = PredictedLoss("kernel", rehearsal.steps, losses, 0.0)
        self.find_lazy_until(tolerance)

    def find_lazy_until(self, tolerance: float) -> None:
        """Find how long theory is true of this training."""
        rehearsal, theory = self.predictions.get("rehearsal"), self.theory
        if rehearsal is not None and theory is not None:
            self.lazy_until = lazy_until(theory, rehearsal, tolerance)

    @property
    def until(self) -> int:
        """Last step that is predicted; -1 without any."""
        return max((p.until for p in self.predictions.values() if p.until is not None), default=-1)

    def at(self, step: int) -> dict[str, float]:
        """Name -> loss predicted for a step, where it is."""
        places = ((name, p, p.place(step)) for name, p in self.predictions.items())
        return {name: float(p.mean[i]) for name, p, i in places if i is not None}

    def band(self, step: int, tolerance: float) -> tuple[float, float] | None:
        """Where rehearsals expect the loss at a step; None where they say nothing."""
        rehearsal = self.predictions.get("rehearsal")
        place = None if rehearsal is None else rehearsal.place(step)
        if rehearsal is None or place is None:
            return None
        low, high = (float(end[place]) for end in rehearsal.band(tolerance))
        return low, high

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings only."""
        curves = {name: [p.steps, p.losses, p.cost] for name, p in self.predictions.items()}
        return {
            "curves": curves,
            "refused": dict(self.refused),
            "rates": self.rates,
            "seconds": self.seconds,
            "lazy_until": self.lazy_until,
            "masks_move": self.masks_move,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "PredictionsAhead":
        """What `state_dict()` is of."""
        made = {name: PredictedLoss(name, *values) for name, values in state["curves"].items()}
        own = (dict(state["refused"]), list(state["rates"]), float(state["seconds"]), state["lazy_until"])
        return cls(made, *own, state.get("masks_move"))  # older checkpoints have none
