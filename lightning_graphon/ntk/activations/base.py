r"""Dual activations: what one layer's nonlinearity does to a Gaussian kernel.

For centred jointly Gaussian z, z' with variances q, q' and covariance k an activation φ maps the kernel to
:math:`E[φ(z)φ(z')]` and its derivative kernel :math:`E[φ'(z)φ'(z')]` (Daniely, Frostig, Singer 2016). Besides
the covariance the recursion carries squared distances :math:`q + q' - 2k`, because near-duplicates lose half
of their digits otherwise. `shifted` are the same expectations for Gaussians that are not centred.
"""

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor


class DualActivation(ABC):
    """Expectations of one activation over pairs of Gaussians; subclass and register to add your own.

    All tensors broadcast against one another; kernels call with variances of x as [P, N, 1], of x' as [P, 1,
    M] and covariances as [P, N, M]. Subclasses implement `forward` and `covariance`; `pair` and the
    non-centred methods have defaults.
    """

    name: str = "activation"

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """The activation itself, elementwise."""

    @abstractmethod
    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φ(z)φ(z')] and E[φ'(z)φ'(z')] for centred Gaussians."""

    def derivative(self, z: Tensor) -> Tensor:
        """The activation's derivative, elementwise, as torch's autograd gives it."""
        output: Any = torch.func.vjp(self.forward, z)
        value, pull = output
        return cast(Tensor, pull(torch.ones_like(value))[0])

    def second_moment(self, q: Tensor) -> Tensor:
        """E[φ(z)²] for z ~ N(0, q)."""
        return self.covariance(q, q, q)[0]

    def resolves(self, q: Tensor) -> bool:
        """Whether the expectations can be trusted at variance `q`, a scalar; default: always, as closed forms."""
        return True

    def pair(self, qx: Tensor, qy: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the recursion on squared distances.

        Args:
            qx: variances of z.
            qy: variances of z'.
            distance: E[(z - z')²] = qx + qy - 2 k.

        Returns:
            E[(φ(z) - φ(z'))²] and E[φ'(z)φ'(z')].
        """
        kappa, kappa_dot = self.covariance(qx, qy, 0.5 * (qx + qy - distance))
        spread = self.second_moment(qx) + self.second_moment(qy)
        # Negative only by rounding: it is an expectation of a square.
        return (spread - 2 * kappa).clamp_min(0), kappa_dot

    def shifted(self, mx: Tensor, my: Tensor, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φ(z)φ(z')] and E[φ'(z)φ'(z')] for Gaussians with means `mx`, `my`; default: Hermite series."""
        from lightning_graphon.ntk.activations.hermite import HermiteDual

        return HermiteDual(self.forward, self.derivative, name=self.name).shifted(mx, my, qx, qy, k)

    def shifted_mean(self, m: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """E[φ(z)] and E[φ'(z)] for z ~ N(m, q); default: quadrature."""
        from lightning_graphon.ntk.activations.hermite import HermiteDual

        return HermiteDual(self.forward, self.derivative, name=self.name).shifted_mean(m, q)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"
