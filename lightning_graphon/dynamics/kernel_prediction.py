"""Which kernel predicts the loss, and when."""

from dataclasses import dataclass, fields
from typing import Any, get_args

from lightning_graphon._shared.checks import as_kind, check_choice, make_plain
from lightning_graphon._shared.choices import Propagate

# What two runs must have in common for one to go on with the other's prediction.
_IDENTITY = ("ntk", "propagate", "full")


@dataclass(frozen=True)
class KernelPrediction:
    """Which kernel predicts the loss, from when on, and how often it is looked at again.

    Args:
        ntk: "empirical", the network's own kernel, or "graphon", the infinite-width one of its graphons.
        propagate: "energy", "density" or "drift", for the Graphon NTK.
        full: Use the kernel between all pairs of outputs, [N·C, N·C], instead of a Kronecker product for it
            (`kronecker_ntk`): better for networks of few units, and a few milliseconds per step.
        start_step: Optimizer step of the prediction; None: 0 for SGD, 10 for adaptive optimizers.
        refresh_every_n_steps: Compute the kernel anew after every n-th step, measure the loss there and predict ahead;
            None: never.
        change_every_n_steps: Measure at least so often how far the kernel has moved; more often in the beginning.
        change_tolerance: Largest relative change of the kernel under which a prediction holds.

    Raises:
        ValueError: An argument has a value that is not allowed.

    >>> KernelPrediction(refresh_every_n_steps=50).ntk
    'empirical'
    """

    ntk: str = "empirical"
    propagate: Propagate = "energy"
    full: bool = False
    start_step: int | None = None
    refresh_every_n_steps: int | None = None
    change_every_n_steps: int = 200
    change_tolerance: float = 0.5

    def __post_init__(self) -> None:
        make_plain(self)
        for field in fields(self):
            as_kind(field.name, getattr(self, field.name), field.type)
        check_choice("ntk", self.ntk, ("empirical", "graphon"))
        check_choice("propagate", self.propagate, get_args(Propagate))
        for name in ("refresh_every_n_steps", "change_every_n_steps", "change_tolerance"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        if self.start_step is not None and self.start_step < 0:
            raise ValueError(f"start_step must be 0 or more, or None, got {self.start_step!r}")

    def identity(self) -> dict[str, Any]:
        """Plain values that a checkpoint and the run that resumes it must share."""
        return {name: getattr(self, name) for name in _IDENTITY}
