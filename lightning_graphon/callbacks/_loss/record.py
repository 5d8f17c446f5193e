"""What was measured of a probe's loss during a fit: numbers and a sentence, nothing of the network."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_graphon.metrics import LossDecay

CURVES = ("step", "observed", "predicted", "refreshed")


@dataclass
class LossRecord:
    """Curves of one fit, and how the prediction ended.

    Attributes:
        rows: The numbers of `CURVES` each; NaN where there is no value.
        void_from: Step from which the prediction of the start no longer holds.
        gave_up: Why nothing is predicted.
    """

    rows: list[list[float]] = field(default_factory=list)
    void_from: int | None = None
    gave_up: str | None = None

    @classmethod
    def from_table(cls, table: Tensor, gave_up: str | None) -> "LossRecord":
        """Go on from `table()`."""
        return cls(table.reshape(-1, len(CURVES)).tolist(), gave_up=gave_up)

    @property
    def last_step(self) -> int:
        """Step of the last measurement; -1 before the first."""
        return int(self.rows[-1][0]) if self.rows else -1

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One more measurement."""
        self.rows.append([float(step), *(values.get(name, torch.nan) for name in CURVES[1:])])

    def table(self) -> Tensor:
        """[K, 4], float64."""
        return torch.tensor(self.rows, dtype=torch.float64).reshape(-1, len(CURVES))

    def curves(self) -> dict[str, Tensor]:
        """[K] each, float64."""
        return dict(zip(CURVES, self.table().T, strict=True))

    def by_step(self) -> dict[str, dict[int, float]]:
        """Name -> step -> loss, without the places where there is no value."""
        curves = {name: values.tolist() for name, values in self.curves().items()}
        steps = [int(step) for step in curves.pop("step")]
        return {n: {s: v for s, v in zip(steps, values, strict=True) if v == v} for n, values in curves.items()}

    def metric(self, tolerance: float) -> LossDecay:
        """Agreement of prediction and observation."""
        metric, curves = LossDecay(tolerance, sync_on_compute=False), self.curves()
        made = curves["predicted"].isfinite()
        metric.update(curves["predicted"][made], curves["observed"][made], curves["step"][made])
        return metric
