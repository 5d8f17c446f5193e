"""`GrowthConfig`: how masks change during training, checked before anything runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_graphon._shared.checks import make_plain
from lightning_graphon.pruning.growth.registry import GradientKind, GrowthMethod, get_growth
from lightning_graphon.pruning.growth.schedule import GrowthSchedule

_TAIL = 3  # time constants after which a gradient no longer matters to its average: e^-3 = 5 %


@dataclass(frozen=True)
class GrowthConfig:
    """How masks change: the arguments of `DynamicSparsity` that say so, checked.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that is not allowed; the message suggests the nearest match.
    """

    method: str
    every_n_steps: int = 100
    fraction: float = 0.3
    stop: float | int = 0.75
    redistribute: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make_plain(self)
        _check_whole("every_n_steps", self.every_n_steps)
        _check_share("fraction", self.fraction)
        if isinstance(self.stop, int):
            _check_whole("stop", self.stop)
        else:
            _check_share("stop", self.stop)
        if not isinstance(self.redistribute, bool):
            raise TypeError(f"redistribute must be True or False, got {self.redistribute!r}")
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options must be a dict of the method's options, got {self.options!r}")
        self.resolved.check_options(self.options)
        if self.redistribute and self.resolved.begins not in ("random", "graphon"):
            raise ValueError(f"redistribute=True does not go with {self.method!r}, which has counts of its own")

    @property
    def resolved(self) -> GrowthMethod:
        """The registered method."""
        return get_growth(self.method)

    @property
    def needs(self) -> GradientKind:
        """Which gradients an update needs."""
        needs = self.resolved.needs
        return "gradient" if self.redistribute and needs == "nothing" else needs

    @property
    def momentum(self) -> float:
        """Weight of a gradient relative to that of the step after it."""
        return float({**self.resolved.defaults, **self.options}.get("momentum", 0.0))

    @property
    def window(self) -> int:
        """How many of the steps up to an update have gradients that it needs."""
        if self.needs != "momentum":
            return int(self.needs == "gradient")
        steps = math.ceil(round(_TAIL / max(1 - self.momentum, 1e-9), 6))
        return min(self.every_n_steps, steps)

    def schedule(self, steps: float) -> GrowthSchedule:
        """The schedule of a training of so many steps.

        Raises:
            ValueError: `stop` is a share of a number of steps that nobody knows, or no update comes before it.
        """
        if not isinstance(self.stop, int) and not math.isfinite(steps):
            raise ValueError(f"stop={self.stop} is a share of steps whose number is unknown: give a number of steps")
        last = self.stop if isinstance(self.stop, int) else round(self.stop * steps)
        schedule = GrowthSchedule(self.every_n_steps, self.fraction, last)
        if not schedule.updates and self.resolved.begins == "dense":
            raise ValueError(
                f"{self.method} would never prune: no multiple of every_n_steps={self.every_n_steps} is below {last}, "
                f"where stop={self.stop} ends them"
            )
        return schedule


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of steps, at least 1, got {value!r}")


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1], got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")
