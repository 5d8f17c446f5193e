"""Checks of arguments: errors name the argument, the value, what is allowed and the nearest match."""

import difflib
import inspect
import numbers
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from lightning_graphon._shared.memory import is_out_of_memory

_P = ParamSpec("_P")
_R = TypeVar("_R")
# Torch's words about tensors that do not fit each other, or what is done with them; others are about processes.
_MISFIT = re.compile(r"dtype|shape|size|dim|[Ee]xpect|implemented|supported|index|argument|meta")


def nearest(word: str, allowed: Iterable[str], also: Iterable[str] = ()) -> str:
    """End of an error message: the nearest allowed word if one is close, then all of them.

    The words in `also` are only suggested, not listed.

    >>> nearest("synflwo", ["snip", "synflow"])
    "Did you mean 'synflow'? Allowed: 'snip', 'synflow'."
    """
    options = list(allowed)
    # Reversed, so that of two names that differ in case the first one wins.
    by_lower = {option.lower(): option for option in reversed([*options, *also])}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    hint = f"Did you mean {by_lower[close[0]]!r}? " if close else ""
    shown = ", ".join(repr(option) for option in options[:20])
    more = f" and {len(options) - 20} more" if len(options) > 20 else ""
    return f"{hint}Allowed: {shown}{more}."


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise unless `value` is one of the allowed strings.

    Raises:
        ValueError: `value` is not among them; the message names the nearest.
    """
    options = list(allowed)
    if value not in options:
        raise ValueError(f"unknown {name} {value!r}. {nearest(str(value), options)}")


def check_sparsity(value: object, name: str = "sparsity") -> float:
    """Return `value` as a float, the fraction of weights removed.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is not in [0, 1).
    """
    # `True` is an int in Python, and a sparsity of 1 would remove everything.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r} of type {type(value).__name__}")
    if not 0 <= float(value) < 1:
        percent = f"; for {value} % write {float(value) / 100:g}" if 1 < float(value) < 100 else ""
        raise ValueError(f"{name} is the fraction of weights removed and must lie in [0, 1), got {value!r}{percent}")
    return float(value)


def plain(value: Any) -> Any:
    """Numbers and texts of numpy as Python's own, in dicts and lists too: checkpoints hold nothing else.

    >>> plain({"head": np.float64(0.5)}), plain(np.int64(3))
    ({'head': 0.5}, 3)
    """
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def make_plain(settings: Any) -> None:
    """Do so for the fields of a frozen dataclass, first of all in its `__post_init__`."""
    for name, value in vars(settings).items():
        object.__setattr__(settings, name, plain(value))


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a public function see only arguments of the kinds that it is annotated with.

    Where it takes tensors it may be given numpy arrays, and numpy's numbers where it takes numbers. What tensors must
    hold is up to the function; an error that comes of an empty one, or of one that is not finite, names it.

    Raises:
        TypeError: An argument is of another kind; the message names it.
        ValueError: A tensor has no axes or is on the meta device.

    >>> @checked
    ... def total(values: Tensor, times: int = 1) -> float:
    ...     return times * float(values.sum())
    >>> total(np.ones(3), np.int64(2))
    6.0
    >>> total(None)
    Traceback (most recent call last):
    TypeError: values must be a tensor, got NoneType
    """
    signature = inspect.signature(function)
    kinds = {
        n: p.annotation for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = as_kind(name, value, kinds.get(name))
        try:
            return function(*bound.args, **bound.kwargs)
        except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            if (complaint := _complaint(error, bound.arguments)) is None:
                raise
            raise ArgumentError(f"{complaint}: {error}") from error

    return call


class ArgumentError(ValueError, RuntimeError):
    """Arguments that do not fit; also a RuntimeError, as torch raised it, for code that expects one."""


def _complaint(error: Exception, arguments: Mapping[str, Any]) -> str | None:
    """Which arguments an error comes of, where it does not say so itself and is not about something else."""
    for name, value in arguments.items():
        if (flaw := _flaw(value)) and not re.search(rf"\b{name}\b", str(error)):
            return f"{name} {flaw}"
    raw = type(error) in (RuntimeError, NotImplementedError, IndexError, ZeroDivisionError)
    if not raw or is_out_of_memory(error) or not _MISFIT.search(str(error)):
        return None
    given = [f"{n} ({_described(v)})" for n, v in arguments.items() if n != "self" and v is not None]
    return f"{', '.join(given)} cannot be used together"


def as_tensor(name: str, value: object) -> Tensor:
    """A tensor, or a numpy array as one, that has values and at least one axis."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_described(value)}")
    if value.device.type == "meta" or value.ndim == 0:
        missing = "values, and is on the meta device" if value.ndim else "at least one axis, and has shape ()"
        raise ValueError(f"{name} must have {missing}")
    return value


def as_numbers(name: str, value: object) -> Tensor:
    """`as_tensor` of nested lists of numbers too; float64 unless it was a tensor."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must hold numbers, got {_described(value)}") from None
    return as_tensor(name, value)


