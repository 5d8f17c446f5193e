"""LayerNorm, RMSNorm, GroupNorm: averages over infinitely many units are numbers of each sample.

With m = Σ_v w_v μ_v, k̂ = k - m μ' - μ m' + m m', s² = Σ_v w_v k̂_v(x, x) + ε and ẑ = (μ - m) / s:
k⁺ = g² k̂ / (s s') + g b (ẑ + ẑ') + b², t⁺ = g² t / (s s') + k̂ / (s s') + 1, μ⁺ = g ẑ + b. The last two terms of t⁺ are
those of trained weights and biases; the Jacobian's part of rank two is of order 1/n.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.pairs import Pairs
from lightning_graphon.ntk.infinite.setting import Setting, bin_means
from lightning_graphon.tracing.steps import Norm


class NormNode(Node):
    """One group of units, or several; g² , g b, b², g and b enter as means over the bin."""

    step: Norm

    def build(self, setting: Setting) -> None:
        """Shares of the bins in each group, of the groups in each bin, and the moments of g and b."""
        step = self.step
        self.uses_squares, self.uses_means = True, not self.inputs[0].centred
        group = step.groups.unique(return_inverse=True)[1]
        count = torch.zeros(int(group.max()) + 1, self.bins, dtype=torch.float64)
        count.index_put_((group, self.bin_of_unit), torch.ones(len(group), dtype=count.dtype), accumulate=True)
        self.in_group = count / count.sum(1, keepdim=True)  # [G, K]
        self.in_bin = count / count.sum(0)
        g, b = self._entries(step.weight, 1.0), self._entries(step.bias, 0.0)
        self.scale, self.shift = bin_means(g, self.bin_of_unit).T, bin_means(b, self.bin_of_unit).T
        self.scale2 = bin_means(g.square(), self.bin_of_unit).T
        self.cross, self.shift2 = bin_means(g * b, self.bin_of_unit).T, bin_means(b.square(), self.bin_of_unit).T
        self.centred = (self.inputs[0].centred or bool(self.in_group.shape[1] == 1 and step.centred)) and not bool(
            b.any()
        )
        self.trained = tuple(float(p is not None and p.requires_grad) for p in (step.weight, step.bias))

    def _entries(self, parameter: Tensor | None, default: float) -> Tensor:
        """The parameter [U, P] at each unit and position."""
        if parameter is None:
            return torch.full(self.step.entries.shape, default, dtype=torch.float64)
        return parameter.detach().reshape(-1)[self.step.entries.to(parameter.device)].to("cpu", torch.float64)

    def own_places(self, number: int, pairs: Pairs) -> Tensor:
        """All, where the averages run over positions."""
        return torch.arange(pairs.positions) if self.step.over_positions else pairs.places

    def _statistics(self, z: Moments, x: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """Means m [P, G, N] of each group, None for zero, and 1 / s [P, G, N]."""
        square, mean = z.square, z.mean if self.step.centred else None
        assert square is not None  # noqa: S101
        share = self.in_group.to(square)
        second = torch.einsum("gk,pkn->pgn", share, square)
        first = None if mean is None else torch.einsum("gk,pkn->pgn", share, mean)
        if self.step.over_positions:
            second = second.mean(0, keepdim=True).expand_as(second)
            first = None if first is None else first.mean(0, keepdim=True).expand_as(first)
        variance = second if first is None else second - first.square()
        return first, (variance.clamp_min(0) + self.step.eps).rsqrt()

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """As in the formulas above, averaged over the groups of each bin."""
        (z,) = inputs
        (ma, ra), (mb, rb) = self._statistics(z.left), self._statistics(z.right)
        means = z.means if self.step.centred else None
        k = t = normalised = None
        for group, share in enumerate(self.in_bin.to(z.k)):
            left, right = z.ends(ra[:, group, None], rb[:, group, None])
            weight = share[:, None, None] * (left * right)
            hat = z.k
            if means is not None and ma is not None and mb is not None:
                m, m2 = z.ends(ma[:, group, None], mb[:, group, None])
                hat = z.k - m * means[1] - means[0] * m2 + m * m2
            normalised = hat * weight if normalised is None else normalised + hat * weight
            if z.t is not None:
                t = z.t * weight if t is None else t + z.t * weight
        assert normalised is not None  # noqa: S101
        scale2 = self._at(self.scale2, pairs, z.k)
        k = scale2 * normalised
        if samples.tangent and (t is not None or any(self.trained)):
            t = (0 if t is None else scale2 * t) + (self.trained[0] * normalised + self.trained[1]) * self._same(pairs)
        return self._add_bias(k, z, pairs), t

    def _at(self, values: Tensor, pairs: Pairs, like: Tensor) -> Tensor:
        """Products of g at both ends; where g changes from position to position, of its roots of mean squares."""
        root = values.to(like).sqrt()
        return (root[pairs.first] * root[pairs.second])[:, :, None, None]

    def _same(self, pairs: Pairs) -> Tensor | float:
        """Where the two ends have the same weight and bias: everywhere, or at the same position."""
        if len(self.step.entries.unique(dim=1).T) == 1:
            return 1.0
        return (pairs.first == pairs.second).double()[:, None, None, None]

    def _add_bias(self, k: Tensor, z: Field, pairs: Pairs) -> Tensor:
        if not bool(self.shift2.any()):
            return k
        left, right = (self._standardised(m) for m in (z.left, z.right))
        k = k + self._at(self.shift2, pairs, k)
        if left is None or right is None:
            return k
        a, b = z.ends(left, right)
        cross = self.cross.to(k)
        return k + cross[pairs.second][:, :, None, None] * a + cross[pairs.first][:, :, None, None] * b

    def _standardised(self, z: Moments) -> Tensor | None:
        """Means ẑ [P, K, N], averaged over the groups of each bin."""
        if z.mean is None:
            return None
        m, inverse = self._statistics(z)
        share = self.in_bin.to(z.mean)
        total = z.mean * torch.einsum("gk,pgn->pkn", share, inverse)
        return total if m is None else total - torch.einsum("gk,pgn->pkn", share, m * inverse)

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """g ẑ + b."""
        (z,) = inputs
        standardised, shift = self._standardised(z), self.shift.to(x)[:, :, None]
        if standardised is None:
            return shift.expand(-1, -1, len(x))
        return self.scale.to(x)[:, :, None] * standardised + shift
