r"""Bivariate normal probabilities, elementwise on tensors, for kernels with a drift.

Owen's function :math:`T(h, k) = \frac{1}{2\pi}\int_0^k \frac{e^{-h^2(1+x^2)/2}}{1+x^2}dx` (Owen 1956, *Tables
for Computing Bivariate Normal Probabilities*, Ann. Math. Statist. 27) is reduced to :math:`|k| \le 1`, where
24 Gauss-Legendre nodes give about 1e-15 absolute.
"""

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_FAR = 40.0  # standard deviations; beyond it the normal distribution function is 0 or 1 in float64
_TINY = 1e-30


def safe_sqrt(t: Tensor) -> Tensor:
    """Square root with value and gradient 0 where `t <= 0`, where the plain one has NaN or an infinite gradient.

    >>> t = torch.tensor([4.0, 0.0], requires_grad=True)
    >>> safe_sqrt(t).sum().backward()
    >>> t.grad
    tensor([0.2500, 0.0000])
    """
    if not (t.requires_grad and torch.is_grad_enabled()):
        return t.clamp_min(0).sqrt_()
    # Guarded twice: a NaN gradient in the branch that is not taken would survive multiplication by zero.
    positive = t > 0
    return torch.where(positive, torch.where(positive, t, 1.0).sqrt(), 0.0)