def _flaw(value: object) -> str | None:
    """What may be wrong with the values of an argument, or of those in it."""
    if isinstance(value, list | tuple | dict):
        return next(filter(None, map(_flaw, value.values() if isinstance(value, dict) else value)), None)
    if isinstance(value, Tensor) and (value.numel() == 0 or value.is_meta):
        return "is on the meta device" if value.is_meta else "is empty"
    if isinstance(value, Tensor | float) and not torch.as_tensor(value).isfinite().all():
        return "is not finite"
    return None


def as_kind(name: str, value: Any, kind: Any) -> Any:
    """`value` as the annotation `kind` wants it; as it is where that says nothing."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _as_one_of(name, value, inner)
    if origin is Literal:
        origin = tuple({type(allowed) for allowed in inner})
    says_nothing = origin in (Any, inspect.Parameter.empty) or getattr(origin, "_is_runtime_protocol", True) is False
    if says_nothing or not isinstance(origin, type | tuple):
        return value
    return _READERS.get(origin, _as_instance)(name, value, origin, inner)


def _as_one_of(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """The first kind that fits; else the complaint of the one that came closest: about a value, or something inside."""
    if value is None and NoneType in kinds:
        return None
    errors: list[Exception] = []
    for kind in kinds:
        try:
            return as_kind(name, value, kind)
        except (TypeError, ValueError) as error:  # noqa: PERF203
            errors.append(error)
    inside = [e for e in errors if isinstance(e, ValueError) or not str(e).startswith(f"{name} ")]
    raise (inside or [TypeError(f"{name} must be {' or '.join(map(_word, kinds))}, got {_described(value)}")])[0]


def _as_instance(name: str, value: Any, origin: Any, inner: Any) -> Any:
    if not isinstance(value, origin):
        raise TypeError(f"{name} must be {_word(origin)}, got {_described(value)}")
    return value


def _as_int(name: str, value: Any, origin: Any, inner: Any) -> int:
    with suppress(TypeError, RuntimeError):
        return operator.index(value)
    raise TypeError(f"{name} must be an int, got {_described(value)}")


def _as_float(name: str, value: Any, origin: Any, inner: Any) -> Any:
    if not isinstance(value, numbers.Real) and not (isinstance(value, Tensor) and value.ndim == 0):
        raise TypeError(f"{name} must be a number, got {_described(value)}")
    follows = isinstance(value, Tensor) and value.requires_grad  # autograd does
    return float(value) if isinstance(value, np.floating | Tensor) and not follows else value


def _as_mapping(name: str, value: Any, origin: Any, inner: Any) -> Any:
    _as_instance(name, value, Mapping, ())
    if not inner or type(value) is not dict:
        return value
    return {key: as_kind(f"{name}[{key!r}]", entry, inner[1]) for key, entry in value.items()}


def _as_sequence(name: str, value: Any, origin: Any, inner: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, str | Mapping | Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence, got {_described(value)}")
    kept = value if isinstance(value, tuple) else list(value)
    if origin is tuple and ... not in inner and len(kept) != len(inner):
        raise TypeError(f"{name} must have {len(inner)} entries, got {len(kept)}")
    entries = [as_kind(f"{name}[{i}]", entry, inner[0]) for i, entry in enumerate(kept)] if inner else kept
    return tuple(entries) if isinstance(kept, tuple) else entries


_READERS: dict[Any, Callable[[str, Any, Any, Any], Any]] = {
    Tensor: lambda name, value, origin, inner: as_tensor(name, value),
    int: _as_int,
    float: _as_float,
    Mapping: _as_mapping,
    Sequence: _as_sequence,
    Iterable: _as_sequence,
    tuple: _as_sequence,
}

_WORDS = {Tensor: "a tensor", NoneType: "None", Callable: "callable"}


def _word(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(map(_word, kind))
    return str(_WORDS.get(kind) or getattr(kind, "__name__", kind))


def _described(value: object) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
