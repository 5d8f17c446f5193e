"""The network inside a LightningModule, found by watching its `training_step` run on a probe batch."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_graphon._shared.module_state import preserve_module_state
from lightning_graphon.callbacks._module.probe import (
    holds_lists,
    labels_of,
    per_sample,
    samples,
    take,
    with_samples,
)
from lightning_graphon.callbacks._module.training_step import Outputs, TrainingStepObjective
from lightning_graphon.dynamics import ProbedNetwork, UnsupportedTrainingError

_OTHER_DIRECTION = 1e-3  # of gradients in single precision


class TrainingStepNetwork(ProbedNetwork):
    """What `training_step` does with a probe batch: inputs, network, outputs, loss.

    The network is the module that `training_step` calls where that is a single call of one tensor for another, else
    `training_step` itself up to the tensor that the loss is computed from. Outputs [N·B, ...] with B rows per sample
    are read as [N, B, ...].

    Args:
        pl_module: The LightningModule.
        objective: Runs its `training_step`.
        batch: The probe batch.
        masks: By the names in the LightningModule.
        part_of: The network on all samples.

    Raises:
        UnsupportedTrainingError: `training_step` has not one tensor of outputs, with rows for each sample.
    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        objective: TrainingStepObjective,
        batch: Any,
        masks: Mapping[str, Tensor] | None = None,
        part_of: ProbedNetwork | None = None,
    ) -> None:
        self._objective, self._batch = objective, batch
        # In eval mode: a synchronised batch norm in train mode would wait for the other processes.
        with preserve_module_state(pl_module):
            pl_module.eval()
            found = _find_outputs(objective, batch, type(pl_module).__name__)
            output = found.seen.output(found.places[0])
            rows = _single_call(found, samples(batch)) if len(output) == samples(batch) else None
            module, inputs = rows or _whole_step(pl_module, objective, batch, found)
        shape, places, among = output.shape, found.places, found.among

        def loss(outputs: Tensor) -> Tensor:
            return objective.watched(batch, replace={places[0]: outputs.reshape(shape)}, among=among)[0]

        super().__init__(module, inputs, loss, masks=masks, root=pl_module, labels=labels_of(batch), part_of=part_of)

    def first(self, count: int) -> ProbedNetwork:
        """The same on the first `count` samples, without a loss."""
        # One call with one tensor needs no batch, which may hold more than tensors and is else read anew.
        return self._with_loss(count) if isinstance(self.module, _UpToOutputs) else super().first(count)

    def _with_loss(self, count: int) -> ProbedNetwork:
        assert isinstance(self.root, pl.LightningModule)  # noqa: S101
        return TrainingStepNetwork(self.root, self._objective, take(self._batch, count), self.masks, part_of=self)

    def couples_samples(self) -> bool:
        """Whether the loss of a sample depends on which others are in the batch, as that of contrastive losses does.

        Then half of the batch alone has a gradient in another direction. That of a mean, weighted or not, has the same.
        """
        half = samples(self._batch) // 2
        slopes: list[Tensor] = []
        with self.evaluated(), torch.enable_grad(), suppress(Exception):  # recording the loss will say what is wrong
            outputs = self.outputs().detach()
            if half:
                slopes = [_slope(self.loss, outputs)[:half], _slope(self._with_loss(half).loss, outputs[:half])]
        directions = [slope / slope.norm() for slope in slopes if slope.norm() > 0]
        return len(directions) == 2 and bool((directions[0] - directions[1]).norm() > _OTHER_DIRECTION)


