"""Attention: scaled_dot_product_attention, and the multi-head module around it."""

import torch
from torch import Tensor

from lightning_graphon.tracing.rules.affine import layer_parameters, linear_step
from lightning_graphon.tracing.steps import Attention, LinearAttention, Part
from lightning_graphon.tracing.tracer import Call, Tracer, refusal, rule
from lightning_graphon.tracing.views import View, constant_along, encode

_attend = torch.nn.functional.scaled_dot_product_attention


@rule("scaled_dot_product_attention")
def _attention(tracer: Tracer, call: Call) -> None:
    views = [tracer.view(call.argument(i, name), call.label) for i, name in enumerate(("query", "key", "value"))]
    if call.argument(4, "dropout_p", 0.0) > 0 or call.kwargs.get("enable_gqa"):
        raise refusal(f"{call.label} with dropout or shared keys")
    scale = call.kwargs.get("scale") or views[0].codes.shape[-1] ** -0.5
    mask = _mask(call.argument(3, "attn_mask"), bool(call.argument(5, "is_causal", False)), views)
    record_attention(tracer, call.label, call.out, views, scale, mask)


def _mask(mask: Tensor | None, causal: bool, views: list[View]) -> Tensor | None:
    """What is added to the logits [heads or 1, queries, keys]."""
    queries, keys = views[0].codes.shape[-2], views[1].codes.shape[-2]
    if causal and mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask.cpu(), -torch.inf)
    while mask.ndim > 3:  # the same for all samples
        if len(mask) > 1 and not bool((mask == mask[:1]).all()):
            raise refusal("attention with a mask for each sample")
        mask = mask[0]
    return mask.detach().to("cpu", torch.float64).expand(mask.shape[0] if mask.ndim == 3 else 1, queries, keys)


def record_attention(
    tracer: Tracer, label: str, out: Tensor, views: list[View], scale: float, mask: Tensor | None, softmax: bool = True
) -> View:
    """A step of queries, keys and values [samples, heads, positions, width], or without heads."""
    heads = [view.with_codes(view.codes[:, None]) if view.codes.ndim == 3 else view for view in views]
    if any(view.codes.ndim != 4 for view in heads):
        raise refusal(f"{label} of tensors of {views[0].codes.ndim} axes")
    parts = [_part(label, view) for view in heads]
    value, part = heads[2], parts[2]
    units = part.units.reshape(-1)
    step = (Attention if softmax else LinearAttention)(
        label, value.step.units[units], heads[0].codes.shape[2], tuple(view.index for view in views),
        query=parts[0], key=parts[1], value=part, scale=float(scale), mask=mask,
    )  # fmt: skip
    places = torch.arange(step.positions)[:, None]
    local = torch.arange(len(units)).reshape(part.units.shape)[:, None]
    codes = encode(torch.arange(len(value.codes)).reshape(-1, 1, 1, 1), local, places, step)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not softmax:
            return scale * (q @ k.mT if mask is None else q @ k.mT * mask.to(q)) @ v
        return _attend(q, k, v, attn_mask=None if mask is None else mask.to(q), scale=scale)

    return tracer.record(out, step, codes.reshape(*views[0].codes.shape[:-1], -1), views, run)


def _part(label: str, view: View) -> Part:
    """Units [heads, width] and positions [tokens] of a view [samples, heads, tokens, width]."""
    unit, position = constant_along(view.unit, 0, 2), constant_along(view.position, 0, 1, 3)
    if unit is None or position is None or bool((view.codes < 0).any()) or not view.step.batched:
        raise refusal(f"{label}, whose heads are not the same units for all tokens,")
    return Part(unit, position)


@rule("multi_head_attention_forward")
def _multi_head(tracer: Tracer, call: Call) -> None:
    label, module = call.label, tracer.module
    if (
        call.argument(7, "bias_k") is not None
        or call.argument(9, "add_zero_attn")
        or call.kwargs.get("key_padding_mask") is not None
    ):
        raise refusal(f"{label} with key padding or added keys")
    query, key, value = (tracer.view(call.args[i], label) for i in range(3))
    heads, projections = int(call.args[4]), _projections(tracer, call)
    parts = []
    for view, (parameters, rows) in zip((query, key, value), projections, strict=True):
        step, codes, view = linear_step(tracer, label, view, parameters, rows)
        weight, bias = step.weight[rows] if rows else step.weight, step.bias
        bias = bias[rows] if bias is not None and rows else bias
        own = tracer.record(torch.empty(0), step, codes, [view], _linear(weight, bias))
        split = codes.unflatten(-1, (heads, -1))  # [tokens, samples, heads, width]
        parts.append(own.with_codes(split.permute(1, 2, 0, 3)))
    mask = call.kwargs.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = ~mask  # of this function True is left out
    width = parts[0].codes.shape[-1]
    mask = _mask(mask, bool(call.kwargs.get("is_causal", False)), parts)
    attended = record_attention(tracer, label, torch.empty(0), parts, width**-0.5, mask)
    joined = attended.with_codes(attended.codes.permute(2, 0, 1, 3).flatten(2))
    parameters = layer_parameters(tracer, label, call.args[11], call.args[12], "out_proj.")
    step, codes, view = linear_step(tracer, label, joined, parameters)
    out, weights = call.out
    tracer.record(out, step, codes, [view], _linear(step.weight, step.bias))
    if weights is not None:
        tracer.hide(weights)
    _ = module


def _linear(weight: Tensor, bias: Tensor | None):  # type: ignore[no-untyped-def]
    return lambda t: torch.nn.functional.linear(t, weight, bias)


def _projections(tracer: Tracer, call: Call) -> list[tuple[dict[str, object], slice | None]]:
    """Weights and biases of queries, keys and values, with their rows of a common weight."""
    bias, size = call.args[6], int(call.args[3])
    rows = [slice(i * size, (i + 1) * size) for i in range(3)]
    if not call.kwargs.get("use_separate_proj_weight"):
        common = layer_parameters(tracer, call.label, call.args[5], bias, "in_proj_")
        return [(common, part) for part in rows]
    if bias is not None:
        raise refusal(f"{call.label} with separate projections and a common bias")
    names = ("q_proj_", "k_proj_", "v_proj_")
    return [(layer_parameters(tracer, call.label, call.kwargs[f"{name}weight"], None, name), None) for name in names]
