"""Nodes without inputs: samples, and parameters or constants that are added or multiplied."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.pairs import Pairs
from lightning_graphon.ntk.infinite.setting import Setting, beyond_noise, bin_means
from lightning_graphon.tracing.steps import Input, Parameter


class InputNode(Node):
    """The samples, one bin for each unit."""

    step: Input

    def build(self, setting: Setting) -> None:
        """Entries [P, K] of the flattened sample."""
        self.centred = False
        self.entries = self.step.entries.new_empty(self.step.positions, self.bins)
        self.entries[:, self.bin_of_unit] = self.step.entries.T

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """Products of the entries."""
        left, right = samples.left.T[self.entries[pairs.first]], samples.right.T[self.entries[pairs.second]]
        return samples.outer(left, right), None

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """The entries."""
        return x.T[self.entries]


class ParameterNode(Node):
    """A parameter: independent from position to position but for a mean that stands out; a constant is what it is."""

    step: Parameter

    def build(self, setting: Setting) -> None:
        """Moments of each bin."""
        step, tensor = self.step, self.step.tensor
        values = tensor.detach().reshape(-1)[step.entries.to(tensor.device)].to("cpu", torch.float64)
        self.means = bin_means(values, self.bin_of_unit).T  # [P, K]
        self.squares = bin_means(values.square(), self.bin_of_unit).T
        self.products = None if step.name else bin_means(values[:, :, None] * values[:, None, :], self.bin_of_unit)
        if step.name:
            self.means = beyond_noise(self.means, self.squares, torch.bincount(self.bin_of_unit))
            self.atoms = self.new_atom()
        self.trained = bool(step.name) and tensor.requires_grad
        self.centred = not bool(self.means.any())

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """The same for all pairs of samples."""
        first, second = pairs.first, pairs.second
        same = (first == second)[:, None]
        if self.products is not None:
            k = self.products[:, first, second].T
        else:
            k = torch.where(same, self.squares[first], self.means[first] * self.means[second])
        n, m = len(samples.left), 1 if samples.paired else len(samples.right)
        k, t = (v.to(samples.left)[:, :, None, None].expand(-1, -1, n, m) for v in (k, same.expand_as(k).double()))
        return k, t if self.trained and samples.tangent else None

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """The bins' means."""
        return None if self.centred else self.means.to(x)[:, :, None].expand(-1, -1, len(x))
