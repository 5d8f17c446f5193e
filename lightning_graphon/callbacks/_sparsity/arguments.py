"""Arguments of `DynamicSparsity` that do not go together."""

import inspect
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from lightning_graphon._shared.checks import check_choice
from lightning_graphon.pruning import Masks, as_masks, methods


def check_allocation(allocation: object, begins: str) -> None:
    """Refuse budgets that updates cannot keep."""
    if isinstance(allocation, str) and ":" in allocation:
        raise ValueError(f"allocation {allocation!r}: masks that change keep no N:M pattern; PruneAtInit does")
    if begins == "constant fan-in" and allocation == "global":
        raise ValueError("allocation 'global' has no counts of layers, from which a constant fan-in comes: use 'erk'")


def given_masks(start: Any) -> Masks:
    """Masks, or those of a file, unless a text is a method that does not exist."""
    if isinstance(start, str) and not start.endswith((".pt", ".pth", ".ckpt")) and "/" not in start:
        check_choice("pruning method to start with", start, methods())
    if not isinstance(start, (str, PathLike, Mapping)):
        raise TypeError(f"start must be a method of prune, masks, or the path of a file of masks, got {start!r:.80}")
    return as_masks(start)


def refuse_beside_masks(arguments: Mapping[str, Any], init: Callable[..., None]) -> None:
    """Refuse arguments that say how masks are to be found, where they are given."""
    beside = (
        "sparsity",
        "allocation",
        "include",
        "exclude",
        "min_density",
        "batches",
        "loss_fn",
        "eval_mode",
        "rescore",
    )
    defaults = {name: p.default for name, p in inspect.signature(init).parameters.items()}
    others = [name for name in beside if arguments[name] != defaults[name]]
    if others:
        raise TypeError(f"masks are given to start with: leave out {', '.join(others)}, or the masks")
