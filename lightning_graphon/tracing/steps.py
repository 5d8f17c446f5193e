"""What a network's forward pass does to its units, one step after the other.

A step gives an array [samples, units, positions]: units are neurons or channels, positions are pixels or tokens. Two
steps may have the same units (a ReLU keeps its neurons, a residual stream is one set of them); each has its own
positions, numbered from 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Step:
    """One step; subclasses say which.

    Attributes:
        label: What messages call it, as "layer 'conv1' (Conv2d)".
        units: Ids [U] of the units.
        positions: Number P of positions.
        inputs: Numbers of the steps that it reads.
        batched: Whether it depends on the samples; parameters do not.
    """

    label: str
    units: Tensor
    positions: int
    inputs: tuple[int, ...] = ()
    batched: bool = True


@dataclass(eq=False)
class Input(Step):
    """The samples; entry (unit, position) is the entry `entries[unit, position]` of the flattened sample."""

    entries: Tensor = field(kw_only=True)


@dataclass(eq=False)
class Parameter(Step):
    """A parameter that is added or multiplied (`name`), or a constant (None); `entries` as of `Input`."""

    name: str | None = field(kw_only=True)
    tensor: Tensor = field(kw_only=True)
    entries: Tensor = field(kw_only=True)


@dataclass(eq=False)
class Affine(Step):
    """Linear or Conv: output position p reads, by its feature f, unit `features[f]` at position `taps[tap_of[f], p]`.

    Attributes:
        module: The layer, or None.
        weight_name: Qualified name of the weight [out, in / groups, *taps].
        weight: The weight itself.
        bias_name: Name of the bias, or None.
        bias: The bias, or None.
        features: Number [F] of each feature's unit among those of the input step.
        tap_of: Number [F] of each feature's tap.
        taps: Input positions [taps, P]; -1 is outside, where all is 0.
        groups: Of a convolution.
        rows: Rows of the weight that are this layer's; None for all.
    """

    module: nn.Module | None = field(kw_only=True)
    weight_name: str = field(kw_only=True)
    weight: Tensor = field(kw_only=True)
    bias_name: str | None = field(kw_only=True)
    bias: Tensor | None = field(kw_only=True)
    features: Tensor = field(kw_only=True)
    tap_of: Tensor = field(kw_only=True)
    taps: Tensor = field(kw_only=True)
    groups: int = field(default=1, kw_only=True)
    rows: slice | None = field(default=None, kw_only=True)

    @property
    def fan_in(self) -> int:
        """Inputs of one unit."""
        return int(self.weight[0].numel())

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight, or a mask of its shape, as [out, F], with zeros between groups."""
        rows = (tensor if self.rows is None else tensor[self.rows]).flatten(1)
        if self.groups == 1:
            return rows
        full = rows.new_zeros(self.groups, len(rows) // self.groups, self.groups, rows.shape[1])
        for group, part in enumerate(rows.unflatten(0, (self.groups, -1))):
            full[group, :, group] = part
        return full.flatten(2).flatten(0, 1)

    def vector(self, tensor: Tensor) -> Tensor:
        """The layer's own part of a bias."""
        return tensor if self.rows is None else tensor[self.rows]


@dataclass(eq=False)
class Pointwise(Step):
    """An elementwise function of one step, with its units and positions; by torch's name where it is one function."""

    function: Callable[[Tensor], Tensor] = field(kw_only=True)
    source: object = field(default=None, kw_only=True)

    @cached_property
    def linear(self) -> tuple[float, float] | None:
        """a and b of a function a z + b; None of another."""
        z = torch.tensor([0.0, 1.0, -1.0, 3.0, -0.7, 0.2], dtype=torch.float64)
        values = self.function(z)
        b, a = float(values[0]), float(values[1] - values[0])
        near = 4e-12 * max(abs(a), abs(b), 1e-30)
        return (a, b) if bool(((values - (a * z + b)).abs() <= near).all()) else None


@dataclass(frozen=True)
class Part:
    """Where the units and positions of a step are found in one of its inputs; -1 where they are not in it."""

    units: Tensor
    positions: Tensor


@dataclass(eq=False)
class Join(Step):
    """A step of several inputs: `Sum`, `Product` or `Concatenation`."""

    parts: tuple[Part, ...] = field(kw_only=True)


@dataclass(eq=False)
class Sum(Join):
    """Σ coefficient · input."""

    coefficients: tuple[float, ...] = field(kw_only=True)


@dataclass(eq=False)
class Product(Join):
    """Elementwise product of two inputs."""


@dataclass(eq=False)
class Concatenation(Join):
    """Inputs side by side, units or positions."""


@dataclass(eq=False)
class Spatial(Step):
    """The same linear map over positions for each unit: pooling, means over tokens.

    Attributes:
        weights: Matrix [P, positions of the input].
    """

    weights: Tensor = field(kw_only=True)


@dataclass(eq=False)
class Norm(Step):
    """LayerNorm, RMSNorm, GroupNorm, with the weights and biases of each unit.

    Attributes:
        module: The layer, or what calls the function.
        groups: Group [U] of each unit; each is normalised for itself.
        over_positions: Whether the averages run over positions, too.
        centred: Whether the mean is subtracted.
        eps: Added to the variance.
        weight: Weight, whose entry of unit and position is `entries[unit, position]`; or None.
        weight_name: Its name, or None.
        bias: Bias, or None.
        bias_name: Its name, or None.
        entries: See `weight`.
    """

    module: nn.Module = field(kw_only=True)
    groups: Tensor = field(kw_only=True)
    over_positions: bool = field(kw_only=True)
    centred: bool = field(kw_only=True)
    eps: float = field(kw_only=True)
    weight: Tensor | None = field(kw_only=True)
    weight_name: str | None = field(kw_only=True)
    bias: Tensor | None = field(kw_only=True)
    bias_name: str | None = field(kw_only=True)
    entries: Tensor = field(kw_only=True)


@dataclass(eq=False)
class BatchNorm(Step):
    """BatchNorm in eval: (z - mean) / √(variance + eps), times weight plus bias, of each unit; None as in torch.

    Attributes:
        module: The layer, or what calls the function.
        place: Entry [U] of weight and bias of each unit; `mean` and `variance` are in the order of the units.
    """

    module: nn.Module = field(kw_only=True)
    place: Tensor = field(kw_only=True)
    mean: Tensor = field(kw_only=True)
    variance: Tensor = field(kw_only=True)
    eps: float = field(kw_only=True)
    weight: Tensor | None = field(kw_only=True)
    weight_name: str | None = field(kw_only=True)
    bias: Tensor | None = field(kw_only=True)
    bias_name: str | None = field(kw_only=True)


@dataclass(eq=False)
class Embedding(Step):
    """Rows of a weight [words, U].

    Attributes:
        tokens: Entries [P] of the flattened sample that are the words at each position, or None.
        words: The words [P] themselves, or None.
        padding: Word whose row is zero, or None.
    """

    weight_name: str = field(kw_only=True)
    weight: Tensor = field(kw_only=True)
    tokens: Tensor | None = field(kw_only=True)
    words: Tensor | None = field(kw_only=True)
    padding: int | None = field(kw_only=True)


@dataclass(eq=False)
class Attention(Step):
    """softmax(q kᵀ · scale + mask) v of one or more heads; inputs are q, k, v.

    Attributes:
        query: Units [heads, width] and positions [queries] of the first input.
        key: Of the second, with positions [keys].
        value: Of the third.
        scale: Factor of the logits.
        mask: Added to the logits, [queries, keys] or [heads, queries, keys], or None.
    """

    query: Part = field(kw_only=True)
    key: Part = field(kw_only=True)
    value: Part = field(kw_only=True)
    scale: float = field(kw_only=True)
    mask: Tensor | None = field(kw_only=True)


@dataclass(eq=False)
class LinearAttention(Attention):
    """(q kᵀ · scale ∘ mask) v without a softmax; the mask, or None for ones, is multiplied."""
