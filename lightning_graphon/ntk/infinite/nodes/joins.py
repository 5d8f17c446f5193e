"""Sums, products and concatenations of independent inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.pairs import Pairs, Taps
from lightning_graphon.ntk.infinite.setting import Setting
from lightning_graphon.tracing.steps import Concatenation, Join, Product, Sum
from lightning_graphon.tracing.tracer import refusal


class JoinNode(Node):
    """Inputs whose units and positions are found in the output's."""

    step: Join

    def build(self, setting: Setting) -> None:
        """Where the output's bins and positions are in each input; -1 where they are not."""
        self._join_atoms()
        self.input_bins: list[Tensor] = []
        for number, (node, part) in enumerate(zip(self.inputs, self.step.parts, strict=True)):
            inside = part.units >= 0
            bins = torch.full((self.bins,), -1)
            bins[self.bin_of_unit[inside]] = node.bin_of_unit[part.units[inside]]
            self.input_bins.append(bins)
            same = torch.equal(part.positions, torch.arange(node.step.positions))
            self.places[number] = None if same else Taps(part.positions[None], node.step.positions)

    def _join_atoms(self) -> None:
        """Units of the inputs are independent unless they are functions of the same unit of the same atom."""
        self.atoms = {}
        for node, part in zip(self.inputs, self.step.parts, strict=True):
            for atom, units in node.atoms.items():
                own = _take(units + 1, part.units, 0) - 1
                before = self.atoms.get(atom)
                if before is not None and bool(((own[:, :, None] == before[:, None]) & (own[:, :, None] >= 0)).any()):
                    others = " and ".join(node.step.label for node in self.inputs)
                    raise refusal(f"{self.step.label} of {others}, which depend on the same weights,")
                self.atoms[atom] = own if before is None else torch.cat([before, own], 1)

    def at(self, number: int, values: Tensor | None, pairs: Pairs, inputs: Pairs) -> Tensor | None:
        """Kernels of an input [pairs, K, n, m] at the output's pairs and bins, zero where it has none."""
        if values is None:
            return None
        places = self.places[number]
        if isinstance(places, Taps):
            values = _take(values, places.rows(pairs, inputs)[0], 0)
        return self._in_bins(number, values)

    def _in_bins(self, number: int, values: Tensor) -> Tensor:
        bins = self.input_bins[number]
        if torch.equal(bins, torch.arange(values.shape[1])):
            return values
        return _take(values, bins, 1)

    def means(self, inputs: Sequence[Moments]) -> list[Tensor | None]:
        """Means [P, K, N] of each input at the output's positions and bins."""
        found = []
        for number, (moments, part) in enumerate(zip(inputs, self.step.parts, strict=True)):
            mean = moments.mean
            found.append(None if mean is None else self._in_bins(number, _take(mean, part.positions, 0)))
        return found


def _take(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries along a dimension; 0 for the index -1."""
    if not values.shape[dim]:  # an input that has none of the positions that are asked for
        return values.new_zeros([len(index) if d == dim else size for d, size in enumerate(values.shape)])
    taken = values.index_select(dim, index.clamp_min(0).to(values.device))
    if bool((index < 0).any()):
        taken.index_fill_(dim, (index < 0).nonzero()[:, 0].to(values.device), 0)
    return taken


class SumNode(JoinNode):
    """k = Σ c² k_i + Σ_{i≠j} c_i c_j μ_i μ_j', t = Σ c² t_i, μ = Σ c μ_i."""

    step: Sum

    def build(self, setting: Setting) -> None:
        """Whether there are cross terms."""
        super().build(setting)
        self.uses_means = sum(not node.centred for node in self.inputs) > 1

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """Sums, and products of the means of different inputs."""
        k = t = None
        for number, (field, c) in enumerate(zip(inputs, self.step.coefficients, strict=True)):
            k = _add(k, self.at(number, field.k, pairs, field.pairs), c * c)
            t = _add(t, self.at(number, field.t, pairs, field.pairs), c * c)
        assert k is not None  # noqa: S101
        return (self._add_cross_terms(k, inputs, pairs, samples) if self.uses_means else k), t

    def _add_cross_terms(self, k: Tensor, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> Tensor:
        left, right = (self.means([getattr(f, side) for f in inputs]) for side in ("left", "right"))
        coefficients = self.step.coefficients
        for i, a in enumerate(left):
            for j, b in enumerate(right):
                if i != j and a is not None and b is not None:
                    product = samples.outer(a[pairs.first], b[pairs.second])
                    k = k + coefficients[i] * coefficients[j] * product
        return k

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """Sum of the means."""
        found = [c * m for c, m in zip(self.step.coefficients, self.means(inputs), strict=True) if m is not None]
        return torch.stack(found).sum(0) if found else None


def _add(total: Tensor | None, part: Tensor | None, factor: float) -> Tensor | None:
    if part is None:
        return total
    scaled = part if factor == 1 else factor * part
    return scaled if total is None else total + scaled


class ProductNode(JoinNode):
    """k = k_a k_b, t = t_a k_b + k_a t_b, μ = μ_a μ_b."""

    step: Product

    def build(self, setting: Setting) -> None:
        """A product with what is known, or with a parameter, keeps a Gaussian one."""
        super().build(setting)
        self.gaussian = self.gaussian and any(node.certain or not node.inputs for node in self.inputs)
        self.centred, self.random_slope = any(node.centred for node in self.inputs), True

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """Products of independent factors."""
        (ka, ta), (kb, tb) = (
            (self.at(i, f.k, pairs, f.pairs), self.at(i, f.t, pairs, f.pairs)) for i, f in enumerate(inputs)
        )
        assert ka is not None  # noqa: S101
        assert kb is not None  # noqa: S101
        return ka * kb, _add(None if ta is None else ta * kb, None if tb is None else tb * ka, 1.0)

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """Product of the means."""
        left, right = self.means(inputs)
        return None if left is None or right is None else left * right


class ConcatenationNode(JoinNode):
    """Each input's kernels at its own units and positions; products of means between positions of different inputs."""

    step: Concatenation

    def build(self, setting: Setting) -> None:
        """Means meet where the inputs are positions of the same units."""
        super().build(setting)
        self.uses_means = self._shares_units and not all(node.centred for node in self.inputs)

    @property
    def _shares_units(self) -> bool:
        return sum((part.units >= 0).long() for part in self.step.parts).max() > 1  # type: ignore[union-attr, return-value]

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """Sums of what is zero elsewhere."""
        k = t = None
        for number, field in enumerate(inputs):
            k = _add(k, self.at(number, field.k, pairs, field.pairs), 1.0)
            t = _add(t, self.at(number, field.t, pairs, field.pairs), 1.0)
        assert k is not None  # noqa: S101
        if self.uses_means:
            left, right = (self.mean([getattr(f, side) for f in inputs], samples.left) for side in ("left", "right"))
            k = k + self._between(pairs, samples, left, right)
        return k, t

    def _between(self, pairs: Pairs, samples: Samples, left: Tensor | None, right: Tensor | None) -> Tensor | float:
        if left is None or right is None:
            return 0.0
        owner = torch.stack([part.positions >= 0 for part in self.step.parts]).long().argmax(0)
        different = owner[pairs.first] != owner[pairs.second]
        return samples.outer(left[pairs.first], right[pairs.second]) * different.to(left)[:, None, None, None]

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """Each input's own."""
        found = [m for m in self.means(inputs) if m is not None]
        return torch.stack(found).sum(0) if found else None
