"""Scores that are a known scale times i.i.d. noise: thresholds, probabilities to be kept, and the graphon."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_graphon._shared.checks import as_tensor
from lightning_graphon._shared.choices import Order
from lightning_graphon.graphon.core.step_graphon import StepGraphon
from lightning_graphon.graphon.estimation.estimate import estimate_graphon

# Quantiles that represent a distribution: probabilities are exact to about 1 / RESOLUTION = 6e-5.
RESOLUTION = 1 << 14


class Threshold(NamedTuple):
    """Scores above `high` are kept, and of those in (low, high] the fraction `share`.

    `low` and `high` are neighbouring floating-point numbers, so `share` only matters where many scores are equal.
    """

    low: float
    high: float
    share: float


@dataclass(frozen=True)
class ScaledSaliency:
    """Scores S_ij = s_ij ξ_ij with scales s and noise ξ that is i.i.d. and independent of them.

    At the threshold τ weights are kept independently with P(M_ij = 1) = P(ξ > τ / s_ij). SNIP's score |w · ∂L/∂w|
    has this form with s = |∂L/∂w| and ξ = |w| if the gradient does not depend on the weight itself; that dependence
    vanishes as the layer widens.

    Args:
        scales: Scales [out, in, *taps], finite and not negative; zero where the score is always zero.
        noise: Sample [k] of ξ, in any order; it may be signed.

    Raises:
        ValueError: A scale is negative or not finite, the noise is empty or not finite.

    Example:
        >>> S = ScaledSaliency(torch.tensor([[2.0, 1.0], [1.0, 0.0]]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> S.probabilities(3.5).tolist()
        [[0.75, 0.25], [0.25, 0.0]]
    """

    scales: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        scales = finite_float64("scales", self.scales, dims=2)
        if bool((scales < 0).any()):
            raise ValueError(f"scales must not be negative, got {float(scales.min())}: pass absolute values")
        # The dataclass is frozen.
        object.__setattr__(self, "scales", scales)
        object.__setattr__(self, "noise", quantiles(finite_float64("noise", self.noise)))

    @classmethod
    def from_gradient_factors(cls, deltas: Tensor, inputs: Tensor, weight: Tensor) -> "ScaledSaliency":
        """SNIP's score of a linear layer, |w| · |Σ_b δ_b h_b|, from the two factors of its gradient.

        With one sample the scale is a product a_i b_j, the factorised model; with B samples it has rank B at most.

        Args:
            deltas: Derivatives of the loss [batch, out] with respect to the layer's outputs.
            inputs: The layer's inputs [batch, in].
            weight: Weight [out, in], whose absolute values are the noise.
        """
        return cls((deltas.double().T @ inputs.double()).abs(), weight.detach().abs())

    @property
    def shape(self) -> torch.Size:
        """Shape of the scores."""
        return self.scales.shape

    def probabilities(self, threshold: float | Threshold) -> Tensor:
        """P(S_ij > threshold), float64 of the scores' shape."""
        if not isinstance(threshold, Threshold):
            return exceedance(self.noise, self.scales, threshold)
        above = exceedance(self.noise, self.scales, threshold.high)
        if threshold.share == 0:
            return above
        return above.lerp(exceedance(self.noise, self.scales, threshold.low), threshold.share)

    def threshold(self, density: float) -> Threshold:
        """The threshold that keeps this fraction of the layer.

        Raises:
            ValueError: `density` is not in [0, 1].
        """
        return common_threshold([self], density)

    def graphon(
        self,
        *,
        density: float | None = None,
        threshold: float | Threshold | None = None,
        bins: int | Sequence[int] = 64,
        order: Order = "degree",
    ) -> StepGraphon:
        """The limit of the masks: W(u, v) = P(S > τ), averaged over the cells of a grid.

        Args:
            density: Fraction kept in this layer.
            threshold: The alternative, where one threshold serves several layers; see `predicted_graphons`.
            bins: Cells of each axis, or a pair (rows, columns), as in `estimate_graphon`.
            order: "degree" sorts both axes by expected degree, descending; "none" keeps the order of the units.

        Returns:
            Values and measures, float64. The taps of a convolution are averaged.

        Raises:
            ValueError: Not exactly one of `density` and `threshold`, or one of them is out of range.
        """
        if (density is None) == (threshold is None):
            raise ValueError(f"give one of density and threshold, got density={density!r}, threshold={threshold!r}")
        cut = self.threshold(density) if density is not None else threshold
        assert cut is not None  # noqa: S101  (for the type checker)
        # A matrix of probabilities is read as a mask with entries in [0, 1]; its standard errors mean nothing here.
        estimate = estimate_graphon(self.probabilities(cut), bins, order)
        return StepGraphon(estimate.values, estimate.row_measure, estimate.col_measure)


def common_threshold(layers: Sequence[ScaledSaliency], density: float) -> Threshold:
    """The one threshold that keeps the fraction `density` of all entries of all layers.

    Where many scores equal the threshold, its `share` says how much of them is kept.

    Raises:
        ValueError: `density` is not in [0, 1].
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is the fraction of weights kept and must lie in [0, 1], got {density!r}")
    entries = [layer.scales.numel() for layer in layers]
    scales = [quantiles(layer.scales.flatten()) for layer in layers]

    def kept(threshold: float) -> float:
        means = [float(exceedance(layer.noise, s, threshold).mean()) for layer, s in zip(layers, scales, strict=True)]
        return sum(n * p for n, p in zip(entries, means, strict=True)) / sum(entries)

    # Bisection over the floating-point numbers in their order: scores may have any scale and sign.
    low, high = _float_index(-_LARGEST), _float_index(_LARGEST)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(_float_at(middle)) > density else (low, middle)
    below, above = kept(_float_at(low)), kept(_float_at(high))
    share = (density - above) / (below - above) if below > above else 0.0
    # A jump below the resolution is not a tie, and without a share half the work is saved.
    return Threshold(_float_at(low), _float_at(high), share if below - above > 1 / RESOLUTION else 0.0)


_LARGEST = torch.finfo(torch.float64).max


def _float_index(number: float) -> int:
    """Index of a float64 in the order of all float64, 0 for zero."""
    # Read as integers the bits of floats are ordered by magnitude; the sign is a bit of its own.
    bits = int(torch.tensor(number, dtype=torch.float64).view(torch.int64))
    return bits if bits >= 0 else -(bits & 0x7FFF_FFFF_FFFF_FFFF)


def _float_at(index: int) -> float:
    """The float64 with this index."""
    magnitude = float(torch.tensor(abs(index), dtype=torch.int64).view(torch.float64))
    return magnitude if index >= 0 else -magnitude


def exceedance(noise: Tensor, scales: Tensor, threshold: float) -> Tensor:
    """P(s ξ > threshold) for every scale s, from a sorted sample of ξ."""
    cuts = threshold / scales
    above = len(noise) - torch.searchsorted(noise, cuts.contiguous(), right=True)
    kept = above.to(torch.float64) / len(noise)
    return torch.where(scales == 0, float(threshold < 0), kept)


def quantiles(sample: Tensor) -> Tensor:
    """The sample [k] in ascending order; of a longer one RESOLUTION quantiles, at the middle of equal shares."""
    # numpy sorts floats with vector instructions, four times as fast as torch on one core.
    ordered = torch.from_numpy(np.sort(sample.flatten().cpu().numpy())).to(sample.device)
    if len(ordered) <= RESOLUTION:
        return ordered
    middle = (torch.arange(RESOLUTION, dtype=torch.float64) + 0.5) * (len(ordered) / RESOLUTION)
    return ordered[middle.long().to(ordered.device)]


def finite_float64(name: str, values: Tensor, dims: int = 1) -> Tensor:
    """Detached float64, finite, not empty, with at least `dims` axes.

    Raises:
        ValueError: It is not all of this.
    """
    values = as_tensor(name, values).detach()
    values = values.to("cpu" if values.device.type == "mps" else values.device, torch.float64)
    if values.ndim < dims or 0 in values.shape:
        raise ValueError(f"{name} must have at least {dims} axes, none of them empty, got shape {tuple(values.shape)}")
    bad = int((~values.isfinite()).count_nonzero())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} of {values.numel()} that are not")
    return values
