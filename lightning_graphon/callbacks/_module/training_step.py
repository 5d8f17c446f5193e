"""The loss and the flow of a LightningModule, read from its own `training_step`.

Any module works without adaptation: its logging is silenced, its optimizers stand still (manual optimisation), and the
network inside it is found by watching which modules `training_step` calls.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_graphon._shared.evaluation import uncompiled
from lightning_graphon._shared.model_io import (
    call_model,
    flat_outputs,
    guess_inputs,
    is_float,
    ones_like_sample,
    output_rows,
)
from lightning_graphon._shared.module_state import preserve_module_state, shadow_attributes
from lightning_graphon._shared.objects.trees import tree_map
from lightning_graphon.callbacks._distributed.first_process import first_process_alone
from lightning_graphon.callbacks._module.call_recorder import ModuleCallRecorder, Place, trainable_modules
from lightning_graphon.callbacks._module.muted_loggers import muted_loggers

ModuleLoss = Callable[[pl.LightningModule, Any], Tensor]
# Hooks such as on_fit_start come after those of callbacks. To call them here would call them twice.
_EARLY = (
    "lightning-graphon ran training_step by itself, before the first batch: make what it needs in __init__, setup or "
    "configure_model, or give loss_fn(pl_module, batch)"
)
_CALLED = "lightning-graphon calls it as loss_fn(pl_module, batch), for a scalar tensor"


@dataclass(frozen=True)
class Outputs:
    """Where a `training_step` has the network's outputs.

    Attributes:
        seen: The run in which they were found.
        places: Of the tensors that the loss is computed from.
        among: The modules that were watched: places count the calls of these.
    """

    seen: ModuleCallRecorder
    places: list[Place]
    among: list[nn.Module]


class TrainingStepObjective:
    """Objective (`lightning_graphon.pruning.objective.Objective`) of a LightningModule inside a Trainer.

    Args:
        trainer: The trainer that will fit the module.
        pl_module: The module, attached to the trainer.
        loss_fn: `loss_fn(pl_module, batch)` -> scalar in place of `training_step`.
        batches: Training batches in their order: each is run under its own `batch_idx` (any other under 0), and one for
            which `training_step` returns None is skipped as Lightning does: its loss is 0.
        alone: The first process runs it without the others.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loss_fn: ModuleLoss | None = None,
        batches: Sequence[Any] = (),
        alone: bool = False,
    ) -> None:
        self._trainer, self._alone = trainer, alone
        self._module = pl_module
        self._given = loss_fn
        self._batches = batches
        self._final: dict[int, tuple[Any, list[Place], list[nn.Module]]] = {}

    def loss(self, batch: Any, temperature: float = 1.0) -> Tensor:
        """Loss of `training_step`, the network's outputs divided by `temperature` on the way."""
        if temperature == 1.0:
            return self.watched(batch)[0]
        # Found once, since the same batches come in every round; kept with the batch, so that its id stays its own.
        if id(batch) not in self._final:
            with preserve_module_state(self._module):
                found = self.find_outputs(batch)
            self._final[id(batch)] = (batch, found.places, found.among)
            if not found.places:
                warnings.warn(
                    f"{type(self._module).__name__}.training_step calls none of its modules: the network's outputs "
                    "cannot be found and the loss is taken at temperature 1",
                    stacklevel=2,
                )
        _, places, among = self._final[id(batch)]
        return self.watched(batch, temperature=temperature, cooled=places, among=among)[0]

    def observed(self, batch: Any) -> float:
        """The loss of a batch in eval mode; of a network that has no loss then, in train mode without its noise.

        Detection networks return what they have found in eval mode, and their losses in train mode only.
        """
        with preserve_module_state(self._module):
            self._module.eval()
            with suppress(Exception):
                return float(self.loss(batch))
        with preserve_module_state(self._module, seed=0):  # proposals are drawn at random
            for module in self._module.modules():
                module.training = not (hasattr(module, "running_mean") or "Drop" in type(module).__name__)
            return float(self.loss(batch))

    def outputs(self, batch: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The network's outputs [N, K] when `training_step` runs with changed inputs in place of the data."""
        dtype = next(p.dtype for p in self._module.parameters())
        batch = tree_map(lambda x: x.to(dtype) if is_float(x) else x, batch)
        if batch is not None:
            found = self.find_outputs(batch, change)
            if found.places:
                return output_rows([found.seen.output(place) for place in found.places])
        inputs = tree_map(lambda x: change(x.to(dtype)) if is_float(x) else x, guess_inputs(self._module))
        with self._silenced():
            return output_rows(call_model(self._module, inputs))

    def outputs_of_ones(self, batch: Any, scale: float = 1.0) -> Tensor:
        """The network's outputs when `training_step` runs with ones times `scale` in place of the data."""
        if batch is not None and self._module.example_input_array is None:
            return self.outputs(batch, partial(_constant, scale)).flatten()
        inputs = ones_like_sample(guess_inputs(self._module), self._module, scale)
        with self._silenced():
            return flat_outputs(call_model(self._module, inputs))

    def find_outputs(self, batch: Any, change: Callable[[Tensor], Tensor] | None = None) -> "Outputs":
        """Where the network's outputs are, in the modules' present mode.

        A module that returns the loss itself is no network, and what it calls is watched instead.

        Args:
            batch: As `training_step` gets it.
            change: As in `ModuleCallRecorder`.
        """
        among, found = trainable_modules(self._module), None
        while True:
            loss, seen = self.watched(batch, change=change, among=among)
            places = seen.final_outputs(loss)
            if found is not None and not places:
                return found  # what returns the loss calls nothing
            found = Outputs(seen, places, among)
            owners = {seen.calls[place[0]][0] for place in places if seen.output(place).ndim == 0}
            among = [module for module in among if module not in owners]
            if not any(inner in among for owner in owners for inner in owner.modules()):
                return found

    def watched(self, batch: Any, **options: Any) -> tuple[Tensor, ModuleCallRecorder]:
        """The loss of a batch, and the outermost calls of modules on the way to it, in the modules' present mode.

        Args:
            batch: As `training_step` gets it.
            options: For `ModuleCallRecorder`.
        """
        # With gradients, as in training: a step may ask for some of its own.
        with self._silenced(), torch.enable_grad(), ModuleCallRecorder(self._module, **options) as seen:
            if self._given is None:
                return self._run_training_step(self._module, batch), seen
            with _noted(_CALLED):
                return self._given(self._module, batch), seen

    def _run_training_step(self, module: pl.LightningModule, batch: Any) -> Tensor:
        losses = self._captured
        losses.clear()
        number = next((i for i, known in enumerate(self._batches) if known is batch), None)
        arguments = _step_arguments(module.training_step, batch, number or 0)
        with _noted(_EARLY):
            output = module.training_step(*arguments)
        if not module.automatic_optimization:
            if not losses:
                raise ValueError(
                    f"{type(module).__name__} optimises by hand and its training_step called manual_backward for no "
                    "loss: give a loss_fn(pl_module, batch), or a method that needs no data"
                )
            return torch.stack(losses).sum()
        if output is None and number is not None:
            warnings.warn(
                f"{type(module).__name__}.training_step returned None for scoring batch {number}: it is skipped",
                stacklevel=2,
            )
            return torch.zeros((), device=module.device, requires_grad=True)
        return _loss_of(output, module)

    @contextmanager
    def _silenced(self) -> Iterator[None]:
        """No logging, no optimizer steps, no autocast; precision plugins that set the default dtype stay."""
        self._captured: list[Tensor] = []
        precision = self._trainer.precision_plugin
        with ExitStack() as stack:
            stack.enter_context(nullcontext() if isinstance(precision, MixedPrecision) else precision.forward_context())
            stack.enter_context(muted_loggers(self._trainer))
            if self._alone:
                what = "training_step" if self._given is None else "loss_fn"
                stack.enter_context(first_process_alone(self._trainer, what))
            stack.enter_context(uncompiled(self._module))
            for module in self._module.modules():
                if isinstance(module, pl.LightningModule):
                    stack.enter_context(_muted(module, self._captured))
            yield


def _constant(value: float, x: Tensor) -> Tensor:
    """A constant like `x` that keeps `x` in the graph, for steps that differentiate by their input."""
    return torch.where(torch.ones_like(x, dtype=torch.bool), value, x)


@contextmanager
def _noted(note: str) -> Iterator[None]:
    """From Python 3.11 on, errors of the user's function say who called it and how."""
    try:
        yield
    except Exception as error:
        getattr(error, "add_note", str)(note)
        raise


def _step_arguments(step: Callable[..., Any], batch: Any, number: int) -> list[Any]:
    """What Lightning passes to `training_step`: the batch, and its index where there is a place for it.

    Raises:
        ValueError: It wants a `dataloader_iter`.
    """
    if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        raise ValueError(
            "training_step(dataloader_iter) draws its own batches and cannot be scored: "
            "give a loss_fn(pl_module, batch), or a method that needs no data"
        )
    return [batch, number] if is_param_in_hook_signature(step, "batch_idx", min_args=2) else [batch]


def _loss_of(output: Any, module: pl.LightningModule) -> Tensor:
    if isinstance(output, Mapping):
        output = output.get("loss")
    if isinstance(output, Tensor):
        return output
    raise ValueError(
        f"{type(module).__name__}.training_step returned {output!r} where a loss was expected, for a scoring batch: "
        "return the loss tensor or a dict with 'loss', or give a loss_fn(pl_module, batch)"
    )


@contextmanager
def _muted(module: pl.LightningModule, losses: list[Tensor]) -> Iterator[None]:
    """Shadow the methods that log or optimise by instance attributes; `manual_backward` collects its loss."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    shadows: dict[str, Any] = dict.fromkeys(
        ("log", "log_dict", "print", "clip_gradients", "toggle_optimizer", "untoggle_optimizer"), nothing
    )
    shadows["manual_backward"] = lambda loss, *args, **kwargs: losses.append(loss)
    # Only manual optimisation may ask for optimizers; asking builds wrappers that Lightning needs to be attached.
    if not module.automatic_optimization:
        optimizers, schedulers = module.optimizers(), module.lr_schedulers()
        shadows["optimizers"] = lambda *args, **kwargs: tree_map(_Still, optimizers)
        shadows["lr_schedulers"] = lambda *args, **kwargs: tree_map(_Still, schedulers)
    with shadow_attributes(module, **shadows):
        yield


class _Still:
    """An optimizer or scheduler that can be read but does not move."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> None:
        if closure is not None:
            closure()

    def zero_grad(self, **kwargs: Any) -> None: ...

    def toggle_model(self, **kwargs: Any) -> Any:
        return nullcontext()
