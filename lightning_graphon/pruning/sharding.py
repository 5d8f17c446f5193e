"""Sharded weights (FSDP2's `fully_shard`, tensor parallelism): this process's shard, and the full tensor.

Such parameters are `torch.distributed.tensor.DTensor`s. All functions also take plain tensors and modules.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graphon._shared.module_state import swap_tensors


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, of which each process may hold a part only."""
    # Where a DTensor exists this module has been imported; importing it here would slow down all other users.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """The entries that this process holds, as a view without gradient; for a plain tensor the tensor itself.

    >>> weight = torch.ones(2)
    >>> local_shard(weight) is weight
    True
    """
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        local: Tensor = sharded.to_local()
    return local


@torch.no_grad()
def local_shard_like(whole_tensor: Tensor, like: Tensor) -> Tensor:
    """The entries of a plain tensor at the places of `local_shard(like)`, on its device; no communication.

    Args:
        whole_tensor: Tensor of the full shape of `like`, the same on all processes.
        like: Sharded or plain tensor.
    """
    shard = local_shard(like)
    if not is_sharded(like):
        return whole_tensor.to(shard.device)
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = like
    mesh = sharded.device_mesh
    # Each term of a partial sum has the full shape, so it takes the whole tensor.
    placements = [Replicate() if placement.is_partial() else placement for placement in sharded.placements]
    replicated = DTensor.from_local(whole_tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, placements).to_local().to(shard.device)


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """All entries, gathered from all processes, all of which must call it; for a plain tensor the tensor itself.

    >>> weight = torch.ones(2)
    >>> full_tensor(weight) is weight
    True
    """
    sharded: Any = tensor
    # Offloaded shards are on the CPU but are gathered over the mesh's devices.
    return sharded.detach().to(sharded.device_mesh.device_type).full_tensor() if is_sharded(tensor) else tensor


def reshard(model: nn.Module) -> None:
    """Let every FSDP2 module hold its shards again; a forward pass may have left it with full weights."""
    for module in model.modules():
        if unsharded_class(module) is not type(module):
            fsdp: Any = module
            fsdp.reshard()


def unsharded_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `fully_shard` derived another from it.

    >>> unsharded_class(nn.Linear(1, 1)).__name__
    'Linear'
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapper = getattr(fsdp, "FSDPModule", ())
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, wrapper))


@contextmanager
def summon_full_params(model: nn.Module) -> Iterator[None]:
    """Inside, the model is as before it was parallelised: full plain weights, its own classes, no hooks.

    Every process must enter and holds all weights of the model inside, without further communication. On leaving, the
    sharded parameters are restored, the same objects with the same values. A model without shards is not changed.

    Args:
        model: A model sharded by `fully_shard` or `parallelize_module`; not during a forward or backward pass.

    >>> net = nn.Linear(2, 1)
    >>> with summon_full_params(net):
    ...     net(torch.ones(1, 2)).shape
    torch.Size([1, 1])
    """
    reshard(model)
    copies = {tensor: _plain(tensor) for tensor in (*model.parameters(), *model.buffers()) if is_sharded(tensor)}
    with ExitStack() as stack:
        if copies:
            stack.enter_context(swap_tensors(model, copies))
            for module in model.modules():
                _dismantle(module, stack)
        yield


def _plain(tensor: Tensor) -> Tensor:
    data = full_tensor(tensor)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _dismantle(module: nn.Module, stack: ExitStack) -> None:
    """Remove the hooks, the wrapped methods and the derived class until `stack` closes."""
    # Private, since torch has no other list of a module's hooks.
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        stack.callback(_restore_hooks, hooks, dict(hooks), _remove_distributed(hooks))
    stack.callback(module.__dict__.update, _remove_distributed(module.__dict__))
    stack.callback(setattr, module, "__class__", type(module))
    module.__class__ = unsharded_class(module)


def _remove_distributed(functions: MutableMapping[Any, Any]) -> dict[Any, Any]:
    """Remove functions of torch.distributed, and return them."""
    removed = {key: f for key, f in functions.items() if callable(f) and _of_torch_distributed(f)}
    for key in removed:
        del functions[key]
    return removed


def _restore_hooks(hooks: MutableMapping[Any, Any], before: Mapping[Any, Any], removed: Mapping[Any, Any]) -> None:
    """Put removed hooks back at their places among those that are still there, new ones last."""
    now = dict(hooks)
    hooks.clear()
    hooks.update({key: hook for key, hook in before.items() if key in removed or key in now})
    hooks.update(now)


def _of_torch_distributed(function: Callable[..., Any] | None) -> bool:
    """Whether a function, or what it wraps, was defined inside torch.distributed."""
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__", "").startswith("torch.distributed."):
            return True
        inner = (getattr(function, name, None) for name in ("__func__", "func", "__wrapped__"))
        function = next((f for f in inner if f is not None), None)
    return False
