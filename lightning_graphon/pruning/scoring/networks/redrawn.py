"""A model with weights drawn anew from its layers' own initialisation, for as long as it is scored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_graphon._shared.module_state import preserve_random_state, swap_tensors
from lightning_graphon._shared.random import seed_for
from lightning_graphon.pruning.scoring.registry import ScoringContext


@contextmanager
def redrawn(context: ScoringContext, purpose: str) -> Iterator[ScoringContext]:
    """The model after `reset_parameters` of all of its trained modules, inner ones first; in the mode it is in.

    So a network that initialises its layers in a way of its own has a `reset_parameters` that does so. The user's
    weights and buffers, and the global generators, are not touched.

    Args:
        context: Weights to score; its seed is that of the draw.
        purpose: Mixed into the seed: another purpose is another draw.

    Yields:
        The context with the parameters that stand in the model now.

    Raises:
        ValueError: A weight to score belongs to a module that has no initialisation.
    """
    model = context.model
    substitutes: dict[Tensor, Tensor] = {
        p: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    substitutes |= {buffer: buffer.detach().clone() for buffer in model.buffers()}
    with swap_tensors(model, substitutes):
        with preserve_random_state(seed_for(context.seed, purpose)), torch.no_grad():
            for module in reversed(list(model.modules())):
                _reset(module)
        drawn = {name: model.get_parameter(name) for name in context.weights}
        _check_drawn(context, drawn)
        yield replace(context, weights=drawn)


def _reset(module: nn.Module) -> None:
    own = list(module.parameters())
    if own and any(p.requires_grad for p in own) and (reset := _initialisation(module)) is not None:
        reset()


def _initialisation(module: nn.Module) -> Callable[[], object] | None:
    found = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return found if callable(found) else None


def _check_drawn(context: ScoringContext, drawn: dict[str, nn.Parameter]) -> None:
    for name, weight in drawn.items():
        module = context.model.get_submodule(name.rpartition(".")[0])
        # A module around it may have drawn it.
        if _initialisation(module) is None and torch.equal(weight, context.weights[name]):
            raise ValueError(
                f"{name!r} cannot be drawn anew: {type(module).__name__} has no reset_parameters(). Add one, to the "
                "layer or to a module around it, that initialises it as you do"
            )
