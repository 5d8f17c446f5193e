"""What was measured of a probe's loss during a training: numbers and sentences, nothing of the network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.dynamics.predictors.power_law import power_law

CURVES = ("step", "observed", "predicted", "refreshed", "replayed", "rehearsed", "sibling", "power_law")

_OLD_CURVES = 4  # the first ones, in checkpoints of version 1.0 and before
_OF_POWER_LAW = 20  # observed losses that a power law is fitted to


@dataclass
class LossCurves:
    """Curves of one training, and how the prediction ended.

    Attributes:
        rows: The numbers of `CURVES` for each measurement; NaN where there is no value.
        invalid: First measured step at which the prediction of the start did not hold, and why.
        gave_up: Why nothing is predicted.

    >>> curves = LossCurves()
    >>> curves.add(0, {"observed": 2.0, "predicted": 2.0})
    >>> curves.add(50, {"observed": 1.0, "predicted": 0.5})
    >>> curves.invalid = 50, "it is 50 % off"
    >>> curves.valid_until, curves.invalid_from
    (0, 50)
    """

    rows: list[list[float]] = field(default_factory=list)
    invalid: tuple[int, str] | None = None
    gave_up: str | None = None

    @property
    def last_step(self) -> int:
        """Step of the last measurement; -1 before the first."""
        return int(self.rows[-1][0]) if self.rows else -1

    @property
    def largest(self) -> float:
        """Largest finite observed loss, without its sign; infinity where there is none."""
        return max((abs(row[1]) for row in self.rows if math.isfinite(row[1])), default=math.inf)

    @property
    def invalid_from(self) -> int | None:
        """First measured step at which the prediction of the start did not hold; None where it always did."""
        return None if self.invalid is None else self.invalid[0]

    @property
    def valid_until(self) -> int | None:
        """Last measured step at which it held; None where there is none."""
        end = torch.inf if self.invalid is None else self.invalid[0]
        return max((step for step in self.by_step()["predicted"] if step < end), default=None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One more measurement, or more of the last one."""
        if self.last_step != step:
            self.rows.append([float(step), *[math.nan] * (len(CURVES) - 1)])
        for name in CURVES[1:]:
            self.rows[-1][CURVES.index(name)] = values.get(name, self.rows[-1][CURVES.index(name)])

    def judge(
        self, step: int, values: Mapping[str, float], tolerance: float, band: tuple[float, float] | None = None
    ) -> None:
        """Note the first step at which the prediction of the start does not hold.

        Args:
            step: Of the values.
            values: `observed` and `relative_error`.
            tolerance: Largest relative error of a prediction that holds.
            band: Where the loss was expected; then the error does not matter.
        """
        observed, error = values["observed"], values["relative_error"]
        if self.invalid is not None:
            return
        if not math.isfinite(observed):
            self.invalid = step, f"the observed loss is {observed}"
        elif band is not None and not band[0] <= observed <= band[1]:
            low, high = band
            self.invalid = (
                step,
                f"the loss {observed:.3g} is outside the band of the rehearsals, {low:.3g} to {high:.3g}",
            )
        elif band is None and not error <= tolerance:
            self.invalid = step, f"it is {error:.0%} off (relative_error, at most {tolerance:.0%})"

    def power_law(self, steps: Sequence[int] | None = None) -> dict[int, float]:
        """Step -> loss that the first twenty observed ones let one expect; None: for the later steps."""
        first = self.rows[:_OF_POWER_LAW]
        later = [int(row[0]) for row in self.rows[_OF_POWER_LAW:]] if steps is None else steps
        if len(self.rows) < _OF_POWER_LAW or not later or not any(math.isfinite(row[1]) for row in first):
            return {}
        losses = power_law([int(row[0]) for row in first], [row[1] for row in first], later)
        return dict(zip(later, losses.tolist(), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """`CURVES` by name, [K] each, float64."""
        return dict(zip(CURVES, self._table().T, strict=True))

    def by_step(self) -> dict[str, dict[int, float]]:
        """Name -> step -> loss, without the places where there is no value."""
        curves = {name: values.tolist() for name, values in self.tensors().items()}
        steps = [int(step) for step in curves.pop("step")]
        return {n: {s: v for s, v in zip(steps, values, strict=True) if v == v} for n, values in curves.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings only."""
        return {"rows": self._table(), "invalid": self.invalid and list(self.invalid), "gave_up": self.gave_up}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "LossCurves":
        """The curves of `state_dict()`, to go on with."""
        table = state["rows"]
        if table.ndim != 2 or table.shape[1] not in (_OLD_CURVES, len(CURVES)):
            raise ValueError(f"rows must have {len(CURVES)} columns, got {list(table.shape)}")
        rows = [[*row, *[math.nan] * (len(CURVES) - len(row))] for row in table.tolist()]
        invalid = state["invalid"]
        return cls(rows, invalid and (int(invalid[0]), str(invalid[1])), state["gave_up"])

    def _table(self) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.float64).reshape(-1, len(CURVES))


@checked
def next_multiple(every: int, before: int) -> int:
    """The first multiple of `every` after `before`; a batch may take several steps and come to a later one.

    >>> next_multiple(50, -1), next_multiple(50, 0), next_multiple(50, 120)
    (0, 50, 150)
    """
    return (before // every + 1) * every


@checked
def relative_error(predicted: float, observed: float) -> float:
    """|predicted − observed| / |observed|; 0 where both are equal, infinite where only the observed one is 0.

    >>> relative_error(1.1, 1.0) < 0.11, relative_error(0.0, 0.0), relative_error(1.0, 0.0)
    (True, 0.0, inf)
    """
    if predicted == observed:
        return 0.0
    if math.isinf(observed) and not math.isnan(predicted):
        return math.inf
    return abs(predicted - observed) / abs(observed) if observed else math.inf