class _UpToOutputs(nn.Module):
    """`training_step` up to the network's outputs, as a module of the batch's tensors.

    Args:
        pl_module: Holds the parameters.
        objective: Runs its `training_step`.
        batch: Where the tensors belong.
        found: Where its outputs are.
    """

    def __init__(self, pl_module: nn.Module, objective: TrainingStepObjective, batch: Any, found: Outputs) -> None:
        super().__init__()
        self.pl_module = pl_module
        # Which modules to watch has been asked before: a kernel puts other tensors in the place of trainable ones.
        self._of = (objective, batch, found.places[0], found.among)

    def forward(self, *tensors: Tensor) -> Tensor:
        objective, batch, place, among = self._of
        output: Tensor = objective.watched(with_samples(batch, tensors), among=among)[1].output(place)
        return output if len(output) == len(tensors[0]) else output.reshape(len(tensors[0]), -1, *output.shape[1:])


def _slope(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    leaf = outputs.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def _single_call(found: Outputs, count: int) -> tuple[nn.Module, Tensor] | None:
    """The one module that was called, with one tensor for another; None for anything else."""
    if len(found.seen.calls) == 1 and isinstance(found.seen.outputs[0], Tensor):
        module, args, kwargs = found.seen.calls[0]
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].grad_fn is None:
            return (module, args[0].detach()) if len(args[0]) == count else None
    return None


def _whole_step(
    pl_module: pl.LightningModule, objective: TrainingStepObjective, batch: Any, found: Outputs
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """`training_step` up to the outputs, as a function of the batch's tensors.

    Raises:
        UnsupportedTrainingError: Inputs are a list, or rows of outputs cannot be told apart.
    """
    name, output = type(pl_module).__name__, found.seen.output(found.places[0])
    module, inputs = _UpToOutputs(pl_module, objective, batch, found), tuple(per_sample(batch))
    if not inputs or holds_lists(batch):
        raise UnsupportedTrainingError(
            f"a batch of {name} has a list with an entry per sample, as of images of several sizes, and a kernel needs "
            "tensors: stack them in the collate function"
        )
    if len(output) != len(inputs[0]) and not _rows_are_in_order(module, inputs, output):
        raise UnsupportedTrainingError(
            f"the output in {name}.training_step is {tuple(output.shape)}, in which the rows of {len(inputs[0])} "
            "samples cannot be told apart: return [samples, rows, ...]"
        )
    return module, inputs


def _rows_are_in_order(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> bool:
    """Whether several rows per sample are those of the first sample, of the second, and so on."""
    count = len(inputs[0])
    try:
        part = module(*(x[: (count + 1) // 2] for x in inputs)).flatten(0, 1)
    except Exception:  # whatever user code does with half of a batch
        return False
    whole = count == 1 or len(part) < len(output)
    return whole and torch.allclose(part, output[: len(part)], rtol=1e-3, atol=1e-5)


def _find_outputs(objective: TrainingStepObjective, batch: Any, name: str) -> Outputs:
    """Where the network's outputs are.

    Raises:
        UnsupportedTrainingError: There are none or several, or not a floating-point tensor with rows for each sample.
    """
    try:
        found = objective.find_outputs(batch)
    except Exception as error:
        objective.observed(batch)  # an error of its own, if it works in no mode
        raise UnsupportedTrainingError(
            f"{name}.training_step works in train mode only ({type(error).__name__}: {error}), as with networks for "
            "detection, and an analysis evaluates in eval mode"
        ) from error
    count, outputs = samples(batch), [found.seen.output(place) for place in found.places]
    if len(outputs) != 1:
        several = f"has {len(outputs)} outputs, of several networks or of one that is called several times"
        what = several if outputs else "calls none of its modules"
        raise UnsupportedTrainingError(f"{name}.training_step {what}: there is no single tensor of outputs")
    if not count:
        raise UnsupportedTrainingError(
            f"no samples can be told apart in a batch of {name}, which is a {type(batch).__name__}: let the collate "
            "function return tensors with a row per sample, in a tuple, dict or dataclass"
        )
    output = outputs[0]
    if output.ndim == 0 or len(output) < count or len(output) % count:
        raise UnsupportedTrainingError(
            f"the output in {name}.training_step is {tuple(output.shape)}, not a tensor with rows for each sample"
        )
    return found
