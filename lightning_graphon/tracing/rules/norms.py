"""Layers that normalise."""

import math

import torch
from torch import Tensor

from lightning_graphon.tracing.steps import BatchNorm, Norm
from lightning_graphon.tracing.tracer import Call, Tracer, refusal, rule
from lightning_graphon.tracing.views import View, constant_along


@rule("layer_norm", "rms_norm")
def _layer_norm(tracer: Tracer, call: Call) -> None:
    view, dims = tracer.view(call.tracked[0]), len(call.argument(1, "normalized_shape"))
    eps = call.argument(*((4, "eps", 1e-5) if call.name == "layer_norm" else (3, "eps", None)))
    bias = call.argument(3, "bias") if call.name == "layer_norm" else None
    unit, position = (t.flatten(-dims).flatten(0, -2) for t in (view.unit, view.position))  # [rows, entries]
    over_positions = constant_along(position, 1) is None
    groups = torch.full((len(view.step.units),), -1)
    groups[unit] = unit.amin(1, keepdim=True).expand_as(unit)
    every = torch.bincount(groups.clamp_min(0), minlength=len(groups))[groups.clamp_min(0)]
    size = unit.shape[1] // (view.step.positions if over_positions else 1)
    if bool((groups < 0).any()) or bool((every != size).any()):
        raise refusal(f"{call.label}, which normalises over some of the units,")
    entries = torch.zeros(len(view.step.units), view.step.positions, dtype=torch.long)
    entries[unit, position] = torch.arange(unit.shape[1]).expand_as(unit)
    _record(tracer, call, view, groups, over_positions, eps, bias, entries)


@rule("group_norm")
def _group_norm(tracer: Tracer, call: Call) -> None:
    view, count = tracer.view(call.tracked[0]), int(call.argument(1, "num_groups"))
    unit = constant_along(view.unit, 0, *range(2, view.codes.ndim))
    if unit is None or len(unit.unique()) < len(view.step.units):
        raise refusal(f"{call.label}, whose channels are not the same units at all positions,")
    groups, entries = torch.empty_like(unit), torch.empty_like(unit)
    groups[unit] = torch.arange(len(unit)) // (len(unit) // count)
    entries[unit] = torch.arange(len(unit))
    entries = entries[:, None].expand(-1, view.step.positions)
    _record(tracer, call, view, groups, True, call.argument(4, "eps", 1e-5), call.argument(3, "bias"), entries)


def _record(
    tracer: Tracer, call: Call, view: View, groups: Tensor, over_positions: bool, eps: float | None,
    bias: Tensor | None, entries: Tensor,
) -> None:  # fmt: skip
    weight = call.argument(2, "weight")
    step = Norm(
        call.label, view.step.units, view.step.positions, (view.index,), module=tracer.module, groups=groups,
        over_positions=over_positions, centred=call.name != "rms_norm",
        eps=torch.finfo(call.out.dtype).eps if eps is None else float(eps),
        weight=weight, weight_name=_name(tracer, call, weight, "weight"),
        bias=bias, bias_name=_name(tracer, call, bias, "bias"), entries=entries,
    )  # fmt: skip
    tracer.record(call.out, step, view.codes, [view], call.run)


def _name(tracer: Tracer, call: Call, tensor: Tensor | None, key: str) -> str | None:
    return None if tensor is None else tracer.weight_name(tensor, key, call.label)


@rule("batch_norm")
def _batch_norm(tracer: Tracer, call: Call) -> None:
    view, mean, variance = (
        tracer.view(call.tracked[0]),
        call.argument(1, "running_mean"),
        call.argument(2, "running_var"),
    )
    unit = constant_along(view.unit, 0, *range(2, view.codes.ndim))
    if call.argument(5, "training", False) or mean is None:
        raise refusal(f"{call.label} with the statistics of each batch")
    if unit is None or len(unit) < len(view.step.units) or math.prod(unit.unique().shape) < len(unit):
        raise refusal(f"{call.label}, whose channels are not the same units at all positions,")
    weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
    place = torch.empty_like(unit)
    place[unit] = torch.arange(len(unit))
    there = place.to(mean.device)
    step = BatchNorm(
        call.label, view.step.units, view.step.positions, (view.index,), module=tracer.module,
        mean=mean[there], variance=variance[there], eps=float(call.argument(7, "eps", 1e-5)), place=place,
        weight=weight, weight_name=_name(tracer, call, weight, "weight"),
        bias=bias, bias_name=_name(tracer, call, bias, "bias"),
    )  # fmt: skip
    tracer.record(call.out, step, view.codes, [view], call.run)
