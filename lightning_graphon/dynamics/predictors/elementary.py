"""Functions written in elementary operations, where torch's own have no forward-mode derivative or a wrong second one.

Its normalisations keep the mean and the variance of a first pass, which do not move in a second one. Nothing warns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """As `F.layer_norm`."""
    return _affine(_normal(input, [*range(-len(normalized_shape), 0)], eps), weight, bias)


def group_norm(input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """As `F.group_norm`."""
    groups = input.reshape(len(input), num_groups, -1)
    return _affine(_normal(groups, [-1], eps).reshape(input.shape), *_by_channel(input, weight, bias))


def batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `F.batch_norm`."""
    if not training:
        return settled_batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F.batch_norm(input, running_mean, running_var, None, None, True, momentum, eps)  # moves the running ones
    normal = _normal(input, [axis for axis in range(input.ndim) if axis != 1], eps)
    return _affine(normal, *_by_channel(input, weight, bias))


def settled_batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `F.batch_norm`; under autocast torch's derivative in eval mode has the precision of the running statistics."""
    mixed = not training and running_mean is not None and running_mean.dtype != input.dtype
    x = input.to(running_mean.dtype) if mixed else input
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps).to(input.dtype)


def instance_norm(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `F.instance_norm`."""
    if not use_input_stats or running_mean is not None:
        whole = F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        if not use_input_stats:
            return whole
    return group_norm(input, input.shape[1], weight, bias, eps)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """As `torch._weight_norm`, whose fused form has no forward-mode derivative at all."""
    axes = [axis for axis in range(v.ndim) if dim == -1 or axis != dim % v.ndim]
    return v * (g / v.square().sum(axes, keepdim=True).sqrt().reshape(g.shape))


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """As `F.silu`."""
    return input * input.sigmoid()


_Functions = dict[Callable[..., Any], Callable[..., Any]]
FIRST_ORDER: _Functions = {torch._weight_norm: weight_norm, F.batch_norm: settled_batch_norm}
HIGHER_ORDERS: _Functions = FIRST_ORDER | {
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.silu: silu,
}


def _normal(x: Tensor, axes: list[int], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Any, bias: Any) -> Tensor:
    scaled = x if weight is None else x * weight
    return scaled if bias is None else scaled + bias


def _by_channel(x: Tensor, *values: Any) -> list[Any]:
    shape = [1, -1, *[1] * (x.ndim - 2)]
    return [value if value is None else value.reshape(shape) for value in values]
