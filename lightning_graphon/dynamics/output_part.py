r"""Part of a probe's outputs, from which the fall of the whole loss is estimated.

A loss that adds up over samples and positions (tokens, pixels) falls by what each of them contributes. With rows S of
the kernel drawn at random, :math:`L_0 + s\,(L(f_S, f_{rest} = f_0) - L_0)` estimates it without bias, with s the
inverse of the fraction drawn; the gradient has the same factor, so that :math:`Θ_{SS}\, s\, g_S` estimates
:math:`(Θ g)_S`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon.dynamics.recorded_loss import RecordedLoss


@dataclass(frozen=True)
class OutputPart:
    """Some samples and positions of a network's outputs [N, ...], with all numbers that the loss couples there.

    Attributes:
        samples: The first n of the samples.
        entries: Place of each number in one sample's flattened outputs, [P positions, V coupled numbers], int64.
    """

    samples: int
    entries: Tensor

    def rows(self, outputs: Tensor) -> Tensor:
        """Their part of outputs [N, ...], [n·P, V]."""
        return outputs[: self.samples].flatten(1)[:, self.entries].flatten(0, 1)

    def insert(self, rows: Tensor, outputs: Tensor) -> Tensor:
        """Outputs [N, ...] with other numbers in the part's place."""
        flat = outputs.flatten(1).clone()
        flat[: self.samples, self.entries.flatten()] = rows.reshape(self.samples, -1)
        return flat.reshape(outputs.shape)


class PartLoss:
    """The loss as a function of part of the outputs, extended to all of them.

    Args:
        loss: Of all outputs.
        outputs: [N, ...], where all of them start.
        part: Which are followed.
    """

    def __init__(self, loss: RecordedLoss, outputs: Tensor, part: OutputPart) -> None:
        self._loss, self._outputs, self._part = loss, outputs.double(), part
        self._scale = outputs.numel() / (part.samples * part.entries.numel())
        self._start = loss(self._outputs)

    def __call__(self, rows: Tensor, targets: None = None) -> Tensor:
        """Estimated loss, differentiable."""
        return self._start + self._scale * (self._loss(self._part.insert(rows, self._outputs)) - self._start)

    def value_and_gradient(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Estimated loss and its gradient in the rows [n·P, V], both without history."""
        value, gradient = self._loss.value_and_gradient(self._part.insert(rows, self._outputs))
        return self._start + self._scale * (value - self._start), self._scale * self._part.rows(gradient)


def output_positions(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """Which numbers of a sample's outputs the loss couples, such as the scores of all words for one token.

    Args:
        loss: Outputs -> scalar, twice differentiable.
        outputs: [N, ...]; those of [N, C] are taken to be coupled.

    Returns:
        Places in the flattened outputs of a sample, [P positions, V coupled numbers], int64.

    >>> targets = torch.zeros(2, 3, dtype=torch.int64)
    >>> words_last = lambda outputs: torch.nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    >>> output_positions(words_last, torch.rand(2, 3, 5)).shape
    torch.Size([3, 5])
    """
    shape = outputs.shape[1:]
    places = torch.arange(math.prod(shape)).reshape(shape)
    if len(shape) < 2:
        return places.reshape(1, -1)
    coupled = _coupled_with_one(loss, outputs).nonzero()
    coupled_axes = [axis for axis in range(len(shape)) if len(coupled[:, axis].unique()) > 1]
    others = [axis for axis in range(len(shape)) if axis not in coupled_axes]
    return places.permute(*others, *coupled_axes).reshape(-1, math.prod(shape[axis] for axis in coupled_axes))


def _coupled_with_one(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """Numbers of a sample [...], bool, that change the gradient in one of them: a row of the Hessian."""
    with torch.enable_grad():
        leaf = outputs.detach().double().requires_grad_()
        gradient = torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0]
        # Where the gradient is largest, since padding and masked pixels have none.
        place = int(gradient.detach().abs().argmax())
        row = torch.zeros_like(leaf)
        if gradient.requires_grad:  # a loss that is linear has no Hessian, and couples nothing
            found = torch.autograd.grad(gradient.flatten()[place], leaf, allow_unused=True)[0]
            row = row if found is None else found
    sample = place // leaf[0].numel()
    return row[sample].abs() > 1e-12 * row.abs().max()
