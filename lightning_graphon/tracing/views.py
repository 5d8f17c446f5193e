"""Tensors of the forward pass as units at positions of a step, through reshapes, slices and transposes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon.tracing.steps import Step


@dataclass(frozen=True)
class View:
    """A tensor whose entries are entries of a step's array.

    Attributes:
        index: Number of the step.
        step: The step itself.
        codes: Place of each entry in the array [samples, units, positions], flattened; -1 is zero. Reshapes and slices
            do to them what they do to the tensor.
    """

    index: int
    step: Step
    codes: Tensor

    def with_codes(self, codes: Tensor) -> "View":
        """Another view of the same step."""
        return View(self.index, self.step, codes)

    @property
    def sample(self) -> Tensor:
        """Sample of each entry; -1 outside."""
        return self.codes // (len(self.step.units) * self.step.positions)

    @property
    def unit(self) -> Tensor:
        """Number of each entry's unit among those of the step; -1 outside."""
        unit = self.codes // self.step.positions % len(self.step.units)
        return torch.where(self.codes < 0, -1, unit)

    @property
    def position(self) -> Tensor:
        """Position of each entry; -1 outside."""
        return torch.where(self.codes < 0, -1, self.codes % self.step.positions)

    def read(self, values: Tensor) -> Tensor:
        """The tensor, from the step's array."""
        codes = self.codes.to(values.device)
        return torch.where(codes < 0, 0, values.reshape(-1)[codes])

    def write(self, tensor: Tensor, samples: int) -> Tensor:
        """The step's array [samples, units, positions], from the tensor."""
        size = (samples if self.step.batched else 1) * len(self.step.units) * self.step.positions
        out = tensor.new_zeros(size).index_put((self.codes.reshape(-1).to(tensor.device),), tensor.reshape(-1))
        return out.unflatten(0, (-1, len(self.step.units), self.step.positions))


def encode(samples: Tensor | int, units: Tensor, positions: Tensor, step: Step) -> Tensor:
    """Codes of samples, units and positions, which broadcast."""
    return (samples * len(step.units) + units) * step.positions + positions


def constant_along(t: Tensor, *dims: int) -> Tensor | None:
    """The tensor with these dimensions removed if it does not change along them, else None."""
    first = t
    for dim in sorted(dims, reverse=True):
        first = first.narrow(dim, 0, 1)
    if not bool((t == first).all()):
        return None
    for dim in sorted(dims, reverse=True):
        first = first.squeeze(dim)
    return first


def array_layout(shape: Sequence[int], channels_last: bool) -> tuple[Tensor, int, int, Tensor]:
    """Which axis of a tensor without samples is that of the units.

    Returns:
        Codes of its entries, number of units, of positions, and the entries [units, positions].
    """
    sizes = [*shape]
    wide = [dim for dim, size in enumerate(sizes) if size > 1]
    axis = (len(sizes) - 1 if channels_last else 0) if len(wide) != 1 else wide[0]
    if len(wide) > 1 and len(sizes) == 4 and not channels_last:
        axis = 1  # of an added [1, C, H, W]
    entries = torch.arange(max(1, torch.Size(sizes).numel())).reshape(sizes)
    table = entries.movedim(axis, 0).reshape(sizes[axis], -1) if sizes else entries.reshape(1, 1)
    codes = torch.empty_like(entries)
    codes.view(-1)[table.reshape(-1)] = torch.arange(table.numel())
    return codes, *table.shape, table
