"""Dense gradients of all processes together, layer by layer."""

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_graphon.callbacks._distributed.agreement import average
from lightning_graphon.pruning import LazyTensorMapping, full_tensor, is_sharded, local_shard


def averaged_gradients(
    pl_module: pl.LightningModule, names: list[str], found: Mapping[str, Tensor], scale: float = 1.0
) -> LazyTensorMapping:
    """Name -> whole gradient, averaged over processes when it is asked for; all must ask in the same order.

    Weights without a gradient on any process are left out; all of them where a gradient is not finite, as after an
    overflow under mixed precision.

    Args:
        pl_module: Has parameters of these names.
        names: The same on all processes.
        found: Name -> gradient of this process. That of a sharded weight is averaged already, and is gathered.
        scale: Factor of the loss that mixed precision has put on it.
    """
    parameters = dict(pl_module.named_parameters(remove_duplicate=False))
    broken = any(not bool(torch.isfinite(local_shard(gradient)).all()) for gradient in found.values())
    flags = torch.tensor([broken, *(name in found for name in names)], dtype=torch.float32, device=pl_module.device)
    anywhere = (average(flags) > 0).tolist()
    there = [False] * len(names) if anywhere[0] else anywhere[1:]

    def compute(name: str) -> Tensor:
        gradient = found.get(name)
        if gradient is None:
            gradient = torch.zeros_like(parameters[name])
        whole = _whole(gradient) if is_sharded(gradient) else average(gradient)
        return whole if scale == 1 else whole / scale

    shapes = {name: parameters[name].shape for name, found_one in zip(names, there, strict=True) if found_one}
    return LazyTensorMapping(shapes, compute)


def loss_scale(trainer: pl.Trainer) -> float:
    """Factor by which the precision plugin multiplies the loss now."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def whole_weights(pl_module: pl.LightningModule, names: list[str]) -> LazyTensorMapping:
    """Name -> whole weight, gathered when it is asked for; all processes must ask in the same order."""
    parameters = dict(pl_module.named_parameters(remove_duplicate=False))
    shapes = {name: parameters[name].shape for name in names if parameters[name].requires_grad}
    return LazyTensorMapping(shapes, lambda name: _whole(parameters[name]))


def _whole(tensor: Tensor) -> Tensor:
    return full_tensor(tensor.detach()).to(tensor.device)  # sharded weights may be offloaded
