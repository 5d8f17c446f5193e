"""`PruningConfig`: what to prune and how, checked before anything runs."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, get_args

from torch import Tensor

from lightning_graphon._shared.checks import check_choice, check_sparsity, make_plain, nearest, plain
from lightning_graphon._shared.choices import Rescore, Schedule
from lightning_graphon.pruning.allocation import layer_budgets
from lightning_graphon.pruning.allocation.n_m import NMPattern, sparsity_of
from lightning_graphon.pruning.candidates import LayerPatterns, as_patterns
from lightning_graphon.pruning.scoring.registry import Method, get_method

AllocationLike: TypeAlias = str | Mapping[str, float]


@dataclass(frozen=True)
class PruningConfig:
    """What to prune and how; the arguments of `prune`, checked.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that is not allowed; the message suggests the nearest match.
    """

    method: str | Callable[..., Mapping[str, Tensor]]
    sparsity: float
    allocation: AllocationLike = "global"
    schedule: Schedule = "exponential"
    steps: int | None = None
    include: LayerPatterns = None
    exclude: LayerPatterns = None
    min_density: float | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    rescore: Rescore | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("include", "exclude"):  # any sequence, such as OmegaConf's, under one name in checkpoints
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, type)):
                object.__setattr__(self, name, as_patterns(value, name))
        if isinstance(self.allocation, Mapping):
            object.__setattr__(self, "allocation", plain(dict(self.allocation)))
        check_sparsity(self.sparsity)
        # An N:M pattern is text that `check_allocation` does not know.
        if self.pattern is None:
            layer_budgets.check_allocation(self.allocation)
        sparsity_of(self.allocation, self.sparsity)
        check_choice("schedule", self.schedule, get_args(Schedule))
        layer_budgets.floor_counts({}, self.min_density, 0)
        if self.rescore is not None:
            check_choice("rescore", self.rescore, get_args(Rescore))
        steps = self.steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps must be a whole number of rounds, at least 1, got {steps!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options must be a dict of the method's options, got {self.options!r}")
        _check_options(self.resolved, self.options)

    @property
    def resolved(self) -> Method:
        """The registered method."""
        return get_method(self.method)

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        default, pattern = self.resolved.steps, self.pattern
        # More rounds than a group loses weights would leave some of them without any.
        return self.steps or (default if pattern is None else min(default, pattern.group - pattern.keep))

    @property
    def pattern(self) -> NMPattern | None:
        """The pattern that the allocation names, or None."""
        return NMPattern.read(self.allocation)

    def __str__(self) -> str:
        by_layer = " except where given by layer" if isinstance(self.allocation, Mapping) else ""
        return f"{self.resolved.name}, sparsity {self.sparsity}{f' ({self.allocation})' if self.pattern else by_layer}"


# Options of a method are the keyword-only parameters of its scoring function.
def _check_options(method: Method, options: Mapping[str, Any]) -> None:
    allowed = [
        p.name for p in inspect.signature(method.score).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for name in options:
        if name not in allowed:
            hint = nearest(name, allowed) if allowed else "It has none."
            raise TypeError(f"method {method.name!r} has no option {name!r}. {hint}")
