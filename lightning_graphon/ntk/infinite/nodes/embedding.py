"""Embeddings: k = E[e²] and t = 1 where the tokens are equal, 0 elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.pairs import Nowhere, Pairs
from lightning_graphon.ntk.infinite.setting import Setting, bin_means
from lightning_graphon.tracing.steps import Embedding


class EmbeddingNode(Node):
    """A fresh atom of independent rows; which rows, the input says, or they are always the same."""

    step: Embedding

    def build(self, setting: Setting) -> None:
        """Second moments of each bin, over all words but that of the padding."""
        step, words = self.step, torch.arange(len(self.step.weight))
        self.atoms, self.gaussian, self.centred = self.new_atom(), True, True
        self.places = [Nowhere(node.step.positions) for node in self.inputs]  # the tokens are read from the samples
        own = words if step.padding is None else words[words != step.padding]
        mask = setting.mask(step.weight_name, step.weight)[own]
        weight = step.weight.detach().to("cpu", torch.float64)[own]
        self.density = bin_means(mask.mean(0), self.bin_of_unit)
        self.energy = bin_means((weight.square() * mask).mean(0), self.bin_of_unit)
        if setting.propagate == "density":
            kept = (weight.square() * mask).sum() / mask.sum().clamp_min(1)
            self.energy = float(kept) * self.density

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """Where tokens are equal."""
        same = self._same(pairs, samples)[:, None].to(samples.left)
        k = same * self.energy.to(same)[:, None, None]
        trained = samples.tangent and self.step.weight.requires_grad
        return k, same * self.density.to(same)[:, None, None] if trained else None

    def _same(self, pairs: Pairs, samples: Samples) -> Tensor:
        step = self.step
        if step.tokens is None:
            assert step.words is not None  # noqa: S101
            first, second = step.words[pairs.first], step.words[pairs.second]
            shape = (len(samples.left), 1 if samples.paired else len(samples.right))
            return ((first == second) & (first != self._padding))[:, None, None].expand(-1, *shape)
        left, right = samples.left.T[step.tokens[pairs.first]], samples.right.T[step.tokens[pairs.second]]
        same = left == right if samples.paired else left[:, :, None] == right[:, None, :]
        same = same[..., None] if samples.paired else same
        return same & (left != self._padding)[..., None]

    @property
    def _padding(self) -> int:
        return -1 if self.step.padding is None else self.step.padding
