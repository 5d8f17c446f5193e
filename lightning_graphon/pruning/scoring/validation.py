"""Checks of the scores that a method returned."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_graphon.pruning.lazy_tensors import LazyTensorMapping
from lightning_graphon.pruning.scoring.registry import Method


def checked_scores(method: Method, scores: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> LazyTensorMapping:
    """The scores in network order, detached, in a floating dtype of at least 32 bits; checked on first access.

    Raises:
        TypeError: The method returned no mapping.
        ValueError: A score is missing, has another shape, or is not finite; raised on first access.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"method {method.name!r} must return a dict name -> score tensor, got {type(scores).__name__}")
    unchecked = set(shapes)

    def checked(name: str) -> Tensor:
        # A lazy mapping computes a score at each access, but it is checked only once.
        score = scores[name] if name not in unchecked else _of_shape(method, name, scores.get(name), shapes[name])
        score = score.detach().to(_floating(score.dtype))
        if name in unchecked:
            _check_finite(method, name, score)
        unchecked.discard(name)
        return score

    return LazyTensorMapping(shapes, checked)


def _floating(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype if dtype.is_floating_point else torch.float64)


def _of_shape(method: Method, name: str, score: object, shape: torch.Size) -> Tensor:
    if not isinstance(score, Tensor) or score.shape != shape:
        other = "nothing" if score is None else type(score).__name__
        got = f"a tensor of shape {tuple(score.shape)}" if isinstance(score, Tensor) else other
        raise ValueError(f"method {method.name!r} must score {name!r} with shape {tuple(shape)}, got {got}")
    return score


def _check_finite(method: Method, name: str, score: Tensor) -> None:
    # One sum is faster than a test of each entry: it is finite only if all of them are.
    if torch.isfinite(score.sum()):
        return
    bad = int((~torch.isfinite(score)).count_nonzero())
    if bad:
        raise ValueError(
            f"{method.name} scores of layer {name!r} are not finite ({bad} of {score.numel()}): check the inputs, "
            "the loss and the initial weights for overflow or NaN"
        )


def all_zero(scores: Mapping[str, Tensor]) -> bool:
    """Whether no weight has a score."""
    return not any(bool(score.any()) for score in scores.values())


def check_any(method: Method, scores: Mapping[str, Tensor]) -> None:
    """Raise if all scores are zero.

    Raises:
        ValueError: All are zero; the message names the first layers.
    """
    if all_zero(scores):
        raise ValueError(
            f"{method.name}: the loss does not depend on the weights, or a layer of zeros (a head initialised so) or "
            "of dead units lets nothing through, or gradients underflow (score a float32 copy of a float16 model): "
            f"every score is zero, in all selected layers ({', '.join(list(scores)[:5])})"
        )
