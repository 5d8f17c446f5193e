"""Linear layers and convolutions."""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from lightning_graphon.tracing.steps import Affine
from lightning_graphon.tracing.tracer import Call, Tracer, refusal, rule
from lightning_graphon.tracing.views import View, constant_along, encode


@rule("linear")
def _linear(tracer: Tracer, call: Call) -> None:
    view = tracer.view(call.tracked[0])
    parameters = layer_parameters(tracer, call.label, call.argument(1, "weight"), call.argument(2, "bias"))
    step, codes, view = linear_step(tracer, call.label, view, parameters)
    tracer.record(call.out, step, codes, [view], call.run)


def linear_step(
    tracer: Tracer, label: str, view: View, parameters: dict[str, Any], rows: slice | None = None
) -> tuple[Affine, Tensor, View]:
    """A Linear layer over the last axis of a view, with all rows of its weight or some: step, codes, what it reads."""
    if constant_along(view.unit, *range(view.codes.ndim - 1)) is None:
        view = tracer.with_units_along(view, view.codes.ndim - 1)
    unit = constant_along(view.unit, *range(view.codes.ndim - 1))
    sample = constant_along(view.sample, -1 % view.codes.ndim)
    if bool((view.codes < 0).any()):
        raise refusal(f"{label}, which reads zero padding,")
    if unit is None and constant_along(view.unit, view.codes.ndim - 1) is not None:
        raise refusal(f"{label}, which mixes positions (tokens) with weights that all channels share,")
    if unit is None or sample is None:
        raise refusal(f"{label}, which reads other units at some positions than at others,")
    # Rows that read the same positions differ by their sample.
    reads, place = view.position.flatten(0, -2).unique(dim=0, return_inverse=True)
    taps, tap_of = reads.unique(dim=1, return_inverse=True)
    out = len(parameters["weight"]) if rows is None else rows.stop - rows.start
    step = Affine(
        label, tracer.new_units(out), len(reads), (view.index,),
        module=tracer.module, features=unit, tap_of=tap_of, taps=taps.T.contiguous(), rows=rows,
        **parameters,
    )  # fmt: skip
    place = place.reshape(view.codes.shape[:-1])
    return step, encode(sample[..., None], torch.arange(out), place[..., None], step), view


def layer_parameters(
    tracer: Tracer, label: str, weight: Tensor, bias: Tensor | None, prefix: str = ""
) -> dict[str, Any]:
    """A layer's weight and bias with their names.

    Raises:
        NotReadableError: They are computed, or another layer has them.
    """
    name = tracer.weight_name(weight, f"{prefix}weight", label)
    bias_name = None if bias is None else tracer.weight_name(bias, f"{prefix}bias", label)
    return {"weight_name": name, "weight": weight, "bias_name": bias_name, "bias": bias}


@rule("conv1d", "conv2d", "conv3d")
def _convolution(tracer: Tracer, call: Call) -> None:
    view, weight, bias = tracer.view(call.tracked[0]), call.argument(1, "weight"), call.argument(2, "bias")
    dims = weight.ndim - 2
    space = tuple(range(2, 2 + dims))
    if view.codes.ndim == dims + 2 and constant_along(_filled(view.unit, view.codes), 0, *space) is None:
        view = tracer.with_units_along(view, 1)
    inside = view.codes.clamp_min(0)  # of zero padding the place is known below
    unit = constant_along(_filled(view.unit, view.codes), 0, *space) if view.codes.ndim == dims + 2 else None
    if unit is None or constant_along(_filled(view.sample, view.codes), *range(1, 2 + dims)) is None:
        raise refusal(f"{call.label}, whose channels are not the same units at all positions,")
    grid = constant_along(torch.where(view.codes < 0, -1, inside % view.step.positions), 0, 1)
    if grid is None:
        raise refusal(f"{call.label}, whose channels are not at the same positions,")
    taps = _taps(grid, call, weight.shape[2:])
    groups = int(call.argument(6, "groups", 1))
    _refuse_depthwise(call.label, weight, groups)
    count = len(taps)
    step = Affine(
        call.label, tracer.new_units(len(weight)), taps[0].numel(), (view.index,), module=tracer.module,
        features=unit.repeat_interleave(count), tap_of=torch.arange(count).repeat(len(unit)), taps=taps.flatten(1),
        groups=groups, **layer_parameters(tracer, call.label, weight, bias),
    )  # fmt: skip
    shape = [1, -1, *[1] * dims]
    samples = torch.arange(len(view.codes)).reshape(-1, *[1] * (dims + 1))
    places = torch.arange(taps[0].numel()).reshape(1, 1, *taps.shape[1:])
    codes = encode(samples, torch.arange(len(weight)).reshape(shape), places, step)
    tracer.record(call.out, step, codes, [view], call.run)


def _filled(numbers: Tensor, codes: Tensor) -> Tensor:
    """Numbers with those of the zero padding, which has none, taken from the middle of their channel."""
    if not bool((codes < 0).any()):
        return numbers
    flat, inside = numbers.flatten(2), codes.flatten(2) >= 0
    some = flat.gather(2, inside.long().argmax(2, keepdim=True))
    return torch.where(inside, flat, some).view_as(numbers)


def _taps(grid: Tensor, call: Call, kernel: torch.Size) -> Tensor:
    """Positions [taps, *out] that each output position reads; -1 outside."""
    dims = len(kernel)
    stride, dilation = (_each(call.argument(i, n, 1), dims) for i, n in ((3, "stride"), (5, "dilation")))
    padding = call.argument(4, "padding", 0)
    if padding == "same":  # torch pads less on the left
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        ends = [(t // 2, t - t // 2) for t in total]
    else:
        ends = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]
    for dim, (left, right) in enumerate(ends):
        grid = torch.cat([_outside(grid, dim, left), grid, _outside(grid, dim, right)], dim)
    found = []
    for tap in product(*map(range, kernel)):
        part = grid
        for dim, (t, d, k, s) in enumerate(zip(tap, dilation, kernel, stride, strict=True)):
            count = (grid.shape[dim] - d * (k - 1) - 1) // s + 1
            part = part.narrow(dim, t * d, s * (count - 1) + 1)
            part = part[(slice(None),) * dim + (slice(None, None, s),)]
        found.append(part)
    return torch.stack(found)


def _outside(grid: Tensor, dim: int, count: int) -> Tensor:
    shape = [*grid.shape]
    shape[dim] = count
    return grid.new_full(shape, -1)


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else [*value]
    return values * dims if len(values) == 1 else values


def _refuse_depthwise(label: str, weight: Tensor, groups: int) -> None:
    if groups > 1 and weight.shape[1] == 1:
        raise refusal(f"{label}, which is depthwise: its few taps per channel sum up to no Gaussian; it")
