"""Random generators, and what objects, functions and classes use: where generators may be."""

import random
import sys
import types
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch

Restore = Callable[[], object]
_LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_graphon"}
_LEFT_ALONE = {"torch", "numpy", *_LIGHTNING, *sys.stdlib_module_names}


def generator_restorer(value: Any) -> Restore | None:
    """What puts a random generator of torch, numpy or python back into its present state; None for anything else."""
    value = getattr(value, "bit_generator", value) if package_of(type(value)) == "numpy" else value
    if isinstance(value, random.Random):
        return None if isinstance(value, random.SystemRandom) else partial(value.setstate, value.getstate())
    if isinstance(value, torch.Generator) or type(value).__name__ == "RandomState":
        return partial(value.set_state, value.get_state())
    if hasattr(type(value), "random_raw"):  # a bit generator of numpy
        return partial(setattr, value, "state", value.state)
    return None


def used_by_function(function: types.FunctionType) -> list[Any]:
    """What a function holds in its closure and defaults, and the generators and functions that it names."""
    if function.__module__ is None or function.__module__.partition(".")[0] in _LEFT_ALONE:
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    named = [function.__globals__.get(name) for name in _names(function.__code__)]
    near = [
        value
        for value in named
        if (isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__)
        or generator_restorer(value) is not None
    ]
    return [*cells, *(function.__defaults__ or ()), *near]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def used_by_class(cls: type) -> list[Any]:
    """Attributes and methods of the class itself, as far as a user has written it."""
    return [getattr(value, "__func__", value) for c in _written(cls) for value in vars(c).values()]


def slots_of(cls: type) -> list[str]:
    """Names of the slots that a user's class declares."""
    declared = [vars(c).get("__slots__", ()) for c in _written(cls)]
    names = [name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots)]
    return [name for name in names if not name.startswith("__")]


def _written(cls: type) -> list[Any]:
    """The class and its bases as far as a user has written them."""
    bases: tuple[Any, ...] = cls.__mro__
    return [base for base in bases if not _is_installed(base)]


@lru_cache(512)
def _is_installed(cls: type) -> bool:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    return package_of(cls) in _LEFT_ALONE or "site-packages" in file or "dist-packages" in file


def is_left_alone(cls: type) -> bool:
    """Whether objects of a class look after themselves: of torch, Lightning, the standard library."""
    return package_of(cls) in _LEFT_ALONE or any(package_of(base) in _LIGHTNING for base in cls.__mro__)


def package_of(cls: type) -> str:
    """Name of the package that a class is from."""
    return cls.__module__.partition(".")[0]
