r"""Dual of activations with a kink at 0: softsign, and ELU, SELU, CELU (`ELULike`).

A kink makes Hermite coefficients decay like a power, so the series fails where the correlation is near 1 or -1. In
polar coordinates :math:`z = s r \cos u`, :math:`z' = s' r \cos(u - θ)` the kinks lie on four rays,
and between them the integrand is smooth:

.. math::
    E[F(z, z')] = \frac{1}{2π} \sum_{\text{4 sectors}} \int du \int_0^\infty F\,r e^{-r^2/2}\,dr .

Both integrals are Gauss-Legendre rules. The squared distance itself is integrated, so that near-duplicates keep their
digits. Pairs of low correlation use the series, which is accurate there and cheaper.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_graphon.ntk.activations.base import HermiteDual
from lightning_graphon.ntk.activations.gaussian import legendre_nodes, safe_sqrt
from lightning_graphon.ntk.activations.piecewise_linear import half_angle

_SERIES_LIMIT = 0.8  # |correlation| up to which 96 terms leave less than 1e-10: 0.8 ** 96 = 5e-10 times a_k² < 1e-2
_RADII = (0.0, 1.0, 3.0, 6.0, 10.0)  # beyond 10 the density r exp(-r²/2) is below 1e-20
_LARGEST = 100.0  # variance, at which the error is 1e-6; it grows fast beyond
_RADIAL, _ANGULAR = 12, 20  # nodes per panel, nodes per sector
_CHUNK = 4096  # pairs at a time: 48 radii each, 1.5 MB per tensor


class KinkedDual(HermiteDual):
    """An elementwise activation that is smooth on both sides of 0 and not at 0; arguments as `HermiteDual`.

    Softsign, centred, against 2-D quadrature: E[φφ'] to 5e-12, 5e-10, 5e-9 and E[φ̇φ̇'] to 2e-11, 4e-9, 4e-8 at
    variances 1, 4, 10; the error grows with the variance, 1e-6 at 100. Pairs with means (`propagate="drift"`) use the
    Hermite series, whose error is up to 1e-4 in E[φφ'] and 5e-3 in E[φ̇φ̇'].

    >>> softsign = KinkedDual(torch.nn.functional.softsign, name="softsign")
    >>> q = torch.ones(1, dtype=torch.float64)
    >>> kappa = softsign.covariance(q, q, q)[0]
    >>> torch.allclose(kappa, softsign.second_moment(q), rtol=1e-10)
    True
    """

    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'], centred."""
        distance, slope = self.squared_distance(qx, qy, qx + qy - 2 * k)
        return 0.5 * (self.second_moment(qx) + self.second_moment(qy) - distance), slope

    def is_accurate(self, q: Tensor) -> bool:
        """Whether the radii are fine enough for how φ bends near 0."""
        return bool(q <= _LARGEST)

    def squared_distance(self, qx: Tensor, qy: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance after the activation and E[φ̇φ̇'], centred."""
        k = 0.5 * (qx + qy - distance)
        # All pairs by the series first; those of high correlation are replaced.
        value, slope = super().covariance(qx, qy, k)
        after = (self.second_moment(qx) + self.second_moment(qy) - 2 * value).clamp_min(0)
        close = (k.abs() > _SERIES_LIMIT * safe_sqrt(qx * qy)).nonzero(as_tuple=True)
        if len(close[0]) == 0:
            return after, slope
        close_pairs = [torch.broadcast_to(t, k.shape)[close] for t in (qx, qy, distance)]
        parts = [self._close_pairs(*chunk) for chunk in zip(*(t.split(_CHUNK) for t in close_pairs), strict=True)]
        exact_after, exact_slope = (torch.cat(p) for p in zip(*parts, strict=True))
        return after.index_put(close, exact_after), slope.index_put(close, exact_slope)

    def _close_pairs(self, qx: Tensor, qy: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """E[(φ - φ')²] and E[φ̇φ̇'] of pairs [K] by quadrature over sectors."""
        theta = 2 * half_angle(qx, qy, distance)
        radii, density = (torch.as_tensor(a).to(qx) for a in legendre_nodes(_RADII, _RADIAL))
        density = density * radii * torch.exp(-0.5 * radii.square())
        left, right = safe_sqrt(qx)[:, None] * radii, safe_sqrt(qy)[:, None] * radii
        after, slope = torch.zeros_like(qx), torch.zeros_like(qx)
        for angle, weight in _rays(theta):
            zx, zy = torch.cos(angle)[:, None] * left, torch.cos(angle - theta)[:, None] * right
            after = after + weight * ((self.forward(zx) - self.forward(zy)).square() @ density)
            slope = slope + weight * ((self.derivative(zx) * self.derivative(zy)) @ density)
        return after, slope


def _rays(theta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Angles and weights, summing to 1, of a rule on the four sectors between the kinks at ±π/2 and θ ± π/2."""
    nodes, weights = legendre_nodes((0.0, 1.0), _ANGULAR)
    right = 0.5 * math.pi
    # Kinks of z lie at u = ±π/2, those of z' at θ ± π/2.
    for start, width in (
        (-right + 0 * theta, theta),
        (theta - right, math.pi - theta),
        (right + 0 * theta, theta),
        (theta + right, math.pi - theta),
    ):
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            yield start + node * width, width * (weight / (2 * math.pi))
