"""Embeddings: k = E[e²] and t = 1 where the tokens are equal, E[e]² and 0 elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.pairs import Nowhere, Pairs
from lightning_graphon.ntk.infinite.setting import Setting, beyond_noise, bin_means
from lightning_graphon.tracing.steps import Embedding


class EmbeddingNode(Node):
    """A fresh atom of independent rows; which rows, the input says, or they are always the same."""

    step: Embedding

    def build(self, setting: Setting) -> None:
        """Moments of each bin, over all words but that of the padding."""
        step, words = self.step, torch.arange(len(self.step.weight))
        self.atoms, self.gaussian = self.new_atom(), True
        self.places = [Nowhere(node.step.positions) for node in self.inputs]  # the tokens are read from the samples
        own = words if step.padding is None else words[words != step.padding]
        mask = setting.mask(step.weight_name, step.weight)[own]
        weight = step.weight.detach().to("cpu", torch.float64)[own]
        self.density = bin_means(mask.mean(0), self.bin_of_unit)
        self.energy = bin_means((weight.square() * mask).mean(0), self.bin_of_unit)
        if setting.propagate == "density":
            kept = (weight.square() * mask).sum() / mask.sum().clamp_min(1)
            self.energy = float(kept) * self.density
        count = len(own) * torch.bincount(self.bin_of_unit)
        self.means = beyond_noise(bin_means((weight * mask).mean(0), self.bin_of_unit), self.energy, count)
        self.centred = not bool(self.means.any())

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """Where tokens are equal, and the product of means of different ones."""
        left, right = self._words(samples.left, pairs.first), self._words(samples.right, pairs.second)
        right = right[..., None] if samples.paired else right[:, None, :]
        inside = ((left != self._padding)[..., None] & (right != self._padding))[:, None]
        same = (inside & (left[..., None] == right)[:, None]).to(samples.left)
        k = same * self.energy.to(same)[:, None, None]
        if not self.centred:
            k = k + (inside.to(same) - same) * self.means.square().to(same)[:, None, None]
        trained = samples.tangent and self.step.weight.requires_grad
        return k, same * self.density.to(same)[:, None, None] if trained else None

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """The bins' means, 0 for padding."""
        if self.centred:
            return None
        words = self._words(x, torch.arange(self.step.positions, device=x.device))
        return (words != self._padding)[:, None].to(x) * self.means.to(x)[:, None]

    def _words(self, x: Tensor, places: Tensor) -> Tensor:
        """Words [places, n] of samples [n, d]."""
        step = self.step
        if step.tokens is not None:
            return x.T[step.tokens[places]]
        assert step.words is not None  # noqa: S101
        return step.words[places].to(x)[:, None].expand(-1, len(x))

    @property
    def _padding(self) -> int:
        return -1 if self.step.padding is None else self.step.padding
