"""A model with other values in place of its parameters and buffers, in eval mode, for as long as it is scored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_graphon._shared.module_state import swap_tensors
from lightning_graphon._shared.weight_layout import weight_axes
from lightning_graphon.pruning.scoring.registry import ScoringContext

Values = Callable[[str, Tensor], Tensor]


@contextmanager
def linearised(
    context: ScoringContext, dtype: torch.dtype | None, scale: float, biases: bool, square: bool = False
) -> Iterator[ScoringContext]:
    """The model with |θ| of the weights kept and of all other parameters and buffers, or θ²; biases times `scale`.

    Yields the context of the weights that stand in the model then.

    Args:
        context: Weights and masks.
        dtype: Of all values; None keeps that of each.
        scale: Factor of what adds to the flow: biases and running means.
        biases: Whether biases add at all.
        square: θ² in place of |θ|.
    """

    def other(name: str, tensor: Tensor) -> Tensor:
        adds = tensor.ndim == 1 and is_bias(name)
        factor = (scale if biases else 0.0) if adds else 1.0
        return _positive(tensor, dtype, square, factor)

    def buffer(name: str, tensor: Tensor) -> Tensor:
        return _positive(tensor, dtype, square, scale if name.endswith("running_mean") else 1.0)

    def weight(name: str, tensor: Tensor) -> Tensor:
        return _positive(tensor, dtype, square, 1.0).mul_(context.masks[name])

    with substituted(context, weight, other, buffer) as inside:
        yield inside


@contextmanager
def masked(context: ScoringContext, dtype: torch.dtype) -> Iterator[None]:
    """The model as it is, without the weights that are pruned, in a floating dtype."""

    def cast(name: str, tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor

    with substituted(context, lambda name, w: cast(name, w) * context.masks[name], cast, cast):
        yield


@contextmanager
def counting_paths(context: ScoringContext, dtype: torch.dtype) -> Iterator[None]:
    """The model whose layers add: weights are one where kept, biases zero, normalisation does nothing in eval mode.

    Parameters that are no layer's, such as embeddings, enter by their squares, as inputs do.
    """
    layers = {
        f"{path}.{key}" if path else key
        for path, module in context.model.named_modules()
        for key in weight_axes(module)
    }

    def other(name: str, tensor: Tensor) -> Tensor:
        if name in layers:
            return torch.ones_like(tensor, dtype=dtype)
        if tensor.ndim == 1:
            return torch.full_like(tensor, float(not is_bias(name)), dtype=dtype)
        return tensor.detach().to(dtype).square()

    def buffer(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if name.endswith(("running_mean", "running_var")):
            return torch.full_like(tensor, float(name.endswith("running_var")), dtype=dtype)
        return tensor.to(dtype)

    with substituted(context, lambda name, w: context.masks[name].to(dtype), other, buffer):
        yield


@contextmanager
def substituted(context: ScoringContext, weight: Values, other: Values, buffer: Values) -> Iterator[ScoringContext]:
    """The model in eval mode with other values.

    Args:
        context: Weights to score.
        weight: Values of a weight to score, by its name.
        other: Values of any other parameter.
        buffer: Values of a buffer.

    Yields:
        The context with the parameters that stand in the model now.
    """
    model, names = context.model, {parameter: name for name, parameter in context.weights.items()}
    substitutes: dict[Tensor, Tensor] = {}
    scored: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter in names:
            own = names[parameter]
            substitutes[parameter] = scored[own] = nn.Parameter(weight(own, parameter))
        else:
            substitutes[parameter] = nn.Parameter(other(name, parameter), requires_grad=parameter.requires_grad)
    for name, tensor in model.named_buffers():
        substitutes[tensor] = buffer(name, tensor)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with swap_tensors(model, substitutes):
            yield replace(context, weights={name: scored[name] for name in context.weights})
    finally:
        for module, training in modes.items():
            module.training = training


def is_bias(name: str) -> bool:
    """Whether this parameter is a bias: it adds to the flow and does not multiply it."""
    return name.rpartition(".")[2].startswith(("bias", "in_proj_bias"))


def _positive(tensor: Tensor, dtype: torch.dtype | None, square: bool, factor: float) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.abs() if tensor.dtype != torch.bool else tensor
    copy = tensor.detach().to(dtype or tensor.dtype, copy=True)
    positive = copy.square_() if square else copy.abs_()
    return positive if factor == 1.0 else positive.mul_(factor)
