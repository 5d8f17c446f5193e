"""BatchNorm in eval with fresh statistics; those of data depend on the weights before them and are refused."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.pairs import Pairs
from lightning_graphon.ntk.infinite.setting import Setting, bin_means
from lightning_graphon.tracing import NotReadableError
from lightning_graphon.tracing.steps import BatchNorm


class BatchNormNode(Node):
    """z / √(1 + ε), times weight plus bias."""

    step: BatchNorm

    def build(self, setting: Setting) -> None:
        """Moments of g / √(variance + ε) and of b - g mean / √(..) over each bin."""
        step = self.step
        self.uses_means = not self.inputs[0].centred
        mean, variance = (t.detach().to("cpu", torch.float64) for t in (step.mean, step.variance))
        if bool(mean.any()) or bool((variance != 1).any()):
            raise NotReadableError(
                f"{step.label} has statistics of data, which depend on the weights before it (`sampled_ntk` measures "
                "them anew for every draw of the weights)"
            )
        g, b = (
            torch.full((len(step.units),), default, dtype=torch.float64) if p is None
            else p.detach().to("cpu", torch.float64)[step.place]
            for p, default in ((step.weight, 1.0), (step.bias, 0.0))
        )  # fmt: skip
        root = (variance + step.eps).rsqrt()
        self.root = float(root[0])
        moments = (g, g.square(), g * b, b, b.square())
        self.scale, self.scale2, self.cross, self.shift, self.shift2 = (
            bin_means(v, self.bin_of_unit)[:, None, None] for v in moments
        )
        self.centred = self.inputs[0].centred and not bool(b.any())
        self.trained = tuple(float(p is not None and p.requires_grad) for p in (step.weight, step.bias))

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """k⁺ = g² ẑẑ' + g b (ẑ + ẑ') + b², t⁺ = g² t + ẑẑ' + 1 with ẑ = z / √(1 + ε)."""
        (z,) = inputs
        standard = self.root**2 * z.k
        k = self.scale2.to(standard) * standard + self.shift2.to(standard)
        means = z.means
        if means is not None:
            k = k + self.cross.to(k) * self.root * (means[0] + means[1])
        if not samples.tangent:
            return k, None
        own = self.trained[0] * standard + self.trained[1]
        return k, own if z.t is None else own + self.scale2.to(k) * self.root**2 * z.t

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """g ẑ + b."""
        (z,) = inputs
        shift = self.shift[..., 0].to(x)
        if z.mean is None:
            return shift.expand(self.step.positions, -1, len(x)) if bool(shift.any()) else None
        return self.scale[..., 0].to(x) * self.root * z.mean + shift
