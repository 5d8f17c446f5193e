"""Masks that somebody has found already, in place of a method that finds them."""

import inspect
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, TypeAlias

from torch import Tensor

from lightning_graphon.pruning.masks import Masks

GivenMasks: TypeAlias = Mapping[str, Tensor] | str | PathLike[str]
_BESIDE_MASKS = ("self", "masks", "verbose", "rescale")


def as_masks(masks: GivenMasks) -> Masks:
    """Masks from a mapping, or from a file that `Masks.save` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: Neither a mapping nor a path, or a value is no bool tensor.
        ValueError: The file holds something else, or there is no mask.
    """
    if isinstance(masks, (str, PathLike)):
        found = Masks.load(masks)
    elif isinstance(masks, Mapping):
        found = masks if isinstance(masks, Masks) else Masks(masks)
    else:
        raise TypeError(f"masks must be Masks, a dict of bool tensors or the path of a file, got {masks!r:.80}")
    if not found:
        raise ValueError("masks has no mask in it: give one bool tensor for each weight to prune, by parameter name")
    return found


def refuse_beside_masks(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that say how masks are to be found, where they are given.

    Raises:
        TypeError: One of them differs from its default; the message names it.
    """
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    others = [n for n, default in defaults.items() if n not in _BESIDE_MASKS and arguments[n] != default]
    if others:
        raise TypeError(f"masks are given, so nothing is scored: leave out {', '.join(others)}, or masks")
