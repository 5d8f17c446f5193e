"""The registry of growth methods, and what a method sees at an update of the masks."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from lightning_graphon._shared.checks import check_choice, nearest
from lightning_graphon._shared.random import generator
from lightning_graphon._shared.weight_layout import WeightLayout

GradientKind: TypeAlias = Literal["nothing", "gradient", "momentum"]
Beginning: TypeAlias = Literal["random", "graphon", "constant fan-in", "dense"]


@dataclass(frozen=True)
class GrowthContext:
    """What a method can use at one update.

    Attributes:
        weights: Name -> whole weight, in network order.
        masks: Name -> bool mask so far, True = kept, on the weight's device.
        gradients: Name -> dense gradient of the step, or its momentum, whole and averaged over processes.
        counts: Name -> number of weights to keep; under "" that of all layers together.
        floors: Name -> least number to keep.
        layouts: Name -> which axes are outputs and inputs.
        fraction: Share of the kept weights to exchange.
        progress: Share of the updates that are done with this one, in (0, 1].
        moves: Whether counts may move between layers.
        seed: Seed of random growth.
        update: Number of this update; with the seed it determines all random numbers.
    """

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    floors: Mapping[str, int] = field(default_factory=dict)
    layouts: Mapping[str, WeightLayout] = field(default_factory=dict)
    fraction: float = 0.3
    progress: float = 1.0
    moves: bool = False
    seed: int = 0
    update: int = 1

    def uniform(self, name: str) -> Tensor:
        """Random numbers in [0, 1) of the weight's shape, float32; drawn on the CPU, so the same for every device."""
        source = generator(self.seed, f"growth of {name} at update {self.update}")
        return torch.rand(self.masks[name].shape, generator=source).to(self.masks[name].device)

    def layout(self, name: str) -> WeightLayout:
        """How the weight is stored; as that of a Linear layer where nobody says."""
        return self.layouts.get(name, WeightLayout())


@dataclass(frozen=True)
class GrowthMethod:
    """A registered growth method; see `register_growth`."""

    name: str
    update: Callable[..., dict[str, Tensor]]
    needs: GradientKind
    begins: Beginning

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise where the method has no option of that name.

        Raises:
            TypeError: It has not; the message suggests the nearest.
        """
        allowed = list(self.defaults)
        for name in options:
            if name not in allowed:
                hint = nearest(name, allowed) if allowed else "It has none."
                raise TypeError(f"growth method {self.name!r} has no option {name!r}. {hint}")

    @property
    def defaults(self) -> dict[str, Any]:
        """Options with their defaults: the keyword-only parameters of its function."""
        parameters = inspect.signature(self.update).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


_METHODS: dict[str, GrowthMethod] = {}
UpdateT = TypeVar("UpdateT", bound=Callable[..., dict[str, Tensor]])


def register_growth(
    name: str, *, needs: GradientKind = "nothing", begins: Beginning = "random"
) -> Callable[[UpdateT], UpdateT]:
    """Decorator that makes a function from a `GrowthContext` to new masks available to `DynamicSparsity` by name.

    Args:
        name: Name of the method.
        needs: What it uses besides weights: the dense "gradient" at the update, its "momentum", or "nothing".
        begins: The masks it begins with unless others are given: "random" ones, those of the method "graphon" with the
            same options, random ones of "constant fan-in", "dense" ones.

    Raises:
        ValueError: The name is taken by another function, or an argument is unknown.

    >>> @register_growth("still")
    ... def still(context):
    ...     return dict(context.masks)
    >>> "still" in growth_methods()
    True
    """
    check_choice("needs", needs, get_args(GradientKind))
    check_choice("begins", begins, get_args(Beginning))

    def register(update: UpdateT) -> UpdateT:
        # The same function may be registered again, as when a notebook cell is run twice.
        known = _METHODS.get(name)
        if known is not None and known.update.__qualname__ != update.__qualname__:
            raise ValueError(f"a growth method {name!r} exists already: {known.update.__qualname__}")
        _METHODS[name] = GrowthMethod(name, update, needs, begins)
        return update

    return register


def growth_methods() -> list[str]:
    """Names of all growth methods, in the order of registration."""
    return list(_METHODS)


def get_growth(name: str) -> GrowthMethod:
    """The growth method of that name.

    Raises:
        ValueError: Unknown name; the message suggests the nearest.
    """
    check_choice("growth method", name, _METHODS)
    return _METHODS[name]
