"""The network inside a LightningModule, found by watching its `training_step` run on a probe batch."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_graphon._shared.model_io import is_float
from lightning_graphon._shared.module_state import preserve_module_state
from lightning_graphon.callbacks._module.call_recorder import ModuleCallRecorder, trainable_modules
from lightning_graphon.callbacks._module.probe import draw_probe, labels_of, per_sample, samples, take, with_samples
from lightning_graphon.callbacks._module.training_step import TrainingStepObjective
from lightning_graphon.dynamics import ProbedNetwork, UnsupportedTrainingError


class TrainingStepNetwork(ProbedNetwork):
    """What `training_step` does with a probe batch: inputs, network, outputs, loss.

    The network is the module that `training_step` calls where that is a single call with a single tensor, else
    `training_step` itself up to the last module's outputs.

    Args:
        pl_module: The LightningModule.
        objective: Runs its `training_step`.
        batch: The probe batch.
        masks: By the names in the LightningModule.

    Raises:
        UnsupportedTrainingError: `training_step` has not one tensor of outputs, with a row for each sample.
    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        objective: TrainingStepObjective,
        batch: Any,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        # In eval mode: a synchronised batch norm in train mode would wait for the other processes.
        with preserve_module_state(pl_module), torch.enable_grad():
            pl_module.eval()
            seen = objective.watched(batch)[1]
            final = _final_call(seen, samples(batch), type(pl_module).__name__)
        self._objective, self._batch = objective, batch
        single = _single_call(seen)
        module = single[0] if single else _UpToOutputs(pl_module, objective, batch, final)
        inputs = single[1].detach() if single else tuple(per_sample(batch))

        modules = trainable_modules(pl_module)

        def loss(outputs: Tensor) -> Tensor:
            return objective.watched(batch, replace={final: outputs}, among=modules)[0]

        super().__init__(module, inputs, loss, masks=masks, root=pl_module, labels=labels_of(batch))

    def first(self, count: int) -> ProbedNetwork:
        """The same on the first `count` samples: the batch may hold more than tensors, and is read anew."""
        assert isinstance(self.root, pl.LightningModule)  # noqa: S101
        return TrainingStepNetwork(self.root, self._objective, take(self._batch, count), self.masks)


class _UpToOutputs(nn.Module):
    """`training_step` up to the network's outputs, as a module of the batch's tensors.

    Args:
        pl_module: Holds the parameters.
        objective: Runs its `training_step`.
        batch: Where the tensors belong.
        final: Number of the call whose result is the output.
    """

    def __init__(self, pl_module: nn.Module, objective: TrainingStepObjective, batch: Any, final: int) -> None:
        super().__init__()
        self.pl_module = pl_module
        # Which weights are trainable is to be asked now: a kernel puts other tensors in their place.
        self._of = (objective, batch, final, trainable_modules(pl_module))

    def forward(self, *tensors: Tensor) -> Tensor:
        objective, batch, final, modules = self._of
        output: Tensor = objective.watched(with_samples(batch, tensors), among=modules)[1].outputs[final]
        return output


def find_network(
    trainer: pl.Trainer, pl_module: pl.LightningModule, size: int, seed: int, masks: Mapping[str, Tensor] | None = None
) -> TrainingStepNetwork:
    """Draw a probe batch of `size` training samples from `seed` and read the network from it.

    Raises:
        UnsupportedTrainingError: As `TrainingStepNetwork`.
        ValueError: There is no training data.
    """
    batch = draw_probe(trainer, pl_module, size, seed)
    return TrainingStepNetwork(pl_module, TrainingStepObjective(trainer, pl_module), batch, masks)


def _single_call(seen: ModuleCallRecorder) -> tuple[nn.Module, Tensor] | None:
    """The one module that was called with one tensor; None for anything else."""
    if len(seen.calls) == 1:
        module, args, kwargs = seen.calls[0]
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].grad_fn is None:
            return module, args[0]
    return None


def _final_call(seen: ModuleCallRecorder, count: int, name: str) -> int:
    """The call whose result is the network's output.

    Raises:
        UnsupportedTrainingError: There are none or several, or it is no floating point tensor with a row per sample.
    """
    finals = sorted(seen.final_calls())
    if len(finals) != 1:
        several = f"has {len(finals)} outputs, of several networks or of one that is called several times"
        what = several if finals else "calls none of its modules"
        raise UnsupportedTrainingError(f"{name}.training_step {what}: there is no single tensor of outputs")
    output = seen.outputs[finals[0]]
    if not (is_float(output) and output.ndim > 0 and len(output) == count):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedTrainingError(
            f"the output in {name}.training_step is {shape}, not a tensor of {count} samples"
        )
    return finals[0]
