"""Linear layers, convolutions, embeddings, batch norm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_graphon.compact.reading.records import LayerCall
from lightning_graphon.compact.reading.units import FIXED, Value, spread
from lightning_graphon.compact.reading.watcher import NoRuleError, Watcher, rule
from lightning_graphon.tracing.tracer import Call

Run = Callable[[Tensor, Tensor], Tensor]


@rule("linear")
def _linear(watcher: Watcher, call: Call) -> None:
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    value = watcher.value(call.argument(0, "input"))
    support = _own(watcher, weight, bias).reshape(len(weight), -1)
    known = record_layer(watcher, value, weight, bias, (0, 1), support, torch.nn.functional.linear, (-1, -1))
    set_layer(watcher, call.out, known, -1)


@rule("addmm")
def _addmm(watcher: Watcher, call: Call) -> None:
    """Linear with the weight stored [in, out], as transformers' Conv1D."""
    bias, weight = call.argument(0, "input"), call.argument(2, "mat2")
    value = watcher.value(call.argument(1, "mat1"))
    support = _own(watcher, weight, bias).T
    known = record_layer(watcher, value, weight, bias, (1, 0), support, torch.matmul, (-1, -1))
    set_layer(watcher, call.out, known, -1)


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(watcher: Watcher, call: Call) -> None:
    weight, bias, transposed = call.argument(1, "weight"), call.argument(2, "bias"), "transpose" in call.name
    names = ["stride", "padding", *(["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"])]
    options = {name: call.argument(3 + i, name) for i, name in enumerate(names)}
    options = {name: option for name, option in options.items() if option is not None}
    groups, value = int(options.get("groups", 1)), watcher.value(call.argument(0, "input"))
    kept = _own(watcher, weight, bias).flatten(2).any(2)
    if value.labels.ndim != weight.ndim:
        raise NoRuleError  # without an axis of samples
    support = full_support(
        kept.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1) if transposed else kept, groups
    )

    def run(x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = call.func(x, w, None, **options)
        return out

    axes = (1, 0) if transposed else (0, 1)
    if groups > 1:
        axes = (0, 0)
    known = record_layer(watcher, value, weight, bias, axes, support, run, (1, 1), groups)
    set_layer(watcher, call.out, known, 1)


def full_support(kept: Tensor, groups: int) -> Tensor:
    """Where [out, in] a convolution has weights, of where [out, in / groups] it has them."""
    if groups == 1:
        return kept
    full = kept.new_zeros(groups, len(kept) // groups, groups, kept.shape[1])
    for group, part in enumerate(kept.unflatten(0, (groups, -1))):
        full[group, :, group] = part
    return full.flatten(2).flatten(0, 1)


def _own(watcher: Watcher, weight: Tensor, bias: Any) -> Tensor:
    """Where the weight counts, if it is the module's own."""
    if not watcher.is_own(weight) or not (bias is None or watcher.is_own(bias)):
        raise NoRuleError
    return watcher.support(weight)


def record_layer(
    watcher: Watcher, value: Value, weight: Tensor, bias: Tensor | None, axes: tuple[int, int], support: Tensor,
    run: Run, dims: tuple[int, int], groups: int = 1,
) -> tuple[LayerCall, Tensor, Tensor]:  # fmt: skip
    """Remember a call of a layer.

    Args:
        watcher: That sees it.
        value: The input.
        weight: As stored.
        bias: As stored, or None.
        axes: Axes of outputs and inputs in the weight.
        support: Where [out, in] weights are kept.
        run: Of input and weight.
        dims: Axes of the units in input and output.
        groups: Of a convolution.

    Returns:
        The record; whether each output varies; the output where it does not, with zeros elsewhere.
    """
    inputs = value.along(dims[0])
    if inputs is None:
        raise NoRuleError
    varies, outputs = value.varies_along(dims[0]), watcher.units.new(len(support))
    constants = torch.where(spread(varies, value.varies.shape, dims[0] % value.varies.ndim), 0, value.constant)
    call = LayerCall(
        watcher.where, watcher.module, weight, bias, inputs, outputs, varies, support, constants, run,
        out_dim=dims[1], in_dim=dims[0], in_axis=axes[1] if groups == 1 else None,
        folds=bias is not None or _takes_bias(watcher.module, weight),
        calls=watcher.reading.calls[id(weight)],
    )  # fmt: skip
    call.calls.append(call)
    watcher.record(call)
    _slots(watcher, call, axes, groups)
    if not isinstance(call.module, (nn.Linear, _ConvNd)):  # its code may hold numbers of channels or groups
        watcher.units.doubt(torch.cat([inputs, outputs]), f"{call.path!r} calls a layer's function itself")
    changes = bias is not None and (watcher.training and bias.requires_grad)
    out = run(constants.to(weight.dtype), weight.detach())
    if bias is not None:
        out = out + spread(bias.detach(), out.shape, dims[1] % out.ndim)
    return call, (support & varies).any(1) | changes, out


def _takes_bias(module: nn.Module, weight: Tensor) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd)) and module.weight is weight


