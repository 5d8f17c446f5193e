"""Who needs whom: each record passes need from what it gives to what it reads."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_EPS = 1e-6  # rounding of sums that are the same at every position, relative to the largest


class Record:
    """One thing that a forward pass does."""

    def pull(self, need: Tensor) -> None:
        """Mark in `need` [labels] what is read for what is needed."""
        raise NotImplementedError


@dataclass(eq=False)
class Used(Record):
    """Outputs of the network, and inputs of what nobody knows: all are needed."""

    labels: Tensor

    def pull(self, need: Tensor) -> None:
        """As `Record`."""
        need[self.labels] = True


@dataclass(eq=False)
class Reads(Record):
    """Units `outputs` [n] that read `inputs` [n]."""

    inputs: Tensor
    outputs: Tensor

    def pull(self, need: Tensor) -> None:
        """As `Record`."""
        need[self.inputs[need[self.outputs]]] = True


@dataclass(eq=False)
class LayerCall(Record):
    """One call of a linear map with a weight, as a matrix [out, in].

    Attributes:
        path: Name of the module.
        module: The module.
        weight: Its weight, as stored.
        bias: Its bias, or None.
        inputs: Labels [in] of what it reads.
        outputs: Labels [out] of what it gives.
        varies: Whether [in] an input varies.
        support: Where [out, in] a weight is kept.
        constants: The input itself, zero where it varies.
        run: Output of an input and a weight, without bias.
        out_dim: Axis of the units in the output.
        in_dim: Axis of the units in the input.
        in_axis: Axis of the inputs in the weight; None where a convolution has groups.
        folds: Whether a constant can be added to the bias.
        calls: All calls with this weight.
        fold: Inputs [in] that are constant and are added to the bias; found by `pull`.
    """

    path: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    outputs: Tensor
    varies: Tensor
    support: Tensor
    constants: Tensor
    run: Callable[[Tensor, Tensor], Tensor]
    out_dim: int
    in_dim: int
    in_axis: int | None
    folds: bool
    calls: list["LayerCall"] = field(default_factory=list)
    fold: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def nonzero(self) -> Tensor:
        """Inputs [in] that are constants other than zero."""
        return self.constants.movedim(self.in_dim, -1).flatten(0, -2).ne(0).any(0)

    def outcome(self, inputs: Tensor) -> Tensor:
        """What constants of some inputs [in] add to the output, in double precision."""
        shape = [1] * self.constants.ndim
        shape[self.in_dim] = -1
        return self.run((self.constants * inputs.reshape(shape)).double(), self.weight.detach().double())

    def added(self) -> Tensor:
        """What the folded inputs add to each output [out]."""
        found = self.outcome(self.fold).movedim(self.out_dim, -1).flatten(0, -2)
        return found[0]

    def pull(self, need: Tensor) -> None:
        """As `Record`; constants that can be folded are not needed."""
        wanted = need[self.outputs]
        self.fold = self._foldable(wanted)
        read = (self.support & wanted[:, None] & ~self.fold).any(0)
        need[self.inputs[read]] = True

    def _foldable(self, wanted: Tensor) -> Tensor:
        constant = ~self.varies
        if len(self.calls) > 1:  # one bias for all calls: only zeros add the same everywhere
            for call in self.calls:
                constant = constant & ~call.varies & ~call.nonzero
            return constant
        if not bool(self.nonzero.any()):
            return constant
        found = self.outcome(constant).movedim(self.out_dim, -1).flatten(0, -2)
        scale = _EPS * found.abs().max().clamp_min(1e-30)
        # At the border of zero padding a constant adds less than inside.
        wrong = (found.amax(0) - found.amin(0) > scale) if self.folds else (found.abs() > 0).any(0)
        stays = (self.support & (wrong & wanted)[:, None]).any(0) & self.nonzero
        return constant & ~stays
