"""Cut the units out of a copy."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graphon._shared.weight_layout import correct_sizes
from lightning_graphon.compact.multihead import SmallMultiheadAttention
from lightning_graphon.compact.reading.records import LayerCall
from lightning_graphon.compact.reading.watcher import Reading
from lightning_graphon.compact.removal import Removal

Kept = dict[int, list[tuple[int, Tensor]]]  # tensor id -> axes and the indices that stay


def kept_indices(reading: Reading, removal: Removal) -> Kept:
    """What stays of each parameter and buffer that loses something."""
    kept: Kept = {}
    for slot in reading.slots.values():
        _add(kept, slot.tensor, slot.axis, ~removal.gone[slot.labels])
    for key, stored in reading.stored.items():
        if key in removal.axes:
            axis = removal.axes[key]
            labels = stored.labels.movedim(axis, -1).reshape(-1, stored.labels.shape[axis])[0]
            _add(kept, stored.tensor, axis, ~removal.gone[labels])
    return kept


def _add(kept: Kept, tensor: Tensor, axis: int, stays: Tensor) -> None:
    if not bool(stays.all()):
        kept.setdefault(id(tensor), []).append((axis, stays.nonzero().flatten()))


def take(tensor: Tensor, axes: list[tuple[int, Tensor]]) -> Tensor:
    """The part of a tensor at these indices.

    >>> take(torch.arange(6).reshape(2, 3), [(1, torch.tensor([0, 2]))])
    tensor([[0, 2],
            [3, 5]])
    """
    for axis, index in axes:
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def registered(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, module, key and tensor of every parameter and buffer, under each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for register in (module._parameters, module._buffers):
            for key, tensor in list(register.items()):
                if tensor is not None:
                    yield f"{path}.{key}" if path else key, module, key, tensor


@torch.no_grad()
def cut(model: nn.Module, original: nn.Module, reading: Reading, removal: Removal) -> None:
    """Make a copy of `original` small, in place."""
    names = {id(tensor): name for name, _, _, tensor in registered(original)}
    copies = {name: tensor for name, _, _, tensor in registered(model)}  # maybe on another device
    kept = kept_indices(reading, removal)
    _fold(model, {key: copies[name] for key, name in names.items()}, reading, removal)
    _replace(model, {id(copies[name]): kept[key] for key, name in names.items() if key in kept})
    for path, labels in reading.groups.items():
        _set(model.get_submodule(path), "groups", int((~removal.gone[labels]).count_nonzero()))
    for module in model.modules():
        correct_sizes(module)
    for heads in reading.heads:
        _fewer_heads(model, heads.path, len(heads.labels), (~removal.gone[heads.labels]), heads.width)


def _fold(model: nn.Module, copy_of: dict[int, Tensor], reading: Reading, removal: Removal) -> None:
    for calls in reading.calls.values():
        call = calls[-1]
        if not bool(call.fold.any()):
            continue
        added = call.added() if len(calls) == 1 else torch.zeros(())
        if bool((added != 0).any()):
            _add_bias(model.get_submodule(call.path), call, copy_of, added, ~removal.gone[call.outputs])
        _clear(copy_of[id(call.weight)], call, reading)


def _add_bias(module: nn.Module, call: LayerCall, copy_of: dict[int, Tensor], added: Tensor, stays: Tensor) -> None:
    if call.bias is not None:
        bias = copy_of[id(call.bias)]
        bias.copy_((bias.cpu().double() + added).to(bias))
    else:
        module.bias = nn.Parameter(added[stays].to(copy_of[id(call.weight)]))


def _clear(weight: Tensor, call: LayerCall, reading: Reading) -> None:
    """What was folded is not read again where it stays."""
    if call.in_axis is None:
        _clear_groups(weight, call, len(reading.groups[call.path]))
        return
    weight.index_fill_(call.in_axis, call.fold.nonzero().flatten().to(weight.device), 0)


def _clear_groups(weight: Tensor, call: LayerCall, groups: int) -> None:
    folded = call.fold.unflatten(0, (groups, -1))
    if getattr(call.module, "transposed", False):
        weight[call.fold] = 0
    else:
        for rows, columns in zip(weight.unflatten(0, (groups, -1)), folded, strict=True):
            rows[:, columns] = 0


def _replace(model: nn.Module, kept: Kept) -> None:
    new: dict[int, Tensor] = {}  # tied tensors stay tied
    for _, module, key, tensor in list(registered(model)):
        if id(tensor) not in kept:
            continue
        if id(tensor) not in new:
            small = take(tensor.detach(), kept[id(tensor)])
            parameter = isinstance(tensor, nn.Parameter)
            new[id(tensor)] = nn.Parameter(small, tensor.requires_grad) if parameter else small
        register: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
        register[key] = new[id(tensor)]


_COUNTS = ("num_heads", "n_heads", "nhead", "num_attention_heads", "n_head", "heads")
_WIDTHS = ("attn_dim", "all_head_size", "inner_dim", "embed_dim", "hidden_size")


def _fewer_heads(model: nn.Module, path: str, heads: int, stays: Tensor, width: int) -> None:
    count, module = int(stays.count_nonzero()), model.get_submodule(path)
    if count == heads:
        return
    if type(module) is nn.MultiheadAttention:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, SmallMultiheadAttention(module, count, width))
        return
    for names, before, after in ((_COUNTS, heads, count), (_WIDTHS, heads * width, count * width)):
        for name in names:
            if getattr(module, name, None) == before:
                _set(module, name, after)


def _set(module: nn.Module, name: str, value: int) -> None:
    setattr(module, name, value)
