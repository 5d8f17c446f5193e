"""Tangent kernels of the network inside a LightningModule, in the precision that its code allows."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_graphon._shared.choices import Propagate
from lightning_graphon._shared.module_state import preserve_module_state, swap_tensors
from lightning_graphon.callbacks._module.network import Network
from lightning_graphon.ntk import graphon_ntk_from_model

_Kernel = TypeVar("_Kernel")


def empirical_kernel(
    compute: Callable[..., _Kernel], network: Network, masks: Mapping[str, Tensor], dtype: torch.dtype, **options: Any
) -> _Kernel:
    """Kernel of the network itself on its probe batch.

    Args:
        compute: `empirical_ntk` or `kronecker_ntk`.
        network: Its weights, and whatever its code changes, come back bit for bit.
        masks: By the names inside `network.module`.
        dtype: To compute in; the module's own where its code or the device does not allow it.
        options: For `compute`.
    """
    own = partial(compute, network.module, masks=masks, **options)
    if {p.dtype for p in network.module.parameters()} != {dtype}:
        with preserve_module_state(network.root), swap_tensors(network.module, _cast(network.module, dtype)):
            try:
                return own(_inputs(network, lambda x: x.to(dtype) if x.is_floating_point() else x))
            except (RuntimeError, TypeError):
                pass
    with preserve_module_state(network.root):
        return own(_inputs(network, lambda x: x))


def graphon_kernel(
    network: Network, masks: Mapping[str, Tensor], propagate: Propagate, bins: int | None = None
) -> Tensor:
    """Graphon NTK of the network on its probe batch, float64; `bins` and its default as in `graphon_ntk_from_model`.

    Raises:
        ValueError: The network is no chain of Linear layers on one tensor.
    """
    if isinstance(network.inputs, tuple):
        raise ValueError("training_step is not one call of one module with one tensor: it has no Graphon NTK")
    return graphon_ntk_from_model(network.module, network.inputs, masks, bins=bins, propagate=propagate)


def _cast(module: nn.Module, dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Parameters and buffers of the module in a floating dtype."""
    cast: dict[Tensor, Tensor] = {b: b.to(dtype) for b in module.buffers() if b.is_floating_point()}
    for parameter in module.parameters():
        cast[parameter] = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
    return cast


def _inputs(network: Network, cast: Callable[[Tensor], Tensor]) -> Tensor | tuple[Tensor, ...]:
    inputs = network.inputs
    return tuple(map(cast, inputs)) if isinstance(inputs, tuple) else cast(inputs)


def working_dtype(module: nn.Module) -> torch.dtype:
    """float64 for modules that hold any, else float32: half precision is too coarse for a kernel."""
    dtypes = {p.dtype for p in module.parameters()}
    return torch.float64 if torch.float64 in dtypes else torch.float32
