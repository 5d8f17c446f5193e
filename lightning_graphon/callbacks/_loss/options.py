"""What a user of `LossDecayMonitor` chose."""

from dataclasses import dataclass
from typing import Any, get_args

from lightning_graphon._shared.checks import check_choice
from lightning_graphon._shared.choices import Propagate

# What two runs must have in common for one to go on with the other's prediction.
_IDENTITY = ("kernel", "propagate", "full_kernel", "probe_size", "probe_seed")

_POSITIVE = (
    "probe_size", "every_n_steps", "drift_every_n_steps", "refresh_every_n_steps", "tolerance", "drift_tolerance",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The monitor's arguments, as it documents them.

    Raises:
        ValueError: One has a value that is not allowed.
    """

    kernel: str
    propagate: Propagate
    probe_size: int
    probe_seed: int
    every_n_steps: int
    drift_every_n_steps: int
    refresh_every_n_steps: int | None
    start_step: int | None
    tolerance: float
    drift_tolerance: float
    full_kernel: bool

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, ("empirical", "graphon"))
        check_choice("propagate", self.propagate, get_args(Propagate))
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        if self.start_step is not None and self.start_step < 0:
            raise ValueError(f"start_step must be 0 or more, or None, got {self.start_step!r}")

    def identity(self) -> dict[str, Any]:
        """Plain values that a checkpoint and the run that resumes it must share."""
        return {name: getattr(self, name) for name in _IDENTITY}
