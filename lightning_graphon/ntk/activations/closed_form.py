"""Closed-form dual activations: erf, GELU, sin, cos, exp, square, Gaussian (Williams 1997; Tsuchida 2021)."""

import math

import torch
from torch import Tensor

from lightning_graphon.ntk.activations.base import DualActivation
from lightning_graphon.ntk.activations.gaussian import determinant, safe_sqrt


class Erf(DualActivation):
    """φ(z) = erf(z): the arcsine kernel (Williams 1997).

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> round(Erf().covariance(one, one, 0 * one)[0].item(), 12)
    0.0
    """

    name = "erf"

    def forward(self, z: Tensor) -> Tensor:
        """The activation, elementwise."""
        return torch.erf(z)

    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'], centred."""
        # arcsin(2k / √((1 + 2q)(1 + 2q'))), as an arctangent of the determinant: exact for equal rows.
        root = safe_sqrt(1 + 2 * (qx + qy) + 4 * determinant(qx, qy, k))
        return 2 / math.pi * torch.atan2(2 * k, root), 4 / math.pi / root


class GELU(DualActivation):
    """φ(z) = z Φ(z), Φ the normal distribution function (Tsuchida et al. 2021); not the tanh approximation.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> round(GELU().covariance(one, one, one)[0].item(), 6)
    0.425221
    """

    name = "gelu"

    def forward(self, z: Tensor) -> Tensor:
        """The activation, elementwise."""
        return torch.nn.functional.gelu(z)

    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'], centred."""
        outer, product, k2 = (1 + qx) * (1 + qy), qx * qy, k * k
        inner = 1 + qx + qy + determinant(qx, qy, k)  # (1 + q)(1 + q') - k² without its cancellation
        root = safe_sqrt(inner)
        angle = torch.atan2(k, root)
        value = (k2 + product * inner) / (outer * root) + k * angle
        slope = k / root * ((3 + qx + qy + k2 / inner) / outer) + angle
        return value / (2 * math.pi) + k / 4, slope / (2 * math.pi) + 0.25


class Sin(DualActivation):
    """φ(z) = sin(frequency · z + phase); `Sin(phase=π/2)` is the cosine.

    Args:
        frequency: Angular frequency.
        phase: Phase in radians.
        name: Name in messages.

    >>> zero = torch.zeros(1, dtype=torch.float64)
    >>> [v.item() for v in Sin().covariance(zero, zero, zero)]
    [0.0, 1.0]
    """

    def __init__(self, frequency: float = 1.0, phase: float = 0.0, name: str = "sin") -> None:
        self.frequency, self.phase, self.name = frequency, phase, name

    def forward(self, z: Tensor) -> Tensor:
        """The activation, elementwise."""
        return torch.sin(self.frequency * z + self.phase)

    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'], centred."""
        square, turn = self.frequency**2, math.cos(2 * self.phase)
        near = torch.exp(-0.5 * square * (qx + qy - 2 * k))
        far = torch.exp(-0.5 * square * (qx + qy + 2 * k))
        # near - far by expm1 from the larger of the two, so that small variances keep their digits.
        above, below = torch.where(k > 0, k, 0), torch.where(k > 0, 0, k)
        difference = torch.where(k > 0, -near * torch.expm1(-2 * square * above), far * torch.expm1(2 * square * below))
        return 0.5 * ((1 - turn) * near + turn * difference), 0.5 * square * (near + turn * far)


class Exp(DualActivation):
    """φ(z) = exp(z).

    >>> zero = torch.zeros(1, dtype=torch.float64)
    >>> Exp().covariance(zero, zero, zero)[0].item()
    1.0
    """

    name = "exp"

    def forward(self, z: Tensor) -> Tensor:
        """The activation, elementwise."""
        return torch.exp(z)

    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'], centred."""
        value = torch.exp(0.5 * (qx + qy) + k)
        return value, value


class Square(DualActivation):
    """φ(z) = z².

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> [v.item() for v in Square().covariance(one, one, one)]
    [3.0, 4.0]
    """

    name = "square"

    def forward(self, z: Tensor) -> Tensor:
        """The activation, elementwise."""
        return z * z

    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'], centred."""
        return qx * qy + 2 * k * k, 4 * k


class Gaussian(DualActivation):
    """φ(z) = exp(-z²).

    >>> zero = torch.zeros(1, dtype=torch.float64)
    >>> Gaussian().covariance(zero, zero, zero)[0].item()
    1.0
    """

    name = "gaussian"

    def forward(self, z: Tensor) -> Tensor:
        """The activation, elementwise."""
        return torch.exp(-z * z)

    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'], centred."""
        # A Gaussian integral: the inverse root of det(1 + 2Σ) with the covariance Σ of (z, z').
        inner = 1 + 2 * (qx + qy) + 4 * determinant(qx, qy, k)
        return inner.rsqrt(), 4 * k * inner.pow(-1.5)
