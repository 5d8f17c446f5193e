"""What a node of a network's kernel must tell."""

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.pairs import Pairs, PositionMap
from lightning_graphon.ntk.infinite.setting import Setting
from lightning_graphon.tracing.steps import Step


@dataclass(frozen=True)
class Samples:
    """The samples of a tile.

    Attributes:
        left: Samples x [n, d], flattened.
        right: Samples x' [m, d].
        rows: Which of all samples x are.
        cols: Which of all samples x' are.
        paired: Whether x' is x, one by one.
        tangent: Whether tangent kernels are asked for.
    """

    left: Tensor
    right: Tensor
    rows: slice
    cols: slice
    paired: bool = False
    tangent: bool = True

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """Products [R, K, n, m] of values [R, K, n] of x and [R, K, m] of x'."""
        return (left * right)[..., None] if self.paired else left[..., None] * right[:, :, None, :]


class Node(ABC):
    """Kernels of one step, from those of its inputs.

    Attributes:
        step: The step.
        inputs: Nodes of its inputs.
        bin_of_unit: Bin [U] of each unit.
        bins: Number of bins K.
        places: For each input which positions are read; None for the same positions.
        atoms: Independent random arrays that the units are functions of, and which of their units [U, n], -1 for none;
            no array where they are known for certain.
        gaussian: Whether the units are jointly Gaussian.
        centred: Whether all means are zero.
        uses_squares: Whether each sample's own second moments of the inputs are needed.
        uses_means: Whether means of the inputs are needed.
        random_slope: Whether the derivative depends on the units, and not on numbers of each sample alone.
    """

    def __init__(self, step: Step, inputs: Sequence["Node"], setting: Setting) -> None:
        self.step, self.inputs = step, list(inputs)
        self.bin_of_unit = setting.bins(step)
        self.bins = int(self.bin_of_unit.max()) + 1
        self.places: list[PositionMap | None] = [None] * len(self.inputs)
        self.atoms: dict[int, Tensor] = dict(self.inputs[0].atoms) if self.inputs else {}
        self.gaussian: bool = all(node.gaussian for node in self.inputs)
        self.centred: bool = all(node.centred for node in self.inputs)
        self.uses_squares = self.uses_means = self.random_slope = False
        self.build(setting)

    def build(self, setting: Setting) -> None:
        """Read the step; the attributes above have their defaults here."""
        return

    def move(self, device: torch.device) -> None:
        """Move what was built to the device of the samples."""
        vars(self).update({name: _moved(value, device) for name, value in vars(self).items() if name != "inputs"})

    @property
    def drawn_inputs(self) -> dict[int, Pairs]:
        """Inputs whose kernels between all samples are needed before the walk, at these pairs; see `draw`."""
        return {}

    def draw(self, kernels: Sequence[Tensor]) -> None:
        """Receive the kernels [R, K, N, N] of `drawn_inputs`."""
        return

    @property
    def certain(self) -> bool:
        """Whether the units depend on no weight."""
        return not self.atoms

    def reads(self, number: int, pairs: Pairs) -> Pairs:
        """Pairs of the input `number` that these pairs of the output need."""
        places = self.places[number]
        return pairs if places is None else places.reads(pairs)

    def own_places(self, number: int, pairs: Pairs) -> Tensor:
        """Positions of the input `number` whose own moments are needed for these pairs of it."""
        return pairs.places

    @abstractmethod
    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """E[h h'] and the tangent kernel [R, K, n, m] at `pairs`, from those of the inputs at what it `reads`."""

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """Means [P, K, N] from those of the inputs, for samples [N, d]; None for zero."""
        return None

    def new_atom(self) -> dict[int, Tensor]:
        """An atom of its own."""
        return {next(_atoms): torch.arange(len(self.step.units))[:, None]}


_atoms = itertools.count()


def _moved(value: Any, device: torch.device) -> Any:
    """A copy on the device of tensors, and of lists and dataclasses of them; parameters stay where they are."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.to(device)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_moved(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        moved = copy.copy(value)
        for name, item in vars(value).items():
            object.__setattr__(moved, name, _moved(item, device))
        return moved
    return value
