"""The network inside a LightningModule as a function of a probe batch, and the loss as a function of its outputs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_graphon._shared.evaluation import uncompiled
from lightning_graphon._shared.module_state import preserve_module_state
from lightning_graphon.callbacks._module.call_recorder import ModuleCallRecorder, trainable_modules
from lightning_graphon.callbacks._module.probe import draw_probe, labels_of, per_sample, samples, with_samples
from lightning_graphon.callbacks._module.training_step import TrainingStepObjective
from lightning_graphon.pruning.scoring.objective import is_float


class UnreadableStepError(ValueError):
    """`training_step` cannot be told as a network with outputs and a loss of them; why, in one sentence."""


@dataclass(frozen=True)
class Network:
    """What `training_step` does with a probe batch: inputs, network, outputs, loss.

    Attributes:
        module: Maps `inputs` to the outputs: the module that `training_step` calls where that is a single call with a
            single tensor, else `training_step` itself up to the last module's outputs.
        inputs: [N, ...], or a tuple of tensors.
        labels: Class numbers [N], where the batches are (inputs, classes) pairs; else None.
        batch: The probe batch.
        root: The LightningModule.
        objective: Runs its `training_step`.
        final: Number of the call whose result is the output.
    """

    module: nn.Module
    inputs: Tensor | tuple[Tensor, ...]
    labels: Tensor | None
    batch: Any
    root: pl.LightningModule
    objective: TrainingStepObjective
    final: int

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks, or other tensors of parameters' shapes, by the names that the parameters have inside `module`."""
        by_parameter = {p: tensors[n] for n, p in self.root.named_parameters(remove_duplicate=False) if n in tensors}
        own = self.module.named_parameters()
        return {name: by_parameter[p].to(p.device) for name, p in own if p in by_parameter}

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Eval mode; the module, its gradients and the random numbers are as before afterwards."""
        with preserve_module_state(self.root), uncompiled(self.root):
            self.root.eval()
            yield

    def outputs(self) -> Tensor:
        """Outputs [N, ...] of the probe batch in the modules' present mode."""
        outputs: Tensor = self.module(*self.inputs) if isinstance(self.inputs, tuple) else self.module(self.inputs)
        return outputs

    def loss(self, outputs: Tensor) -> Tensor:
        """Loss of the probe batch if the network's outputs were these, in the modules' present mode."""
        return self.objective.watched(self.batch, replace={self.final: outputs})[0]


class StepNetwork(nn.Module):
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


def find_network(trainer: pl.Trainer, pl_module: pl.LightningModule, size: int, seed: int) -> Network:
    """Draw a probe batch of `size` training samples from `seed` and read the network from it.

    Raises:
        UnreadableStepError: As `read_network`.
        ValueError: There is no training data.
    """
    batch = draw_probe(trainer, pl_module, size, seed)
    return read_network(TrainingStepObjective(trainer, pl_module), pl_module, batch)


def read_network(objective: TrainingStepObjective, pl_module: pl.LightningModule, batch: Any) -> Network:
    """ModuleCallRecorder `training_step` run on a batch.

    Raises:
        UnreadableStepError: It has not one tensor of outputs, with a row for each sample.
    """
    # In eval mode: a synchronised batch norm in train mode would wait for the other processes.
    with preserve_module_state(pl_module), torch.enable_grad():
        pl_module.eval()
        watch = objective.watched(batch)[1]
        final = _final(watch, samples(batch), type(pl_module).__name__)
    labels, single = labels_of(batch), _single_call(watch)
    if single is None:
        module: nn.Module = StepNetwork(pl_module, objective, batch, final)
        return Network(module, tuple(per_sample(batch)), labels, batch, pl_module, objective, final)
    return Network(single[0], single[1].detach(), labels, batch, pl_module, objective, final)


def _single_call(watch: ModuleCallRecorder) -> tuple[nn.Module, Tensor] | None:
    """The one module that was called with one tensor; None for anything else."""
    if len(watch.calls) == 1:
        module, args, kwargs = watch.calls[0]
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].grad_fn is None:
            return module, args[0]
    return None


def _final(watch: ModuleCallRecorder, count: int, name: str) -> int:
    """The call whose result is the network's output.

    Raises:
        UnreadableStepError: There are none or several, or it is not a floating point tensor with a row for each sample.
    """
    finals = sorted(watch.final_calls())
    if len(finals) != 1:
        several = f"has {len(finals)} outputs, of several networks or of one that is called several times"
        what = several if finals else "calls none of its modules"
        raise UnreadableStepError(f"{name}.training_step {what}: there is no single tensor of outputs")
    output = watch.outputs[finals[0]]
    if not (is_float(output) and output.ndim > 0 and len(output) == count):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnreadableStepError(f"the output in {name}.training_step is {shape}, not a tensor of {count} samples")
    return finals[0]