def _slots(watcher: Watcher, call: LayerCall, axes: tuple[int, int], groups: int) -> None:
    reading, (out_axis, in_axis) = watcher.reading, axes
    if call.bias is not None:
        reading.slot(call.bias, 0, call.outputs)
    if groups == 1:
        reading.slot(call.weight, out_axis, call.outputs)
        reading.slot(call.weight, in_axis, call.inputs)
        return
    # Groups go or stay as a whole.
    outputs, inputs = (labels.unflatten(0, (groups, -1)) for labels in (call.outputs, call.inputs))
    for labels in (outputs, inputs):
        watcher.units.join(labels, outputs[:, :1].expand(labels.shape))
    transposed = bool(getattr(call.module, "transposed", False))
    reading.slot(call.weight, 0, call.inputs if transposed else call.outputs)
    reading.groups[call.path] = outputs[:, 0]


def set_layer(watcher: Watcher, out: Tensor, known: tuple[LayerCall, Tensor, Tensor], dim: int) -> None:
    """Remember what a layer gives."""
    call, varies, constant = known
    dim %= out.ndim
    watcher.set(out, spread(call.outputs, out.shape, dim), spread(varies, out.shape, dim), constant)


@rule("embedding")
def _embedding(watcher: Watcher, call: Call) -> None:
    weight = call.argument(1, "weight")
    if not watcher.is_own(weight) or call.argument(3, "max_norm") is not None:
        raise NoRuleError
    watcher.use(watcher.value(call.argument(0, "input")).labels, f"{call.label} reads words")
    labels, out = watcher.units.new(weight.shape[1]), call.out
    watcher.reading.slot(weight, 1, labels)
    watcher.reading.slot(weight, 0, torch.full((len(weight),), FIXED))
    varies = watcher.support(weight).any(0)
    watcher.set(
        out, spread(labels, out.shape, out.ndim - 1), spread(varies, out.shape, out.ndim - 1), torch.zeros_like(out)
    )


@rule("batch_norm")
def _batch_norm(watcher: Watcher, call: Call) -> None:
    value = watcher.value(call.argument(0, "input"))
    labels, out = value.along(1), call.out
    mean, variance, weight, bias = (
        call.argument(i, n) for i, n in enumerate(("running_mean", "running_var", "weight", "bias"), 1)
    )
    owned = [tensor for tensor in (mean, variance, weight, bias) if tensor is not None]
    if labels is None or not all(watcher.is_own(tensor) for tensor in owned):
        raise NoRuleError
    for tensor in owned:
        watcher.reading.slot(tensor, 0, labels)
    varies = value.varies_along(1)
    if watcher.training:  # what starts at zero is learnt
        varies = varies | (bias is not None)
    elif weight is not None:
        varies = varies & (weight.detach() != 0)
    constants = torch.where(value.varies, 0, value.constant)
    mean, variance, weight, bias = (None if t is None else t.detach().clone() for t in (mean, variance, weight, bias))
    training, eps = bool(call.argument(5, "training", False)), float(call.argument(7, "eps", 1e-5))
    constant = torch.nn.functional.batch_norm(constants, mean, variance, weight, bias, training, eps=eps)
    watcher.set(out, spread(labels, out.shape, 1), spread(varies, out.shape, 1), constant)
