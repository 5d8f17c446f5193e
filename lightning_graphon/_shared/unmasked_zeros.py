"""Warn where a pruned network is given without its masks."""

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

# A padding row of an embedding is a smaller share, and a weight that is zero throughout is an initialisation.
_LEAST_ZERO_SHARE = 0.05
_MOST_NAMED = 3


def warn_of_unmasked_zeros(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> None:
    """Warn where weights look pruned but have no masks.

    A zero weight that is trained contributes to the kernel, a pruned one does not; the two kernels differ by far more
    than the error of either.

    Warns:
        UserWarning: `masks` is None, and more than a twentieth of a matrix, but not all of it, is exactly zero.
    """
    if masks is not None:
        return
    shares = {n: 1 - int(w.count_nonzero()) / w.numel() for n, w in weights.items() if w.ndim > 1 and w.numel()}
    sparse = {name: share for name, share in shares.items() if _LEAST_ZERO_SHARE < share < 1}
    if sparse:
        shown = ", ".join(f"{name!r} ({share:.0%})" for name, share in list(sparse.items())[:_MOST_NAMED])
        more = f" and {len(sparse) - _MOST_NAMED} more" if len(sparse) > _MOST_NAMED else ""
        warnings.warn(
            f"many weights are exactly zero: {shown}{more}. Without masks they count as trainable; if they are pruned, "
            "give masks=..., else masks={}",
            stacklevel=5,
        )


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by qualified name that are trained."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
