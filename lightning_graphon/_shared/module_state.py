"""Restore a model after an analysis: weights, buffers, gradients, flags and random number generators."""

import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_graphon._shared.objects.object_state import preserve_objects

_ROOM = 1 << 28  # bytes of frozen weights and of tensors that are no buffers, to be copied


@contextmanager
def preserve_module_state(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Restore `model` and the random number generators on leaving, also after an exception.

    Inside, every parameter has no gradient. Restored bit for bit: the storage of parameters, buffers, `.grad`,
    `requires_grad` and `training` flags; whatever else the modules hold (`preserve_objects`): metrics, replay buffers,
    networks in lists, generators of their own; and the generators of torch (CPU, CUDA and MPS), numpy and python. Of
    frozen weights and plain tensors 256 MiB are copied; a larger one that is written to is told, as is any trained
    weight: it is not undone.

    Args:
        model: The module that will be run.
        seed: Seed of all generators inside; None keeps their current states.
    """
    named = {name: p for name, p in model.named_parameters() if not isinstance(p, UninitializedParameter)}
    trained = {name: p for name, p in named.items() if p.requires_grad}
    names = {id(p): repr(name) for name, p in named.items()}

    def told(tensor: Tensor) -> None:
        _tell_written(names.get(id(tensor), f"of shape {tuple(tensor.shape)}"))

    with ExitStack() as stack:
        stack.enter_context(preserve_random_state(seed))
        stack.enter_context(
            preserve_objects(model, skip=trained.values(), always=model.buffers(), room=_ROOM, told=told)
        )
        for parameter in named.values():
            saved = (parameter.data, parameter.grad, parameter.requires_grad)
            stack.callback(_restore_parameter, parameter, *saved)
            parameter.grad = None
        for name, parameter in trained.items():
            stack.callback(_check_unwritten, name, parameter, parameter._version)
        yield


@contextmanager
def swap_tensors(model: nn.Module, substitutes: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Replace parameters and buffers by other tensors inside the context.

    Writing to `.data` would not do: a parameter whose data change dtype loses the hooks of DDP on its gradient, and
    each process would train on its own from then on.

    Args:
        model: Any module; tied parameters stay tied.
        substitutes: Parameter or buffer -> the tensor that replaces it.

    >>> net = nn.Linear(2, 1)
    >>> with swap_tensors(net, {net.weight: nn.Parameter(net.weight.detach().double())}):
    ...     net.weight.dtype
    torch.float64
    >>> net.weight.dtype
    torch.float32
    """
    with ExitStack() as stack:
        for module in model.modules():
            registers: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for register in registers:
                originals = {name: t for name, t in register.items() if t is not None and t in substitutes}
                stack.callback(register.update, originals)
                register.update({name: substitutes[tensor] for name, tensor in originals.items()})
        yield


@contextmanager
def shadow_attributes(owner: Any, **shadows: Any) -> Iterator[None]:
    """Put other values, or methods, before those of one object inside the context; its class stays as it is.

    >>> net = nn.Linear(2, 1)
    >>> with shadow_attributes(net, forward=lambda x: "nothing"):
    ...     net(None)
    'nothing'
    >>> net(torch.ones(1, 2)).shape
    torch.Size([1, 1])
    """
    before = {name: owner.__dict__[name] for name in shadows if name in owner.__dict__}
    owner.__dict__.update(shadows)
    try:
        yield
    finally:
        for name in shadows:
            owner.__dict__.pop(name, None)
        owner.__dict__.update(before)


@contextmanager
def preserve_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the generators of torch, numpy and python on leaving; inside they start from `seed` if given."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    # Asking for the state of a GPU that nobody uses would start its driver, and forked workers could not use it then.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        try:
            if seed is not None:
                _seed(seed)
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)


def _seed(seed: int) -> None:
    """Seed all generators; `torch.manual_seed` would also seed a GPU that is started later."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)


def _restore_parameter(parameter: nn.Parameter, data: Tensor, grad: Tensor | None, requires_grad: bool) -> None:
    parameter.data = data
    parameter.grad = grad
    parameter.requires_grad_(requires_grad)


def _check_unwritten(name: str, parameter: nn.Parameter, version: int) -> None:
    if parameter._version != version:
        _tell_written(repr(name))


def _tell_written(name: str) -> None:
    warnings.warn(f"the model wrote to its own parameter {name} while it was scored; that is not undone", stacklevel=2)
