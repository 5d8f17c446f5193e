"""Functions that move entries: units move with them."""

import torch
from torch import Tensor

from lightning_graphon.compact.reading.units import Value, spread
from lightning_graphon.compact.reading.watcher import NoRuleError, Watcher, rule
from lightning_graphon.tracing.tracer import Call

_RESHAPES = ("view", "reshape", "unflatten", "view_as", "reshape_as", "expand", "broadcast_to")
_SELECTIONS = ("chunk", "split", "tensor_split", "unbind", "__getitem__", "select", "narrow", "index_select", "roll",
               "flip", "repeat", "tile", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle",
               "channel_shuffle")  # fmt: skip
_OTHERS = ("flatten", "ravel", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "squeeze",
           "unsqueeze", "expand_as", "t", "T", "mT")  # fmt: skip
_COPIES = ("contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type_as", "cpu", "cuda", "detach",
           "requires_grad")  # fmt: skip
_DROPOUTS = ("dropout", "alpha_dropout", "feature_alpha_dropout", "feature_dropout", "dropout1d", "dropout2d",
             "dropout3d")  # fmt: skip


@rule(*_RESHAPES, *_SELECTIONS, *_OTHERS)
def _move(watcher: Watcher, call: Call) -> None:
    if len(call.tracked) > 1 and call.name not in ("view_as", "reshape_as", "expand_as"):
        raise NoRuleError  # chosen by another tensor
    value = watcher.value(call.tracked[0])
    parts = (value.labels, value.varies, value.constant)  # expanded ones have no views
    moved = [call.run(part.contiguous() if call.name == "view" else part, *call.tracked[1:]) for part in parts]
    outs, found = ([call.out], [[m] for m in moved]) if isinstance(call.out, Tensor) else (call.out, moved)
    if not all(isinstance(out, Tensor) for out in outs):
        raise NoRuleError
    for out, labels, varies, constant in zip(outs, *found, strict=True):
        watcher.set(out, labels, varies, constant, fresh=value.fresh)
    if call.name not in _OTHERS and not value.fresh and value.axes():
        watcher.units.doubt(value.labels, f"{call.label} may count on its place")


@rule(*_COPIES)
def _copy(watcher: Watcher, call: Call) -> None:
    value = watcher.value(call.tracked[0])
    watcher.set(call.out, value.labels, value.varies, value.constant.to(call.out.dtype), fresh=value.fresh)


@rule(*_DROPOUTS)
def _dropout(watcher: Watcher, call: Call) -> None:
    value = watcher.value(call.tracked[0])
    shifts = "alpha" in call.name and watcher.training  # what is dropped is not zero
    watcher.set(call.out, value.labels, value.varies | shifts, value.constant)


@rule("pad")
def _pad(watcher: Watcher, call: Call) -> None:
    value = watcher.value(call.tracked[0])
    sides = len(call.argument(1, "pad")) // 2
    first = value.labels.ndim - sides
    if any(axis >= first for axis in value.axes()):
        raise NoRuleError
    inner = value.labels
    for dim in range(first, value.labels.ndim):
        inner = inner.narrow(dim, 0, 1)
    varies, constant = call.run(value.varies.to(value.constant)), call.run(value.constant)
    border = call.argument(2, "mode", "constant") == "constant"
    if border:  # of the border the value is known
        varies = torch.nn.functional.pad(value.varies, call.argument(1, "pad"), value=False)
    watcher.set(call.out, inner.expand(call.out.shape), varies.bool(), constant)


@rule("cat", "concat", "concatenate", "stack")
def _cat(watcher: Watcher, call: Call) -> None:
    tensors = [tensor for tensor in call.argument(0, "tensors") if tensor.numel()]  # caches begin empty
    values = [watcher.value(tensor) for tensor in tensors]
    dim = int(call.argument(1, "dim", call.kwargs.get("axis", 0))) % call.out.ndim
    if call.name == "stack":
        values = [value.map(lambda part: part.unsqueeze(dim)) for value in values]
    axes = [value.axes() for value in values if not value.fresh]
    if not any(dim in own for own in axes):
        values = _beside(watcher, values, dim)
    elif any(own not in ([], [dim]) for own in axes) or any(value.fresh for value in values):
        raise NoRuleError
    labels, varies = (torch.cat([getattr(v, part) for v in values], dim) for part in ("labels", "varies"))
    watcher.set(call.out, labels, varies, torch.cat([v.constant.to(call.out.dtype) for v in values], dim))


def _beside(watcher: Watcher, values: list[Value], dim: int) -> list[Value]:
    """Tokens after tokens: units at the same place are the same."""
    firsts = [value.labels.narrow(dim, 0, 1) for value in values]
    lead = next((f for f, v in zip(firsts, values, strict=True) if not v.fresh), firsts[0])
    for value in values:
        watcher.units.join(value.labels, lead.expand(value.labels.shape))
    return [Value(lead.expand(v.labels.shape), v.varies, v.constant) for v in values]


_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
          "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
          "adaptive_max_pool3d", "lp_pool1d", "lp_pool2d", "interpolate", "upsample", "max_pool1d_with_indices",
          "max_pool2d_with_indices", "max_pool3d_with_indices", "instance_norm")  # fmt: skip


@rule(*_POOLS)
def _pool(watcher: Watcher, call: Call) -> None:
    """Each channel for itself."""
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    value = watcher.value(call.tracked[0])
    labels = value.along(1)
    if labels is None or out.ndim != value.labels.ndim:
        raise NoRuleError
    constant = call.run(value.constant, *call.tracked[1:])
    varies = spread(value.varies_along(1), out.shape, 1)
    if call.name == "instance_norm":
        _norm_slots(watcher, call, labels)
        varies = varies | (watcher.training and call.argument(3, "weight") is not None)
    watcher.set(out, spread(labels, out.shape, 1), varies, constant if isinstance(constant, Tensor) else constant[0])


def _norm_slots(watcher: Watcher, call: Call, labels: Tensor) -> None:
    for tensor in call.tracked[1:]:
        if not watcher.is_own(tensor):
            raise NoRuleError
        watcher.reading.slot(tensor, 0, labels)


@rule("mean", "sum", "amax", "amin")
def _reduce(watcher: Watcher, call: Call) -> None:
    value, dims = watcher.value(call.tracked[0]), call.argument(1, "dim")
    if dims is None or value.fresh:
        raise NoRuleError
    axes = {int(d) % value.labels.ndim for d in ([dims] if isinstance(dims, int) else dims)}
    if axes & {*value.axes()}:
        raise NoRuleError
    keep = bool(call.argument(2, "keepdim", False))
    labels, varies = value.labels, value.varies
    for dim in sorted(axes, reverse=True):
        labels = labels.narrow(dim, 0, 1) if keep else labels.select(dim, 0)
        varies = varies.any(dim, keepdim=keep)
    watcher.set(call.out, labels, varies, call.run(value.constant))
