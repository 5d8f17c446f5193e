"""Linear layers and convolutions whose kept weights have a mean D in each cell.

μ⁺ = Σ_τ D_τ μ + E[b], and k⁺ = Σ_τ A_τ k - Σ_τ D²_τ μ μ' + var[b] + μ⁺ μ⁺', sums over taps τ.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.nodes.affine import AffineNode, TapProduct
from lightning_graphon.ntk.infinite.nodes.base import Samples
from lightning_graphon.ntk.infinite.pairs import Pairs, Taps
from lightning_graphon.ntk.infinite.setting import Setting, bin_means


class DriftAffineNode(AffineNode):
    """A layer that is Gaussian and not centred."""

    def build(self, setting: Setting) -> None:
        """The maps of means [taps, K_out, K_in]."""
        super().build(setting)
        step, (source,) = self.step, self.inputs
        self.centred, self.uses_means = False, True
        mask, weight = setting.mask(step.weight_name, step.weight), step.weight.detach().to("cpu", torch.float64)
        self.mean_map = self._cells(weight * mask)
        cell = step.tap_of * source.bins + source.bin_of_unit[step.features]
        columns = torch.bincount(cell, minlength=len(step.taps) * source.bins).reshape(-1, 1, source.bins)
        # A cell's sum of n means squared is n² D², of which there are n.
        self.mean_square_map = self.mean_map.square() / columns.clamp_min(1)
        self.bias_mean = torch.zeros(self.bins, dtype=torch.float64)
        if step.bias is not None:
            self.bias_mean = bin_means(step.vector(step.bias.detach()).to("cpu", torch.float64), self.bin_of_unit)

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """As in the formulas above."""
        k, t = super().propagate(inputs, pairs, samples)
        (z,) = inputs
        means = z.means
        if means is not None:
            k = k - self.of_mean_products(means[0] * means[1], z.pairs, pairs)
        left, right = (self.mean([side], x) for side, x in ((z.left, samples.left), (z.right, samples.right)))
        square = self.bias_mean.square().to(k)[:, None, None]
        return k + samples.outer(left[pairs.first], right[pairs.second]) - square, t

    def of_mean_products(self, products: Tensor, before: Pairs, pairs: Pairs) -> Tensor:
        """Σ_τ D²_τ of products of means [R, K_in, n, m]."""
        taps = self.places[0]
        assert isinstance(taps, Taps)  # noqa: S101
        rows = taps.rows(pairs, before)
        build = lambda: TapProduct(self.mean_square_map, rows, products.detach())  # noqa: E731
        return pairs.link(self.mean_square_map, before, build)(products)

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor:
        """The mean of the layer."""
        mean, bias = inputs[0].mean, self.bias_mean.to(x)[:, None]
        if mean is None:
            return bias.expand(self.step.positions, -1, len(x))
        padded = torch.cat([mean, torch.zeros_like(mean[:1])])  # the last position, -1, is outside
        return torch.einsum("tuv,tpvn->pun", self.mean_map.to(x), padded[self.step.taps]) + bias
