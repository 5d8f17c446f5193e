"""What a monitor of the loss was asked for: what it measures, and who predicts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_graphon._shared.checks import as_kind, check_choice, make_plain
from lightning_graphon.callbacks._module.training_step import ModuleLoss
from lightning_graphon.dynamics import KernelPrediction, OptimizerView, read_optimizer_step

PREDICTORS = ("kernel", "replay", "rehearsal", "sibling")
COPIES = PREDICTORS[1:]
# The name of a predictor's curve among those that are logged.
CURVE_OF = {"rehearsal": "rehearsed", "sibling": "sibling", "replay": "replayed"}


@dataclass(frozen=True)
class Measuring:
    """What is measured, when, and up to which error a prediction holds; as `LossDecayMonitor` documents it."""

    probe_size: int
    pool_size: int
    probe_seed: int
    every_n_steps: int
    tolerance: float

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("probe_size", "every_n_steps", "tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.pool_size < 0:
            raise ValueError(f"pool_size must be 0 or more, got {self.pool_size!r}")


@dataclass(frozen=True)
class Predicting:
    """Who predicts, how far ahead; as `LossDecayMonitor` documents it.

    Raises:
        ValueError: An argument has a value that is not allowed.
    """

    predict: str | Sequence[str] | None = None
    horizon: int | None = None
    batch_orders: int = 2
    taylor_order: int = 1

    def __post_init__(self) -> None:
        make_plain(self)
        for field in fields(self):
            if field.name != "predict":
                as_kind(field.name, getattr(self, field.name), field.type)
        for name in self.named or ():
            check_choice("predict", name, PREDICTORS)
        for name in ("horizon", "batch_orders", "taylor_order"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value!r}")

    @property
    def named(self) -> tuple[str, ...] | None:
        """The predictors that were asked for; None where the optimizer decides."""
        if self.predict is None:
            return None
        return (self.predict,) if isinstance(self.predict, str) else tuple(self.predict)

    def names(self, optimizer: OptimizerView | None, kernel: KernelPrediction, clips: bool) -> tuple[str, ...]:
        """The predictors of a training: theory of the kernel for plain SGD, a replay for all else, and a rehearsal.

        Args:
            optimizer: None where there are several: then there is no theory.
            kernel: One with options of its own is wanted.
            clips: Whether gradients are clipped.
        """
        if self.named is not None:
            return self.named
        if optimizer is None:
            return ("rehearsal",)
        return ("kernel" if kernel != KernelPrediction() or _is_plain(optimizer, clips) else "replay", "rehearsal")

    def identity(self) -> dict[str, Any]:
        """Plain values that a checkpoint and the run that resumes it must share."""
        return {"predict": self.named and list(self.named), "taylor_order": self.taylor_order}


@dataclass(frozen=True)
class Wanted:
    """What a monitor was asked for.

    Attributes:
        kernel: Which kernel predicts.
        predicting: Who predicts, how far ahead.
        measuring: What is measured, and when.
        loss_fn: In place of `training_step`.
        verbose: Whether to say what is predicted.
    """

    kernel: KernelPrediction
    predicting: Predicting
    measuring: Measuring
    loss_fn: ModuleLoss | None = None
    verbose: bool = True


def _is_plain(optimizer: OptimizerView, clips: bool) -> bool:
    """Whether it is gradient descent, with or without momentum, and nothing else."""
    try:
        adaptive = read_optimizer_step(optimizer.optimizer).adaptive
    except ValueError:
        return False
    decays = any(group.get("weight_decay") for group in optimizer.optimizer.param_groups)
    return not (adaptive or decays or clips)
