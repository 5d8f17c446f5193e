"""Checks of arguments: errors name the value, what is allowed and the nearest match; numbers of numpy are taken."""

import difflib
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np


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
