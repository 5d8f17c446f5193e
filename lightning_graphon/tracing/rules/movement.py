"""Functions that move entries: reshapes, transposes, slices, copies; and concatenations."""

import torch
from torch import Tensor

from lightning_graphon.tracing.rules.parts import join_positions
from lightning_graphon.tracing.steps import Concatenation, Part
from lightning_graphon.tracing.tracer import Call, Tracer, refusal, rule
from lightning_graphon.tracing.views import View, encode

_MOVES = (
    "view", "reshape", "flatten", "unflatten", "ravel", "permute", "transpose", "swapaxes", "swapdims", "movedim",
    "moveaxis", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "view_as", "reshape_as", "chunk",
    "split", "tensor_split", "unbind", "__getitem__", "select", "narrow", "index_select", "roll", "flip", "repeat",
    "tile", "repeat_interleave", "t", "T", "mT", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
)  # fmt: skip
_COPIES = ("contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type_as", "type", "cpu", "cuda")
_DROPOUTS = ("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d")


@rule(*_MOVES, on_parameters=True)
def _move(tracer: Tracer, call: Call) -> None:
    if _is_constant(tracer, call):
        return
    view = tracer.view(call.tracked[0])
    codes = call.run(view.codes)
    pairs = [(call.out, codes)] if isinstance(codes, Tensor) else zip(call.out, codes, strict=True)
    for tensor, part in pairs:
        tracer.follow(tensor, view.with_codes(part))


@rule(*_COPIES, on_parameters=True)
def _copy(tracer: Tracer, call: Call) -> None:
    if not _is_constant(tracer, call):
        tracer.follow(call.out, tracer.view(call.args[0], call.label))


def _is_constant(tracer: Tracer, call: Call) -> bool:
    """Whether only the shape or dtype of what is followed counts, as of x in `mask.expand_as(x)`."""
    return isinstance(call.args[0], Tensor) and tracer.is_constant(call.args[0])


@rule(*_DROPOUTS)
def _dropout(tracer: Tracer, call: Call) -> None:
    if call.argument(2, "training", True) and call.argument(1, "p", 0.5) > 0:
        raise refusal(f"{call.label}, which is random in eval mode,")
    _copy(tracer, call)


@rule("pad")
def _pad(tracer: Tracer, call: Call) -> None:
    view = tracer.view(call.tracked[0])
    pad, mode, value = call.argument(1, "pad"), call.argument(2, "mode", "constant"), call.argument(3, "value")
    if mode == "constant":
        if value:
            raise refusal(f"{call.label} by the value {value}")
        codes = torch.nn.functional.pad(view.codes, pad, value=-1)
    else:
        codes = torch.nn.functional.pad(view.codes.double(), pad, mode=mode).long()
    tracer.follow(call.out, view.with_codes(codes))


@rule("cat", "concat", "concatenate")
def _cat(tracer: Tracer, call: Call) -> None:
    dim = int(call.argument(1, "dim", call.kwargs.get("axis", 0))) % call.out.ndim
    views = [tracer.view(t, call.label) for t in call.argument(0, "tensors")]
    units, places = [v.unit for v in views], [v.position for v in views]
    tokens = any(_varies(p, dim) for p in places) or _units_elsewhere(units, dim)
    if not any(_varies(u, dim) for u in units) and tokens:
        step, local = _along_positions(tracer, call, views, dim)
    elif not any(_varies(p, dim) for p in places):
        step, local = _along_units(tracer, call, views, dim)
    else:
        raise refusal(f"{call.label}, which joins flattened maps of several positions,")
    samples = torch.cat([_samples(view, call.out.shape, dim) for view in views], dim)
    codes = encode(samples, *local, step)
    tracer.record(call.out, step, codes, views, lambda *tensors: torch.cat(_expanded(tensors, call.out, dim), dim))


def _expanded(tensors: tuple[Tensor, ...], out: Tensor, dim: int) -> list[Tensor]:
    shapes = [[*out.shape[:dim], t.shape[dim], *out.shape[dim + 1 :]] for t in tensors]
    return [t.expand(shape) for t, shape in zip(tensors, shapes, strict=True)]


def _samples(view: View, shape: torch.Size, dim: int) -> Tensor:
    """Sample of each entry; of a parameter, which is the same for all, that of the first axis."""
    if view.step.batched:
        return view.sample
    size = [1] * len(shape)
    size[0] = shape[0]
    return torch.arange(shape[0]).reshape(size).expand(view.codes.shape)


def _varies(t: Tensor, dim: int) -> bool:
    return not bool((t == t.narrow(dim, 0, 1)).all())


def _units_elsewhere(units: list[Tensor], dim: int) -> bool:
    return any(_varies(u, d) for u in units for d in range(u.ndim) if d != dim)


def _along_units(
    tracer: Tracer, call: Call, views: list[View], dim: int
) -> tuple[Concatenation, tuple[Tensor, Tensor]]:
    firsts = [view.position.narrow(dim, 0, 1) for view in views]
    position, indices, count = join_positions(firsts)
    units, places = _side_by_side([view.unit for view in views])
    owners = [view.step.units[own[own >= 0]] for view, own in zip(views, units, strict=True)]
    step = Concatenation(
        call.label, torch.cat(owners), count, tuple(v.index for v in views), any(v.step.batched for v in views),
        parts=tuple(map(Part, units, indices)),
    )  # fmt: skip
    return step, (torch.cat(places, dim), position)


def _along_positions(
    tracer: Tracer, call: Call, views: list[View], dim: int
) -> tuple[Concatenation, tuple[Tensor, Tensor]]:
    # Units of the parts are matched entry by entry, where they stand beside each other.
    firsts = [view.unit.narrow(dim, 0, 1) for view in views]
    shape = torch.broadcast_shapes(*(f.shape for f in firsts))
    unit, indices, _ = join_positions([f.expand(shape) for f in firsts])
    owners = [view.step.units[index] for view, index in zip(views, indices, strict=True)]
    tracer.joined += [(owners[0], other) for other in owners[1:]]
    positions, places = _side_by_side([view.position for view in views])
    step = Concatenation(
        call.label, owners[0], len(positions[0]), tuple(v.index for v in views), any(v.step.batched for v in views),
        parts=tuple(map(Part, indices, positions)),
    )  # fmt: skip
    return step, (unit, torch.cat(places, dim))


def _side_by_side(values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Different numbers of several tensors, one after the other.

    Returns:
        For each tensor which of its numbers stands at each place of the whole, -1 where another's does; and the place
        of each of its entries.
    """
    found = [value.unique(return_inverse=True) for value in values]
    total, start, numbers, places = sum(len(own) for own, _ in found), 0, [], []
    for own, inverse in found:
        padded = torch.full((total,), -1)
        padded[start : start + len(own)] = own
        numbers.append(padded)
        places.append(inverse + start)
        start += len(own)
    return numbers, places
