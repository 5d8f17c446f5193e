r"""The power law that the first losses of a training follow: the rival that a prediction has to beat.

.. math:: L(t) = L_∞ + a (t + t_0)^{-b}
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked

# Logarithms of the exponent b, 0.05 to 3, and of the offset t0 in units of the span of the steps, 0.01 to 30.
_CENTRE, _WIDTH = (-0.95, -0.6), (2.05, 4.0)
_GRID, _ZOOMS = torch.linspace(-1, 1, 33, dtype=torch.float64), 8  # each grid a third as wide as the one before


@checked
def power_law(steps: Sequence[int] | Tensor, losses: Sequence[float] | Tensor, at: Sequence[int] | Tensor) -> Tensor:
    """Extrapolate a power law that is fitted to observed losses; only those of the beginning should be given.

    Least squares, over ever finer grids of exponents and offsets with the best floor and amplitude of each. The law
    falls or stands still, and is not below 0 where no observed loss is.

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
    first = t.min()
    t, ahead, span = t - first, (ahead - first).clamp_min(0), float((t.max() - first).clamp_min(1.0))
    floor = 0.0 if bool((y >= 0).all()) else -torch.inf
    centre, width = torch.tensor(_CENTRE, dtype=torch.float64), torch.tensor(_WIDTH, dtype=torch.float64)
    for _ in range(_ZOOMS):
        b, t0 = torch.cartesian_prod(*((c + w * _GRID).exp() for c, w in zip(centre, width, strict=True))).T
        shape = (1 + t / (span * t0[:, None])) ** -b[:, None]
        level, amplitude = _least_squares(shape, y, floor)
        error = (level[:, None] + amplitude[:, None] * shape - y).square().sum(1)
        best = int(error.argmin())
        centre, width = torch.stack([b[best], t0[best]]).log(), width / 3
    return level[best] + amplitude[best] * (1 + ahead / (span * t0[best])) ** -b[best]


def _least_squares(shape: Tensor, y: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """L∞ of at least `floor` and a of at least 0 for each shape [G, M] of the law, [G] both."""
    centred = shape - shape.mean(-1, keepdim=True)
    amplitude = ((centred * y).sum(-1) / centred.square().sum(-1).clamp_min(1e-300)).clamp_min(0)
    level = y.mean() - amplitude * shape.mean(-1)
    bound = (shape * (y - floor)).sum(-1) / shape.square().sum(-1) if floor > -torch.inf else amplitude
    below = level < floor
    return torch.where(below, floor, level), torch.where(below, bound.clamp_min(0), amplitude)
