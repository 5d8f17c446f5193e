"""The loss and the flow of a LightningModule, read from its own `training_step`.

Any module works without adaptation: its logging is silenced, its optimizers stand still (manual optimisation), and the
network inside it is found by watching which modules `training_step` calls.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_graphon.pruning.objective import call as call_network
from lightning_graphon.pruning.objective import cool, guess_inputs, ones_like_sample, total
from lightning_graphon.pruning.untouched import untouched

ModuleLoss = Callable[[pl.LightningModule, Any], Tensor]


class TrainingStepObjective:
    """Objective (`lightning_graphon.pruning.objective.Objective`) of a LightningModule inside a Trainer.

    Args:
        trainer: The trainer that will fit the module.
        pl_module: The module, attached to the trainer.
        loss_fn: `loss_fn(pl_module, batch)` -> scalar in place of `training_step`.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: ModuleLoss | None = None) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._loss_fn = loss_fn or self._run_training_step

    def loss(self, batch: Any, temperature: float = 1.0) -> Tensor:
        """Loss of `training_step`, the network's outputs divided by `temperature` on the way."""
        with self._silenced(), _Watch(self._module) as watch:
            if temperature != 1.0:
                watch.temperature, watch.last = temperature, self._number_of_calls(batch)
            return self._loss_fn(self._module, batch)

    def flow(self, batch: Any, scale: float = 1.0) -> Tensor:
        """Sum of the network's outputs when its first call in `training_step` gets ones times `scale`."""
        if batch is None or self._module.example_input_array is not None:
            inputs = ones_like_sample(guess_inputs(self._module), self._module, scale)
            with self._silenced():
                return total(call_network(self._module, inputs))
        dtype = next(p.dtype for p in self._module.parameters())
        batch = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, batch)
        with self._silenced(), _Watch(self._module) as watch:
            watch.ones = scale
            self._loss_fn(self._module, batch)
        return total(watch.terminal_outputs())

    def _number_of_calls(self, batch: Any) -> int:
        with untouched(self._module), torch.no_grad(), _Watch(self._module) as watch:
            self._loss_fn(self._module, batch)
        return watch.calls

    def _run_training_step(self, module: pl.LightningModule, batch: Any) -> Tensor:
        losses = self._captured
        losses.clear()
        output = module.training_step(**_step_arguments(module.training_step, batch))
        if not module.automatic_optimization:
            if not losses:
                raise ValueError(
                    f"{type(module).__name__} optimises by hand and its training_step called manual_backward for no "
                    "loss: give a loss_fn(pl_module, batch), or a method that needs no data"
                )
            return torch.stack(losses).sum()
        return _loss_of(output, module)

    @contextmanager
    def _silenced(self) -> Iterator[None]:
        """No logging, no optimizer steps, no autocast; precision plugins that set the default dtype stay."""
        self._captured: list[Tensor] = []
        precision = self._trainer.precision_plugin
        with ExitStack() as stack:
            stack.enter_context(nullcontext() if isinstance(precision, MixedPrecision) else precision.forward_context())
            stack.enter_context(_dummy_loggers(self._trainer))
            for module in self._module.modules():
                if isinstance(module, pl.LightningModule):
                    stack.enter_context(_muted(module, self._captured))
            yield


def _step_arguments(step: Callable[..., Any], batch: Any) -> dict[str, Any]:
    """What Lightning would pass to `training_step`.

    Raises:
        ValueError: It wants a `dataloader_iter`.
    """
    parameters = list(inspect.signature(step).parameters)
    if "dataloader_iter" in parameters:
        raise ValueError(
            "training_step(dataloader_iter) draws its own batches and cannot be scored: "
            "give a loss_fn(pl_module, batch), or a method that needs no data"
        )
    arguments: dict[str, Any] = {parameters[0]: batch} if parameters else {}
    if len(parameters) > 1:
        arguments[parameters[1]] = 0
    return arguments


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
def _dummy_loggers(trainer: pl.Trainer) -> Iterator[None]:
    """Code such as `self.logger.experiment.add_image(...)` runs and writes nothing."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


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
    before = {name: module.__dict__[name] for name in shadows if name in module.__dict__}
    module.__dict__.update(shadows)
    try:
        yield
    finally:
        for name in shadows:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)


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


class _Watch:
    """Watches the outermost calls of modules with trainable weights while `training_step` runs.

    Attributes:
        calls: Number of outermost calls so far.
        temperature: Divides the outputs of call number `last`, the network's logits.
        ones: If set, the inputs of the first call are replaced by ones times this.
    """

    def __init__(self, root: nn.Module) -> None:
        self.calls = 0
        self.temperature, self.last = 1.0, 0
        self.ones: float | None = None
        self._root = root
        self._depth = 0
        self._outputs: list[Any] = []
        self._passed_on: set[int] = set()

    def __enter__(self) -> "_Watch":
        modules = [m for m in self._root.modules() if any(p.requires_grad for p in m.parameters())]
        self._handles = [
            handle
            for module in modules
            for handle in (
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, always_call=True),
            )
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def terminal_outputs(self) -> list[Any]:
        """Outputs of the outermost calls that were not handed to a later one."""
        return [out for out in self._outputs if not any(id(t) in self._passed_on for t in tree_leaves(out))]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._depth += 1
        if self._depth > 1:
            return None
        self.calls += 1
        self._passed_on |= {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        value = self.ones
        if value is None or self.calls > 1:
            return None
        return tree_map(lambda x: torch.full_like(x, value) if _is_float(x) else x, (args, kwargs))

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._depth -= 1
        if self._depth > 0:
            return None
        if self.calls == self.last:
            output = cool(output, self.temperature)
        self._outputs.append(output)
        return output


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
