"""What a copy trains in place of the network: its Taylor expansion, or one that is drawn from its graphons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_graphon._shared.module_state import preserve_module_state
from lightning_graphon.callbacks._distributed.first_process import OtherProcessesNeededError
from lightning_graphon.callbacks._module.call_recorder import ModuleCallRecorder, Place
from lightning_graphon.callbacks._module.training_step import TrainingStepObjective
from lightning_graphon.callbacks._rehearsal.rehearse import Change, Changed
from lightning_graphon.dynamics import (
    Expansion,
    UnsupportedTrainingError,
    redraw_from_graphons,
    scale_updates,
    taylor_expand_,
)
from lightning_graphon.pruning import Masks


@dataclass(frozen=True)
class NetworkPlace:
    """Where `training_step` has its network, by names, so that it can be found in a copy.

    Attributes:
        among: Names of the modules whose outermost calls are counted.
        calls: Names of the modules that were called.
        outputs: Places of the tensors that the loss is computed from.
        inputs: What the first call was given, where that is one tensor.
    """

    among: tuple[str, ...]
    calls: tuple[str, ...]
    outputs: tuple[Place, ...]
    inputs: Tensor | None = None

    @classmethod
    def of(cls, pl_module: pl.LightningModule, objective: TrainingStepObjective, batch: Any) -> "NetworkPlace":
        """Watch `training_step` run on a batch.

        Raises:
            UnsupportedTrainingError: It calls no module, or does not run in eval mode.
            OtherProcessesNeededError: It needs processes that do not take part.
        """
        with preserve_module_state(pl_module):
            pl_module.eval()
            try:
                found = objective.find_outputs(batch)
            except OtherProcessesNeededError:
                raise
            except Exception as error:
                objective.observed(batch)  # an error of its own, if it works in no mode
                raise UnsupportedTrainingError(
                    f"{type(pl_module).__name__}.training_step works in train mode only ({type(error).__name__}: "
                    f"{error}), and its network is looked for in eval mode"
                ) from error
        if not found.places:
            raise UnsupportedTrainingError(f"{type(pl_module).__name__}.training_step calls none of its modules")
        name_of = {module: name for name, module in pl_module.named_modules()}
        calls = tuple(name_of[module] for module, _, _ in found.seen.calls)
        _, args, kwargs = found.seen.calls[0]
        inputs = args[0].detach() if len(args) == 1 and isinstance(args[0], Tensor) and not kwargs else None
        return cls(tuple(name_of[module] for module in found.among), calls, tuple(found.places), inputs)

    @property
    def single(self) -> str | None:
        """Name of the module whose only call gives the outputs; None where there are several."""
        return self.calls[0] if len(self.calls) == 1 else None


def expanded(place: NetworkPlace, order: int) -> Change:
    """Expand the network of a copy in its parameters, up to what the loss is computed from."""

    def change(twin: pl.LightningModule) -> Changed:
        if not twin.automatic_optimization:
            raise UnsupportedTrainingError("it optimises by hand, and a replay does not know when: ask for a rehearsal")
        if place.single is not None:
            taylor_expand_(twin.get_submodule(place.single), order)
        elif order == 1:
            _expand_step(twin, place)
        else:
            raise UnsupportedTrainingError(
                f"training_step calls {len(place.calls)} modules, and an expansion of order {order} needs one"
            )
        return Changed()

    return change


def _expand_step(twin: pl.LightningModule, place: NetworkPlace) -> None:
    """Run `training_step` with the expansion of all modules together, of which the loss sees values only."""
    original, expansion = twin.training_step, Expansion(twin, 1)
    among = [twin.get_submodule(name) for name in place.among]

    @wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        with ModuleCallRecorder(twin, convert=dict.fromkeys(place.outputs, expansion.value), among=among):
            return expansion.evaluate(lambda: original(*args, **kwargs))

    object.__setattr__(twin, "training_step", step)


def redrawn(place: NetworkPlace, masks: Mapping[str, Tensor], *, width: float, seed: int) -> Change:
    """Draw the network of a copy anew from its graphons, at another width, with the learning rates for it."""

    def change(twin: pl.LightningModule) -> Changed:
        if place.single is None:
            raise UnsupportedTrainingError("training_step calls several modules, and one network is drawn")
        if place.inputs is None:
            raise UnsupportedTrainingError("its network takes other arguments than one tensor, and cannot be read")
        network = twin.get_submodule(place.single)
        prefix = place.single + "." if place.single else ""
        inside = {name.removeprefix(prefix): mask for name, mask in masks.items() if name.startswith(prefix)}
        nested, twin._trainer = twin._trainer, None  # which is no part of the network to draw
        try:
            drawn = redraw_from_graphons(network, inside, inputs=place.inputs, width=width, seed=seed)
        except ValueError as error:
            raise UnsupportedTrainingError(f"no network can be drawn from its graphons: {error}") from error
        finally:
            twin._trainer = nested
        _take_over(network, drawn.model)
        own = Masks({prefix + name: mask for name, mask in drawn.masks.items()})

        def prepare(optimizers: Sequence[Optimizer]) -> None:
            for optimizer in optimizers:
                scale_updates(optimizer, network, drawn)

        return Changed(own, prepare)

    return change


def _take_over(network: nn.Module, drawn: nn.Module) -> None:
    """Give the modules of a network the parameters and sizes of others."""
    for name, module in drawn.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_modules", "_trainer", "_fabric")}
        vars(network.get_submodule(name)).update(own)
