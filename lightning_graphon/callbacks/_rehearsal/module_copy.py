"""A deep copy of a LightningModule that shares nothing that training changes."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_graphon.callbacks._distributed.agreement import flattens_parameters
from lightning_graphon.dynamics import UnsupportedTrainingError
from lightning_graphon.pruning import is_sharded

_SHARED = (Dataset, DataLoader, Sampler, pl.LightningDataModule, Logger, Callback)  # data and tools, no part of a model
# What would rebuild the network, prepare data a second time or speak.
_SILENT = ("setup", "configure_model", "configure_sharded_model", "prepare_data", "print")


def refuse_what_cannot_be_copied(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Raise where a nested fit is not possible.

    Raises:
        UnsupportedTrainingError: Weights are flattened or sharded, or `training_step` draws its own batches.
    """
    if flattens_parameters(trainer):
        raise UnsupportedTrainingError(f"{type(trainer.strategy).__name__} flattens the weights, and no copy can train")
    if any(map(is_sharded, (*pl_module.parameters(), *pl_module.buffers()))):
        raise UnsupportedTrainingError("the weights are sharded over processes, and a rehearsal needs them whole")
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise UnsupportedTrainingError("training_step(dataloader_iter) draws its own batches, and has no others")


def copy_module(trainer: pl.Trainer, pl_module: pl.LightningModule, nested: pl.Trainer) -> pl.LightningModule:
    """A copy with the weights, buffers, gradients, flags and hooks of the module, attached to no trainer yet.

    What the module knows of its trainer and loggers becomes the nested one's. Datasets, loaders, loggers and callbacks
    that it holds are shared. Compiled parts run uncompiled.

    Args:
        trainer: The module's trainer.
        pl_module: The module.
        nested: Will train the copy; its loggers stand for the trainer's.

    Raises:
        UnsupportedTrainingError: It cannot be copied; the message says why.
    """
    memo: dict[int, Any] = {id(trainer): nested}
    memo.update((id(value), _stand_in(value)) for value in _held(pl_module) if _stand_in(value) is not None)
    memo.update((id(old), new) for old, new in zip(trainer.loggers, nested.loggers, strict=True))
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        memo[id(pl_module._compiler_ctx)] = {}
    try:
        twin = copy.deepcopy(pl_module, memo)
    except Exception as error:
        raise UnsupportedTrainingError(_why_not(pl_module, error)) from error
    modules: list[Any] = list(twin.modules())
    for module in modules:
        _uncompile(module, memo)
        if isinstance(module, pl.LightningModule):
            module._metric_attributes = None  # by the ids of metrics, which the copy has others of
        if hasattr(module, "distributed_available_fn"):
            module.distributed_available_fn = _not_distributed  # torchmetrics: other processes would wait for ever
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = _LocalBatchNorm  # type: ignore[assignment]
    for old, new in zip(pl_module.parameters(), twin.parameters(), strict=True):
        _copy_hooks(old, new)
    twin.__dict__.update(dict.fromkeys(_SILENT, _nothing))
    return twin


def copy_gradients(gradients: Iterable[Tensor | None], twin: nn.Module) -> None:
    """Give the parameters of a copy clones of gradients, in order: a fit may begin while they accumulate."""
    for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.detach().clone()


def release(twin: pl.LightningModule, nested: pl.Trainer, kept: Iterable[Tensor]) -> None:
    """Free the memory of a copy now: garbage collection would find the circles of trainer and module much later.

    Args:
        twin: The copy.
        nested: Its trainer.
        kept: Tensors that others need.
    """
    spared = set(map(id, kept))
    for tensor in (*twin.parameters(), *twin.buffers()):
        if id(tensor) not in spared:
            tensor.grad = None
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    for optimizer in nested.optimizers:
        getattr(optimizer, "state", {}).clear()
    nested.strategy._optimizers, nested.strategy._lightning_optimizers = [], []
    twin.trainer = None


def _held(module: nn.Module) -> Iterator[Any]:
    """Values that modules hold as attributes, by themselves or in plain containers."""
    for part in module.modules():
        for value in vars(part).values():
            members = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
            yield from members


def _stand_in(value: Any) -> Any:
    """What takes the place of a value in the copy; None for what is copied as usual."""
    if isinstance(value, Tensor) and not value.is_leaf:
        return value.detach().clone()  # a loss that was kept, or a weight computed from others: torch refuses to copy
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return value if isinstance(value, _SHARED) else None


def _uncompile(module: Any, memo: dict[int, Any]) -> None:
    """Undo what would call the original: functions that `torch.compile` made of its methods."""
    module._compiled_call_impl = None
    if getattr(module, "_compiler_ctx", None) is not None:
        module._compiler_ctx = None
    for name, value in list(vars(module).items()):
        if (original := getattr(value, "_torchdynamo_orig_callable", None)) is not None:
            of_original = id(getattr(original, "__self__", None)) in memo  # a compiled module makes one of its own
            module.__dict__[name] = copy.deepcopy(original, memo) if of_original else original


def _copy_hooks(old: nn.Parameter, new: nn.Parameter) -> None:
    """Hooks on gradients that users registered; those of the library and of DDP are of another kind."""
    for hook in (old._backward_hooks or {}).values():
        if new.requires_grad:
            new.register_hook(hook)


class _LocalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm that asks no other process."""

    def _check_input_dim(self, input: Tensor) -> None: ...


def _why_not(pl_module: pl.LightningModule, error: Exception) -> str:
    """Which attribute cannot be copied."""
    for path, module in pl_module.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (Tensor, nn.Module)) or name in ("_parameters", "_buffers", "_modules", "_trainer"):
                continue
            try:
                copy.deepcopy(value)
            except Exception as own:
                where = f"{path}.{name}" if path else name
                return f"the module cannot be copied, because of its attribute {where} ({type(own).__name__}: {own})"
    return f"the module cannot be copied ({type(error).__name__}: {error})"


def _not_distributed() -> bool:
    return False


def _nothing(*args: Any, **kwargs: Any) -> None: ...
