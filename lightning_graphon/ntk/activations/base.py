r"""Dual activations: what a nonlinearity does to a Gaussian kernel, for any activation by a Hermite series.

For centred jointly Gaussian z, z' with variances q, q' and covariance k an activation φ maps the kernel to
:math:`E[φ(z)φ(z')]` and its derivative kernel :math:`E[φ'(z)φ'(z')]` (Daniely, Frostig, Singer 2016). Besides
the covariance the recursion carries squared distances :math:`q + q' - 2k`, because near-duplicates lose half
of their digits otherwise. `shifted` gives the same expectations for Gaussians that are not centred.

With :math:`z = m + s t`, t standard normal, and normalised Hermite polynomials h_k, Mehler's formula gives
:math:`E[φ(z)φ(z')] = \sum_k ρ^k a_k(m, s) a_k(m', s')`, :math:`a_k(m, s) = E[φ(m + s t) h_k(t)]`. A pair of samples
costs one multiplication per term, with or without means. Coefficients come from a composite Gauss-Legendre rule on
|t| <= 13 with a panel edge at t = 0, where activations may have a kink.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.ntk.activations.gaussian import legendre_nodes, safe_sqrt

_EDGES = (-13.0, -6.0, -2.0, 0.0, 2.0, 6.0, 13.0)
_NODES = 48  # per panel
# Share of E[φ̇²] that the series may miss; a kink alone leaves 3 % (ReLU). tanh reaches it at variance 30, where
# E[φ̇φ̇'] is off by up to 1 %.
_MOST_MISSING = 0.05


class DualActivation(ABC):
    """Expectations of one activation over pairs of Gaussians; subclass and register to add your own.

    All tensors broadcast against one another; kernels call with variances of x as [P, N, 1], of x' as [P, 1, M] and
    covariances as [P, N, M]. Subclasses implement `forward` and `covariance`; the other methods have defaults.
    """

    name: str = "activation"

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """The activation itself, elementwise."""

    @abstractmethod
    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φ(z)φ(z')] and E[φ'(z)φ'(z')] for centred Gaussians."""

    def derivative(self, z: Tensor) -> Tensor:
        """The activation's derivative, elementwise; by autograd unless overridden."""
        output: Any = torch.func.vjp(self.forward, z)
        value, vjp = output
        return cast(Tensor, vjp(torch.ones_like(value))[0])

    def second_moment(self, q: Tensor) -> Tensor:
        """E[φ(z)²] for z ~ N(0, q)."""
        return self.covariance(q, q, q)[0]

    def is_accurate(self, q: Tensor) -> bool:
        """Whether the expectations are accurate at variance `q`, a scalar; closed forms always are."""
        return True

    def squared_distance(self, qx: Tensor, qy: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the recursion on squared distances.

        Args:
            qx: Variances of z.
            qy: Variances of z'.
            distance: E[(z - z')²] = qx + qy - 2 k.

        Returns:
            E[(φ(z) - φ(z'))²] and E[φ'(z)φ'(z')].
        """
        # The default cancels for near-duplicates; duals with a kink override it.
        kappa, kappa_dot = self.covariance(qx, qy, 0.5 * (qx + qy - distance))
        spread = self.second_moment(qx) + self.second_moment(qy)
        # Negative only by rounding, as it is an expectation of a square.
        return (spread - 2 * kappa).clamp_min(0), kappa_dot

    def shifted(self, mx: Tensor, my: Tensor, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φ(z)φ(z')] and E[φ'(z)φ'(z')] for Gaussians with means `mx`, `my`; by default a Hermite series."""
        return HermiteDual(self.forward, self.derivative, name=self.name).shifted(mx, my, qx, qy, k)

    def shifted_mean(self, m: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """E[φ(z)] and E[φ'(z)] for z ~ N(m, q); by default quadrature."""
        return HermiteDual(self.forward, self.derivative, name=self.name).shifted_mean(m, q)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class HermiteDual(DualActivation):
    """Any elementwise activation, by a Hermite series of `degree` terms.

    Accuracy against 2-D quadrature for variances up to 4: about 1e-12 for tanh, sigmoid, softplus, SiLU; for functions
    with a kink about 1e-7 in E[φφ'] and 1e-3 in E[φ̇φ̇'] where the correlation exceeds 0.99, and better than 1e-7 below
    0.8. The error grows with the variance, and `graphon_ntk` warns where it reaches a percent (tanh: from 30 on).
    `truncation` gives the mass beyond the series.

    Args:
        function: Elementwise torch function.
        derivative: Its derivative; by autograd when None.
        degree: Number of terms, at least 1.
        name: Name in messages.

    Raises:
        ValueError: `degree` is not positive.

    >>> silu = HermiteDual(torch.nn.functional.silu, name="silu")
    >>> q = torch.ones(1, dtype=torch.float64)
    >>> round(silu.covariance(q, q, 0 * q)[0].item(), 6)
    0.042692
    """

    @checked
    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        derivative: Callable[[Tensor], Tensor] | None = None,
        *,
        degree: int = 96,
        name: str | None = None,
    ) -> None:
        if degree < 1:
            raise ValueError(f"degree is the number of Hermite terms and must be at least 1, got {degree}")
        self._function, self._derivative, self.degree = function, derivative, degree
        self.name = name or str(getattr(function, "__name__", type(function).__name__))

    def forward(self, z: Tensor) -> Tensor:
        """The activation, elementwise."""
        return self._function(z)

    def derivative(self, z: Tensor) -> Tensor:
        """Its derivative, elementwise."""
        return super().derivative(z) if self._derivative is None else self._derivative(z)

    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'], centred."""
        return self.shifted(torch.zeros_like(qx), torch.zeros_like(qy), qx, qy, k)

    def second_moment(self, q: Tensor) -> Tensor:
        """E[φ(z)²] for z ~ N(0, q), by quadrature."""
        return self._project(self.forward, torch.zeros_like(q), q)[1]

    def is_accurate(self, q: Tensor) -> bool:
        """Whether the series holds all but a twentieth of E[φ̇²] at variance `q`."""
        _, moment, rest = self._project(self.derivative, torch.zeros_like(q), q)
        return bool(rest <= _MOST_MISSING * moment)

    def shifted(self, mx: Tensor, my: Tensor, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'] with means."""
        scale = safe_sqrt(qx) * safe_sqrt(qy)
        zero = scale <= 0  # guarded twice: a NaN in the unused branch would still reach the gradient
        rho = torch.where(zero, 0.0, k / torch.where(zero, 1.0, scale)).clamp(-1.0, 1.0)
        value = _mehler(rho, self._project(self.forward, mx, qx), self._project(self.forward, my, qy))
        slope = _mehler(rho, self._project(self.derivative, mx, qx), self._project(self.derivative, my, qy))
        return value, slope

    def shifted_mean(self, m: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """E[φ] and E[φ̇] with a mean, by quadrature."""
        return self._project(self.forward, m, q)[0][..., 0], self._project(self.derivative, m, q)[0][..., 0]

    def truncation(self, m: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Mass of φ and of φ̇ beyond the series, E[φ²] - Σ_k a_k², for float64 means and variances that broadcast."""
        return self._project(self.forward, m, q)[2], self._project(self.derivative, m, q)[2]

    def _project(self, function: Callable[[Tensor], Tensor], m: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients [..., degree], second moment and the mass that the coefficients miss."""
        # One quadrature gives all coefficients, as products of the values with weighted polynomials.
        nodes, weights, basis = _quadrature(self.degree)
        t, w, h = (torch.as_tensor(a, dtype=m.dtype, device=m.device) for a in (nodes, weights, basis))
        values = function(m[..., None] + safe_sqrt(q)[..., None] * t)
        coefficients = values @ h
        moment = values.square() @ w
        return coefficients, moment, (moment - coefficients.square().sum(-1)).clamp_min(0)


def _mehler(rho: Tensor, left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Tensor:
    """Σ_k ρ^k a_k b_k by Horner's rule."""
    (a, _, rest_a), (b, _, rest_b) = left, right
    # The mass beyond the last term is added with the next power of ρ, so that the diagonal, ρ = 1, is exact.
    total = rho * safe_sqrt(rest_a) * safe_sqrt(rest_b)
    for k in range(a.shape[-1] - 1, -1, -1):
        total = total + a[..., k] * b[..., k]
        if k:
            total = total * rho
    return total


def _quadrature(degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, their weights under the standard normal, and weighted normalised Hermite polynomials [nodes, degree]."""
    t, w = legendre_nodes(_EDGES, _NODES)
    w = w * np.exp(-0.5 * t * t) / np.sqrt(2 * np.pi)
    basis = np.empty((len(t), degree))
    previous, current = np.zeros_like(t), np.ones_like(t)
    # Three-term recurrence of the normalised Hermite polynomials.
    for k in range(degree):
        basis[:, k] = current
        previous, current = current, (t * current - np.sqrt(k) * previous) / np.sqrt(k + 1)
    return t, w, basis * w[:, None]
