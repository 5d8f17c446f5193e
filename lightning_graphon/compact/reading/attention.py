"""Attention: heads go or stay as a whole."""

import torch
from torch import Tensor

from lightning_graphon.compact.reading.layers import record_layer, set_layer
from lightning_graphon.compact.reading.records import Reads, Used
from lightning_graphon.compact.reading.units import Value, spread
from lightning_graphon.compact.reading.watcher import Heads, NoRuleError, Watcher, rule
from lightning_graphon.tracing.tracer import Call


@rule("scaled_dot_product_attention")
def _attention(watcher: Watcher, call: Call) -> None:
    values = [watcher.value(call.argument(i, name)) for i, name in enumerate(("query", "key", "value"))]
    heads = [_heads(value) for value in values]
    if call.kwargs.get("enable_gqa") or any(part is None for part in heads):
        raise NoRuleError
    query, key, value = (part for part in heads if part is not None)
    if len({len(query), len(key), len(value)}) > 1:
        raise NoRuleError
    mask = call.argument(3, "attn_mask")
    if mask is not None and watcher.follows(mask):
        watcher.use(watcher.value(mask).labels, f"{call.label} has it as mask")
    drops = watcher.module.training and call.argument(4, "dropout_p", 0.0) > 0
    known = values[2].constant
    # Means of constants vary where these differ from token to token.
    changing = values[2].varies | (known != (0 if drops else known[:1, :, :1]))
    labels, varies = attend(watcher, query, key, value, changing.any(-2).any(0))
    watcher.reading.heads.append(Heads(watcher.where, labels[:, 0], labels.shape[1]))
    constant = values[2].constant[:1, :, :1].expand(call.out.shape)
    watcher.set(call.out, labels[None, :, None].expand(call.out.shape), varies[None, :, None], constant)


def attend(watcher: Watcher, query: Tensor, key: Tensor, value: Tensor, varies: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [heads, width] of what attention gives, and whether it varies: means of constants are constants."""
    out = watcher.units.new(value.numel()).reshape(value.shape)
    for part in (query, key, value):
        watcher.units.join(part, out[:, :1].expand(part.shape))
    watcher.units.join(out, out[:, :1].expand(out.shape))
    watcher.record(Reads(value.reshape(-1), out.reshape(-1)))
    changing = out[varies]
    for part in (query, key):
        rows = part[:, None].expand(-1, out.shape[1], -1)[varies]
        watcher.record(Reads(rows.reshape(-1), changing[:, None].expand(rows.shape).reshape(-1)))
    return out, varies


def _heads(value: Value) -> Tensor | None:
    """Labels [heads, width] of [samples, heads, tokens, width]."""
    if value.labels.ndim != 4 or any(axis in (0, 2) for axis in value.axes()):
        return None
    return value.labels[0, :, 0]


@rule("multi_head_attention_forward")
def _multi_head(watcher: Watcher, call: Call) -> None:
    weight, bias, out_weight, out_bias = call.args[5], call.args[6], call.args[11], call.args[12]
    plain = not call.kwargs.get("use_separate_proj_weight") and call.argument(7, "bias_k") is None
    owned = [t for t in (weight, bias, out_weight, out_bias) if t is not None]
    if not plain or call.argument(9, "add_zero_attn") or not all(watcher.is_own(t) for t in owned):
        raise NoRuleError
    for tensor in call.tracked:
        if not any(tensor is own for own in owned):
            watcher.use(watcher.value(tensor).labels, f"{call.label} reads it")
    out, count = call.out[0], int(call.args[4])
    known = watcher.support(weight).any(1)
    rows = watcher.units.new(len(weight))
    watcher.reading.slot(weight, 0, rows)
    constants = torch.zeros(len(weight) // 3, dtype=weight.dtype)
    value_varies = known[-len(constants) :]
    if bias is not None:
        watcher.reading.slot(bias, 0, rows)
        constants = bias.detach()[-len(constants) :]
        value_varies = value_varies | (watcher.training & bias.requires_grad)
    query, key, value = rows.reshape(3, count, -1)
    if watcher.module.training and float(call.argument(10, "dropout_p", 0.0)) > 0:
        value_varies = value_varies | (constants != 0)
    labels, varies = attend(watcher, query, key, value, value_varies.reshape(count, -1))
    varies = varies.reshape(-1)
    watcher.reading.heads.append(Heads(watcher.where, labels[:, 0], labels.shape[1]))
    shape = torch.Size([*out.shape[:-1], labels.numel()])
    attended = Value(
        spread(labels.reshape(-1), shape, len(shape) - 1), spread(varies, shape, len(shape) - 1),
        torch.where(varies, 0, constants).expand(shape),
    )  # fmt: skip
    support = watcher.support(out_weight)
    layer = record_layer(watcher, attended, out_weight, out_bias, (0, 1), support, torch.nn.functional.linear, (-1, -1))
    set_layer(watcher, out, layer, -1)
    if call.out[1] is not None:
        watcher.set_fixed(call.out[1])
        watcher.record(Used(torch.cat([query.reshape(-1), key.reshape(-1)])))