@lru_cache(maxsize=32)
def legendre_nodes(edges: tuple[float, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Composite Gauss-Legendre rule on the panels between `edges`, `count` nodes per panel.

    Returns:
        Nodes and weights, float64, each of length `count * (len(edges) - 1)`.
    """
    x, w = np.polynomial.legendre.leggauss(count)
    panels = list(pairwise(edges))
    nodes = [(b - a) / 2 * x + (a + b) / 2 for a, b in panels]
    weights = [(b - a) / 2 * w for a, b in panels]
    return np.concatenate(nodes), np.concatenate(weights)


def determinant(qx: Tensor, qy: Tensor, k: Tensor) -> Tensor:
    """qx qy - k² of a covariance; exactly 0 for equal rows, however large."""
    root = safe_sqrt(qx * qy)
    return (root - k) * (root + k)


def normal_cdf(t: Tensor) -> Tensor:
    """Standard normal distribution function, any shape."""
    return 0.5 * torch.erfc(-t / math.sqrt(2.0))


def normal_pdf(t: Tensor) -> Tensor:
    """Standard normal density, any shape."""
    return torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)


def _owens_t_inner(h: Tensor, k: Tensor) -> Tensor:
    """Owen's T for 0 <= k <= 1."""
    nodes, weights = legendre_nodes((0.0, 1.0), 24)
    total = torch.zeros_like(h)
    half_square = -0.5 * h * h
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        stretch = 1 + (k * node) ** 2
        total += weight * torch.exp(half_square * stretch) / stretch
    return total * k / (2 * math.pi)


def owens_t(h: Tensor, k: Tensor) -> Tensor:
    """Owen's T(h, k) to about 1e-15, float64; arguments broadcast, and `k` may be infinite.

    >>> t = owens_t(torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64))
    >>> [round(v, 10) for v in t.tolist()]
    [0.125, 0.0430646911]
    """
    h, k = torch.broadcast_tensors(h.abs(), k)
    slope = k.abs()
    # Beyond 1 the arguments are exchanged: T(h, k) = (Φ(h) + Φ(hk)) / 2 - Φ(h) Φ(hk) - T(hk, 1/k) for h, k >= 0.
    steep = slope > 1
    flat = torch.where(steep, 1 / slope.clamp_min(1), slope)
    hk = torch.where(steep, (h * slope).nan_to_num(nan=0.0).clamp_max(_FAR), h)
    inner = _owens_t_inner(hk, flat)
    left, right = normal_cdf(h), normal_cdf(hk)
    swapped = 0.5 * (left + right) - left * right - inner
    return torch.sign(k) * torch.where(steep, swapped, inner)


def bivariate_cdf(a: Tensor, b: Tensor, rho: Tensor, one_minus_rho2: Tensor) -> Tensor:
    """P(z < a, z' < b) of two standard normals with correlation `rho`, to about 1e-15; all arguments broadcast.

    1 - ρ² is passed separately so that callers can avoid its cancellation.

    >>> rho = torch.tensor(0.5, dtype=torch.float64)
    >>> round(bivariate_cdf(0 * rho, 0 * rho, rho, 1 - rho**2).item(), 10)
    0.3333333333
    """
    # Owen's formula divides by both bounds; a tiny one stands for zero.
    a, b, rho, slack = torch.broadcast_tensors(a, b, rho, one_minus_rho2)
    a = torch.where(a.abs() < _TINY, _TINY, a.clamp(-_FAR, _FAR))
    b = torch.where(b.abs() < _TINY, _TINY, b.clamp(-_FAR, _FAR))
    root = safe_sqrt(slack).clamp_min(_TINY)
    # Owen's formula subtracts ½ where the bounds have different signs.
    opposite = 0.5 * (torch.sign(a) * torch.sign(b) < 0)
    total = 0.5 * (normal_cdf(a) + normal_cdf(b)) - opposite
    total = total - owens_t(a, _residual(b, a, rho, slack) / (a * root))
    total = total - owens_t(b, _residual(a, b, rho, slack) / (b * root))
    return total.clamp(0.0, 1.0)


def _residual(b: Tensor, a: Tensor, rho: Tensor, slack: Tensor) -> Tensor:
    """b - ρ a, accurate also near |ρ| = 1, where it is divided by sqrt(1 - ρ²)."""
    # ρ = ±1 has lost its distance from ±1 to rounding, so that is computed from 1 - ρ² = (1 - |ρ|)(1 + |ρ|).
    sign = torch.where(rho < 0, -1.0, 1.0).to(rho.dtype)
    return (b - sign * a) + sign * a * slack / (1 + rho.abs())


class NormalPair:
    """Two jointly normal variables z, z' with any means, elementwise; moments of their positive parts.

    Args:
        mx: Mean of z, float64; all arguments broadcast.
        my: Mean of z'.
        qx: Variance of z, at least 0.
        qy: Variance of z'.
        k: Covariance of the two.
    """

    def __init__(self, mx: Tensor, my: Tensor, qx: Tensor, qy: Tensor, k: Tensor) -> None:
        self.mx, self.my = mx, my
        self.sx, self.sy, self.k = safe_sqrt(qx), safe_sqrt(qy), k
        scale = (self.sx * self.sy).clamp_min(_TINY)
        self.rho = (k / scale).clamp(-1.0, 1.0)
        # 1 - ρ² as a product: the difference of squares would cancel near |ρ| = 1.
        self.slack = ((scale - k) * (scale + k) / (scale * scale)).clamp(0.0, 1.0)

    def above(self, t: float, u: float) -> Tensor:
        """P(z > t, z' > u)."""
        return bivariate_cdf(*self._standard(t, u), self.rho, self.slack)

    def positive_parts(self, t: float, u: float) -> Tensor:
        """E[(z - t)₊ (z' - u)₊], by the first two moments of a truncated normal pair (Rosenbaum 1961)."""
        a, b = self._standard(t, u)
        mx, my = self.mx - t, self.my - u
        root = safe_sqrt(self.slack).clamp_min(_TINY)
        both = (mx * my + self.k) * bivariate_cdf(a, b, self.rho, self.slack)
        rest_x, rest_y = (_residual(*pair, self.rho, self.slack) / root for pair in ((a, b), (b, a)))
        # Boundary terms of integration by parts at each threshold, and at the corner where both meet.
        edge_y = mx * self.sy * normal_pdf(b) * normal_cdf(rest_x)
        edge_x = my * self.sx * normal_pdf(a) * normal_cdf(rest_y)
        exponent = 0.5 * (a * a + rest_y**2)
        corner = self.sx * self.sy * safe_sqrt(self.slack) * torch.exp(-exponent) / (2 * math.pi)
        return both + edge_x + edge_y + corner

    def _standard(self, t: float, u: float) -> tuple[Tensor, Tensor]:
        return _standardise(self.mx - t, self.sx), _standardise(self.my - u, self.sy)


def _standardise(mean: Tensor, scale: Tensor) -> Tensor:
    return (mean / scale.clamp_min(_TINY)).clamp(-_FAR, _FAR)


def positive_part(m: Tensor, q: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """E[(z - t)₊] and P(z > t) of normal variables with means `m` and variances `q`, float64.

    >>> mean, above = positive_part(torch.zeros(1).double(), torch.ones(1).double(), 0.0)
    >>> round(mean.item(), 6), above.item()
    (0.398942, 0.5)
    """
    scale = safe_sqrt(q)
    a = _standardise(m - t, scale)
    above = normal_cdf(a)
    return (m - t) * above + scale * normal_pdf(a), above
