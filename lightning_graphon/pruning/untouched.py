"""Run somebody's model and leave no trace: weights, buffers, gradients, flags and random numbers come back."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_STRUCTURE = ("_parameters", "_buffers", "_modules")


@contextmanager
def untouched(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Restore `model` and the random number generators on leaving, also after an exception.

    Inside, every parameter has no gradient. Restored bit for bit: the storage of parameters, buffers, `.grad`,
    `requires_grad` and `training` flags, plain attributes of every module (tensors, lists and dicts by content,
    so that the states of torchmetrics metrics come back), and the generators of torch (CPU and CUDA), numpy
    and python.

    Args:
        model: The module that will be run.
        seed: Seed of all generators inside; None keeps their current states.
    """
    with ExitStack() as stack:
        stack.enter_context(random_state_kept(seed))
        for module in model.modules():
            stack.callback(_restore_attributes, module, _attributes(module))
            stack.callback(_restore_buffers, module, _buffers(module))
        for parameter in model.parameters():
            stack.callback(_restore_parameter, parameter, parameter.data, parameter.grad, parameter.requires_grad)
            parameter.grad = None
        yield


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Restore the generators of torch, numpy and python on leaving; inside they start from `seed` if given."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                if numpy:
                    numpy.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def _restore_parameter(parameter: nn.Parameter, data: Tensor, grad: Tensor | None, requires_grad: bool) -> None:
    parameter.data = data
    parameter.grad = grad
    parameter.requires_grad_(requires_grad)


def _buffers(module: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None]]:
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
            else:
                buffer.data = content
        module._buffers[name] = buffer


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each plain attribute with a copy of its content where it can be changed in place."""
    return {name: (value, _content(value)) for name, value in module.__dict__.items() if name not in _STRUCTURE}


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if type(value) in (list, dict, set) else None


@torch.no_grad()
def _restore_attributes(module: nn.Module, saved: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in module.__dict__ if name not in saved and name not in _STRUCTURE]:
        del module.__dict__[name]
    for name, (value, content) in saved.items():
        if isinstance(value, Tensor):
            value.data = content
        elif type(value) is list:
            value[:] = content
        elif type(value) in (dict, set):
            value.clear()
            value.update(content)
        module.__dict__[name] = value
