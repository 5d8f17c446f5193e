"""Checks of what a saliency returned, before it decides anything."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_graphon.pruning.methods import Method


def checked_scores(method: Method, scores: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The scores in network order, detached, in one floating dtype wide enough for all of them.

    Raises:
        TypeError: The method returned no mapping.
        ValueError: A score is missing, has another shape, or is not finite.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"method {method.name!r} must return a dict name -> score tensor, got {type(scores).__name__}")
    for name, shape in shapes.items():
        score = scores.get(name)
        if not isinstance(score, Tensor) or score.shape != shape:
            other = "nothing" if score is None else type(score).__name__
            got = f"a tensor of shape {tuple(score.shape)}" if isinstance(score, Tensor) else other
            raise ValueError(f"method {method.name!r} must score {name!r} with shape {tuple(shape)}, got {got}")
    dtype = torch.float32
    for name in shapes:
        dtype = torch.promote_types(dtype, scores[name].dtype if scores[name].is_floating_point() else torch.float64)
    checked = {name: scores[name].detach().to(dtype) for name in shapes}
    for name, score in checked.items():
        low, high = score.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = int((~torch.isfinite(score)).count_nonzero())
            raise ValueError(
                f"{method.name} scores of layer {name!r} are not finite ({bad} of {score.numel()}): check the inputs, "
                "the loss and the initial weights for overflow or NaN"
            )
    return checked


def check_any(method: Method, scores: Mapping[str, Tensor]) -> None:
    """Refuse scores that are zero everywhere.

    Raises:
        ValueError: They are; the message names the first layers.
    """
    if not any(bool(score.any()) for score in scores.values()):
        raise ValueError(
            f"{method.name}: the loss does not depend on the weights: its gradient is zero in every selected layer "
            f"({', '.join(list(scores)[:5])})"
        )
