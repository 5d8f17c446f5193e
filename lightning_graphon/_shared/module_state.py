"""Restore a model after an analysis: weights, buffers, gradients, flags and random number generators."""

import copy
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

Restore: TypeAlias = Callable[[], object]
# Values that cannot change in place, or are restored elsewhere.
_OPAQUE = (bool, int, float, str, type(None), nn.Parameter)
# Private names of torch, as it has no others for the places themselves: setattr takes no plain tensor for a parameter,
# and register_buffer forgets which buffers are saved. Nor has it another for `_version`, which counts writes.
_STRUCTURE = ("_parameters", "_buffers", "_modules")


@contextmanager
def preserve_module_state(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Restore `model` and the random number generators on leaving, also after an exception.

    Inside, every parameter has no gradient. Restored bit for bit: the storage of parameters, buffers, `.grad`,
    `requires_grad` and `training` flags; plain attributes of every module, tensors, arrays and containers by content,
    so that the states of torchmetrics metrics come back (other objects are opaque); and the generators of torch (CPU,
    CUDA and MPS), numpy and python.

    Args:
        model: The module that will be run.
        seed: Seed of all generators inside; None keeps their current states.
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_random_state(seed))
        for module in model.modules():
            stack.callback(_restore_attributes, module, _save_attributes(module))
            stack.callback(_restore_buffers, module, _save_buffers(module))
        for name, parameter in model.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                continue
            saved = (parameter.data, parameter.grad, parameter.requires_grad, parameter._version)
            stack.callback(_restore_parameter, name, parameter, *saved)
            parameter.grad = None
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


def _restore_parameter(
    name: str, parameter: nn.Parameter, data: Tensor, grad: Tensor | None, requires_grad: bool, version: int
) -> None:
    if parameter._version != version:
        warnings.warn(
            f"the model wrote to its own parameter {name!r} while it was scored; that is not undone", stacklevel=2
        )
    parameter.data = data
    parameter.grad = grad
    parameter.requires_grad_(requires_grad)


def _save_buffers(module: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    return {
        name: (buffer, None if buffer is None else buffer.detach().clone()) for name, buffer in module._buffers.items()
    }


@torch.no_grad()
def _restore_buffers(module: nn.Module, saved: dict[str, tuple[Tensor | None, Tensor | None]]) -> None:
    for name in list(module._buffers):
        if name not in saved:
            del module._buffers[name]
    for name, (buffer, content) in saved.items():
        if buffer is not None and content is not None:
            if buffer.dtype == content.dtype:
                buffer.copy_(content)
            else:  # the model was cast while it ran
                buffer.data = content
        module._buffers[name] = buffer


def _save_attributes(module: nn.Module) -> dict[str, tuple[Any, Restore]]:
    """Each plain attribute with a function that restores its content, where that can change in place."""
    return {
        name: (value, _content_restorer(value, set()))
        for name, value in module.__dict__.items()
        if name not in _STRUCTURE
    }


def _content_restorer(value: Any, seen: set[int]) -> Restore:
    """Function that restores what a tensor, an array or a container holds, to any depth; `seen` stops cycles."""
    if isinstance(value, _OPAQUE) or id(value) in seen:
        return _do_nothing
    if isinstance(value, dict) and not value:
        return value.clear  # most attributes of a module are empty dicts of hooks
    seen.add(id(value))
    if isinstance(value, Tensor):
        return partial(_refill_tensor, value, value.detach().clone())
    if type(value).__name__ == "ndarray":
        return partial(value.__setitem__, ..., value.copy())
    if isinstance(value, (list, set, dict, deque)):
        return partial(_refill, value, copy.copy(value), [_content_restorer(v, seen) for v in _members(value)])
    return _do_nothing


@torch.no_grad()
def _refill_tensor(tensor: Tensor, content: Tensor) -> None:
    if tensor.shape == content.shape:
        tensor.copy_(content)
    else:
        tensor.data = content


def _refill(container: Any, content: Any, inner: list[Restore]) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)
    for restore in inner:
        restore()


def _members(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _do_nothing() -> None: ...


def _restore_attributes(module: nn.Module, saved: dict[str, tuple[Any, Restore]]) -> None:
    for name in [name for name in module.__dict__ if name not in saved and name not in _STRUCTURE]:
        del module.__dict__[name]
    for name, (value, restore) in saved.items():
        restore()
        module.__dict__[name] = value
