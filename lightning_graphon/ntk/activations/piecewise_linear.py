r"""Piecewise linear activations in closed form: ReLU, LeakyReLU, abs, identity, Hardtanh, ReLU6, ...

The centred kernels of the ReLU family are the arc-cosine kernels of order 1 and 0 (Cho & Saul 2009), written
with :math:`θ = 2\,\mathrm{atan2}(\sin θ/2, \cos θ/2)` from squared distances: finite with finite gradients
for equal, opposite and zero rows, and without cancellation for near-duplicates. All other cases use bivariate normal
probabilities.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.ntk.activations.base import DualActivation
from lightning_graphon.ntk.activations.gaussian import NormalPair, positive_part, safe_sqrt


class PiecewiseLinear(DualActivation):
    """φ(z) = constant + slope · z + Σᵢ bendᵢ · (z - knotᵢ)₊, centred or not, in closed form.

    Args:
        constant: Constant term.
        slope: Slope left of every knot.
        bends: Pairs (knot, change of slope).
        name: Name in messages.

    >>> hardtanh = PiecewiseLinear(-1.0, 0.0, [(-1.0, 1.0), (1.0, -1.0)], name="hardtanh")
    >>> hardtanh.forward(torch.tensor([-3.0, 0.5, 2.0]))
    tensor([-1.0000,  0.5000,  1.0000])
    """

    @checked
    def __init__(
        self, constant: float, slope: float, bends: Sequence[tuple[float, float]], name: str = "piecewise_linear"
    ) -> None:
        self.constant, self.slope, self.bends, self.name = constant, slope, tuple(bends), name

    def forward(self, z: Tensor) -> Tensor:
        """The activation, elementwise."""
        out = self.constant + self.slope * z
        for knot, bend in self.bends:
            out = out + bend * (z - knot).clamp_min(0)
        return out

    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'], centred."""
        return self.shifted(torch.zeros_like(qx), torch.zeros_like(qy), qx, qy, k)

    def shifted(self, mx: Tensor, my: Tensor, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'] with means, by Stein's lemma and truncated normal pairs."""
        meanx, slopex = self.shifted_mean(mx, qx)
        meany, slopey = self.shifted_mean(my, qy)
        bentx, benty = meanx - self.constant - self.slope * mx, meany - self.constant - self.slope * my
        # Stein's lemma, E[z φ(z')] = E[z] E[φ(z')] + k E[φ'(z')], for the linear part times the bends.
        pair = NormalPair(mx, my, qx, qy, k)
        value = self.constant * (meanx + meany - self.constant) + self.slope**2 * (k + mx * my)
        value = value + self.slope * (mx * benty + k * (slopey - self.slope))
        value = value + self.slope * (my * bentx + k * (slopex - self.slope))
        slope = self.slope * (slopex + slopey - self.slope) + torch.zeros_like(k)
        for t, bend_t in self.bends:
            for u, bend_u in self.bends:
                value = value + bend_t * bend_u * pair.positive_parts(t, u)
                slope = slope + bend_t * bend_u * pair.above(t, u)
        return value, slope

    def shifted_mean(self, m: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """E[φ] and E[φ̇] with a mean."""
        value = self.constant + self.slope * m
        slope = self.slope + torch.zeros_like(m)
        for knot, bend in self.bends:
            part, above = positive_part(m, q, knot)
            value, slope = value + bend * part, slope + bend * above
        return value, slope


class ReLULike(PiecewiseLinear):
    """φ(z) = positive · max(z, 0) + negative · min(z, 0): ReLU (0, 1), abs (-1, 1), identity (1, 1), LeakyReLU.

    Args:
        negative: Slope for z < 0.
        positive: Slope for z > 0.
        name: Name in messages.

    >>> relu = ReLULike(0.0, 1.0)
    >>> q = torch.ones(1, dtype=torch.float64)
    >>> kappa, kappa_dot = relu.covariance(q, q, q)
    >>> round(kappa.item(), 12), round(kappa_dot.item(), 12)
    (0.5, 0.5)
    """

    @checked
    def __init__(self, negative: float, positive: float, name: str = "relu_like") -> None:
        super().__init__(0.0, negative, [(0.0, positive - negative)], name)
        self._mean = 0.5 * (positive + negative)  # φ(z) = mean·z + half·|z|
        self._half = 0.5 * (positive - negative)

    def second_moment(self, q: Tensor) -> Tensor:
        """E[φ(z)²] = q (negative² + positive²) / 2."""
        return (self._mean**2 + self._half**2) * q

    def covariance(self, qx: Tensor, qy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """E[φφ'] and E[φ̇φ̇'], centred."""
        distance, kappa_dot = self.squared_distance(qx, qy, qx + qy - 2 * k)
        return 0.5 * (self.second_moment(qx) + self.second_moment(qy) - distance), kappa_dot

    def squared_distance(self, qx: Tensor, qy: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance after the activation and E[φ̇φ̇'], centred."""
        m2, h2 = self._mean**2, self._half**2
        if h2 == 0:
            return m2 * distance, torch.full_like(distance, m2)
        chord, cap, norms, half = _angle(qx, qy, distance)
        # The kink adds |z||z'|(sin θ - θ cos θ), which is O(θ³); both terms are times two here.
        product = chord * cap  # not negative, so a plain root will do where there is no gradient
        sine = safe_sqrt(product) if product.requires_grad else product.sqrt_()
        bulge = torch.addcmul(sine, norms.sub(chord, alpha=2), half, value=-1)
        after = ((m2 + h2) * distance).sub_(bulge, alpha=2 * h2 / math.pi)
        return after, half.mul(-4 * h2 / math.pi).add_(m2 + h2)


def _angle(qx: Tensor, qy: Tensor, distance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """4|z||z'| sin²(θ/2), 4|z||z'| cos²(θ/2), 4|z||z'| and θ/2 of two vectors with the angle θ."""
    # |z - z'|² = (|z| - |z'|)² + 4|z||z'| sin²(θ/2), from which the chord keeps its digits at small angles.
    rootx, rooty = safe_sqrt(qx), safe_sqrt(qy)
    norms, apart = 4 * rootx * rooty, rootx - rooty
    chord = torch.addcmul(distance, apart, apart, value=-1).clamp_min_(0)  # negative only by rounding, as is the cap
    cap = (norms - chord).clamp_min_(0)
    # atan √(chord/cap); atan2, three times slower, only where its gradient at opposite rows is needed.
    if chord.requires_grad and torch.is_grad_enabled():
        half = torch.atan2(safe_sqrt(chord), safe_sqrt(cap))
    else:
        half = (chord / cap).sqrt_().atan_()
    if bool(qx.detach().amin() * qy.detach().amin() <= 0):
        half = torch.where(norms <= 0, 0.25 * math.pi, half)  # zero rows count as orthogonal
    return chord, cap, norms, half


def half_angle(qx: Tensor, qy: Tensor, distance: Tensor) -> Tensor:
    """Half the angle between two vectors of squared norms `qx`, `qy` and squared distance `distance`."""
    return _angle(qx, qy, distance)[3]
