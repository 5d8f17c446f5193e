"""Closed-form dual activations: erf, GELU, sin, cos, exp, square, Gaussian (Williams 1997; Tsuchida 2021)."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_graphon.ntk.activations.base import DualActivation
from lightning_graphon.ntk.activations.gaussian import determinant, safe_sqrt


class ClosedForm(DualActivation):
    """An activation together with the formula of its expectations.

    Args:
        name: Name in messages.
        function: Elementwise torch function.
        expectations: Gives E[φφ'] and E[φ̇φ̇'] for the variances and the covariance of centred Gaussians.

    >>> exp, zero = CLOSED_FORMS["exp"], torch.zeros(1, dtype=torch.float64)
    >>> [value.item() for value in exp.covariance(zero, zero, zero)]
    [1.0, 1.0]
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Tensor], Tensor],
        expectations: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self.name, self._function, self._expectations = name, function, expectations

    def forward(self, z: Tensor) -> Tensor:
        """The activation, elementwise."""
        return self._function(z)

    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'], centred."""
        return self._expectations(qx, qy, k)


def _erf(qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    # arcsin(2k / √((1 + 2q)(1 + 2q'))), as an arctangent of the determinant: exact for equal rows.
    root = safe_sqrt(1 + 2 * (qx + qy) + 4 * determinant(qx, qy, k))
    return 2 / math.pi * torch.atan2(2 * k, root), 4 / math.pi / root


def _gelu(qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of z Φ(z), Φ the normal distribution function; not of its tanh approximation."""
    outer, product, k2 = (1 + qx) * (1 + qy), qx * qy, k * k
    inner = 1 + qx + qy + determinant(qx, qy, k)  # (1 + q)(1 + q') - k² without its cancellation
    root = safe_sqrt(inner)
    angle = torch.atan2(k, root)
    value = (k2 + product * inner) / (outer * root) + k * angle
    slope = k / root * ((3 + qx + qy + k2 / inner) / outer) + angle
    return value / (2 * math.pi) + k / 4, slope / (2 * math.pi) + 0.25


def _sin(qx: Tensor, qy: Tensor, k: Tensor, turn: float = 1.0) -> tuple[Tensor, Tensor]:
    """Of sin(z + phase) with `turn` = cos(2 · phase): 1 for the sine, -1 for the cosine."""
    near, far = torch.exp(-0.5 * (qx + qy - 2 * k)), torch.exp(-0.5 * (qx + qy + 2 * k))
    # near - far by expm1 from the larger of the two, so that small variances keep their digits.
    above, below = torch.where(k > 0, k, 0), torch.where(k > 0, 0, k)
    difference = torch.where(k > 0, -near * torch.expm1(-2 * above), far * torch.expm1(2 * below))
    return 0.5 * ((1 - turn) * near + turn * difference), 0.5 * (near + turn * far)


def _exp(qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.exp(0.5 * (qx + qy) + k)
    return value, value


def _square(qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return qx * qy + 2 * k * k, 4 * k


def _bell(z: Tensor) -> Tensor:
    return torch.exp(-z * z)


def _gaussian(qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    # A Gaussian integral: the inverse root of det(1 + 2Σ) with the covariance Σ of (z, z').
    inner = 1 + 2 * (qx + qy) + 4 * determinant(qx, qy, k)
    return inner.rsqrt(), 4 * k * inner.pow(-1.5)


CLOSED_FORMS: dict[str, DualActivation] = {
    "erf": ClosedForm("erf", torch.erf, _erf),
    "gelu": ClosedForm("gelu", torch.nn.functional.gelu, _gelu),
    "sin": ClosedForm("sin", torch.sin, _sin),
    "cos": ClosedForm("cos", torch.cos, partial(_sin, turn=-1.0)),
    "exp": ClosedForm("exp", torch.exp, _exp),
    "square": ClosedForm("square", torch.square, _square),
    "gaussian": ClosedForm("gaussian", _bell, _gaussian),
}
