r"""The power law that the first losses of a training follow: the rival that a prediction has to beat.

.. math:: L(t) = L_∞ + a (t + t_0)^{-b}
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_EXPONENTS = torch.logspace(-1.3, 0.5, 37, dtype=torch.float64)  # b
_OFFSETS = torch.logspace(-2, 1.5, 36, dtype=torch.float64)  # t0, in units of the span of the steps


def power_law(steps: Sequence[int] | Tensor, losses: Sequence[float] | Tensor, at: Sequence[int] | Tensor) -> Tensor:
    """Extrapolate a power law that is fitted to observed losses; only those of the beginning should be given.

    Least squares, over a grid of exponents and offsets with the best floor and amplitude of each. The law falls or
    stands still, and is not below 0 where no observed loss is.

    Args:
        steps: [M], of the observed losses.
        losses: [M]; what is not finite is left out.
        at: [K], steps to extrapolate to.

    Returns:
        [K] float64, finite.

    Raises:
        ValueError: No observed loss is finite.

    >>> observed = [1 + 2 * (step + 3) ** -0.5 for step in range(20)]
    >>> round(float(power_law(range(20), observed, [397])[0]), 2)  # 1 + 2 / 20
    1.1
    """
    t, y, ahead = (
        torch.as_tensor(list(x) if isinstance(x, range) else x, dtype=torch.float64) for x in (steps, losses, at)
    )
    t, y = t[y.isfinite()], y[y.isfinite()]
    if not len(y):
        raise ValueError("a power law needs a finite loss")
    first, span = t.min(), (t.max() - t.min()).clamp_min(1.0)
    b, t0 = torch.meshgrid(_EXPONENTS, _OFFSETS * span, indexing="ij")
    shape = ((t - first + t0[..., None]) / t0[..., None]) ** -b[..., None]
    floor, amplitude = _least_squares(shape, y, floor=0.0 if bool((y >= 0).all()) else -torch.inf)
    error = (floor[..., None] + amplitude[..., None] * shape - y).square().sum(-1)
    best = divmod(int(error.argmin()), error.shape[1])
    later = ((ahead - first).clamp_min(0) + t0[best]) / t0[best]
    return floor[best] + amplitude[best] * later ** -b[best]


def _least_squares(shape: Tensor, y: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """L∞ of at least `floor` and a of at least 0 for each shape [..., M] of the law, [...] both."""
    centred = shape - shape.mean(-1, keepdim=True)
    amplitude = ((centred * y).sum(-1) / centred.square().sum(-1).clamp_min(1e-300)).clamp_min(0)
    level = y.mean() - amplitude * shape.mean(-1)
    bound = (shape * (y - floor)).sum(-1) / shape.square().sum(-1) if floor > -torch.inf else amplitude
    below = level < floor
    return torch.where(below, floor, level), torch.where(below, bound.clamp_min(0), amplitude)
