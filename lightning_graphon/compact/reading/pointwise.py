"""Elementwise functions of one tensor or several: units that meet entry by entry are the same."""

import torch
from torch import Tensor

from lightning_graphon.compact.reading.records import Reads
from lightning_graphon.compact.reading.units import FIXED, Value
from lightning_graphon.compact.reading.watcher import NoRuleError, Watcher, rule
from lightning_graphon.tracing.rules.elementwise import ARITHMETIC, FUNCTIONS
from lightning_graphon.tracing.tracer import Call

_LIKE = ("zeros_like", "ones_like", "full_like")
_COMPARISONS = ("gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "logical_and", "logical_or", "logical_not",
                "bitwise_and", "bitwise_or", "__and__", "__or__", "__invert__")  # fmt: skip
_PRODUCTS = ("mul", "multiply")
_MORE = ("masked_fill", "nan_to_num", "round", "floor", "ceil", "trunc", "lerp", "addcmul", "addcdiv", "pow")


@rule(*FUNCTIONS, *ARITHMETIC, *_COMPARISONS, *_MORE)
def _pointwise(watcher: Watcher, call: Call) -> None:
    tensors = _tensors(call)
    if not isinstance(call.out, Tensor) or any(t.ndim > call.out.ndim for t in tensors):
        raise NoRuleError
    if call.name == "prelu" and call.argument(1, "weight").numel() > 1:
        _prelu(watcher, call)
        return
    values = [_aligned(watcher.value(t), call.out.ndim) for t in tensors]
    fresh = all(value.fresh for value in values)
    labels = values[0].labels if len(values) == 1 else _meet(watcher, call, values)
    varies, constant = _outcome(call, tensors, [watcher.value(t) for t in tensors])
    watcher.set(call.out, labels, varies, constant, fresh=fresh and len(values) == 1)


@rule(*_LIKE)
def _like(watcher: Watcher, call: Call) -> None:
    value = watcher.value(call.tracked[0])
    if value.fresh:
        raise NoRuleError
    watcher.set(call.out, value.labels, torch.tensor(watcher.training), call.out)


@rule("glu")
def _glu(watcher: Watcher, call: Call) -> None:
    value, dim = watcher.value(call.tracked[0]), int(call.argument(1, "dim", -1))
    (labels, gates), (varies, gate_varies) = (part.chunk(2, dim) for part in (value.labels, value.varies))
    watcher.units.join(labels, gates)
    watcher.record(Reads(gates.reshape(-1), labels.reshape(-1)))
    zero = ~varies & (value.constant.chunk(2, dim)[0] == 0)
    watcher.set(call.out, labels, (varies | gate_varies) & ~zero, call.run(value.constant))


def _tensors(call: Call) -> list[Tensor]:
    found = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)]
    return list({id(t): t for t in found}.values())


def _aligned(value: Value, ndim: int) -> Value:
    shape = (*[1] * (ndim - value.labels.ndim), *value.labels.shape)
    return value.map(lambda part: part.reshape(shape))


def _outcome(call: Call, tensors: list[Tensor], values: list[Value]) -> tuple[Tensor, Tensor]:
    """Whether the result varies, and what it is where it does not."""
    constants = {id(t): v.constant.clone() for t, v in zip(tensors, values, strict=True)}
    swap = [constants.get(id(a), a) if isinstance(a, Tensor) else a for a in call.args]
    named = {key: constants.get(id(a), a) if isinstance(a, Tensor) else a for key, a in call.kwargs.items()}
    if call.name == "rrelu":  # drawn in training; of zero it is zero
        named.pop("training", None)
    constant = call.func(*swap, **named)
    shape = call.out.shape
    varies = torch.zeros((), dtype=torch.bool).expand(shape)
    for value in values:
        varies = varies | value.varies
    if call.name in _PRODUCTS:  # zero times anything
        for value in values:
            varies = varies & ~(~value.varies & (value.constant == 0))
        constant = torch.where(varies, 0, constant)
    return varies.expand(shape), constant


def _prelu(watcher: Watcher, call: Call) -> None:
    value, weight = watcher.value(call.args[0]), call.argument(1, "weight")
    labels = value.along(1)
    if labels is None or not watcher.is_own(weight):
        raise NoRuleError
    watcher.reading.slot(weight, 0, labels)
    watcher.set(call.out, value.labels, value.varies, call.func(value.constant, weight))


def _meet(watcher: Watcher, call: Call, values: list[Value]) -> Tensor:
    """Labels of what several tensors give."""
    shape, known = call.out.shape, [value for value in values if not value.fresh]
    axes = {axis for value in known or values for axis in value.axes()}
    leads = [value for value in known or values if value.axes()]
    if any(value.labels.shape[axis] < shape[axis] for value in leads for axis in axes):
        raise NoRuleError  # one unit meets several, and others
    if not leads:
        return _single(watcher, call, known or values)
    small = [_along(value.labels, axes).expand(_shape(shape, axes)) for value in leads]
    for value in values:
        _follow(watcher, call, value, value in leads, small[0], axes)
    labels = _joined(watcher, small)
    for value in known:
        if not any(value is lead for lead in leads) and bool((value.labels != FIXED).any()):
            watcher.record(Reads(value.labels.reshape(-1)[:1].expand(labels.numel()), labels.reshape(-1)))
    return labels.expand(shape)


def _along(labels: Tensor, axes: set[int]) -> Tensor:
    for dim in range(labels.ndim):
        if dim not in axes:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _shape(shape: torch.Size, axes: set[int]) -> list[int]:
    return [size if dim in axes else 1 for dim, size in enumerate(shape)]


def _follow(watcher: Watcher, call: Call, value: Value, leads: bool, labels: Tensor, axes: set[int]) -> None:
    """Parameters take the units that they meet; what is computed elsewhere keeps them."""
    if leads:
        return
    wide = [value.labels.shape[axis] > 1 for axis in axes]
    if value.fresh and all(wide):
        watcher.units.join(value.labels, labels.expand(value.labels.shape))
    elif value.fresh:
        watcher.units.pin(value.labels, f"{call.label} adds the same to several")
        if any(wide):
            raise NoRuleError
    elif any(wide):
        watcher.units.pin(labels, f"{call.label} meets a tensor of this size that is no parameter")


def _joined(watcher: Watcher, labels: list[Tensor]) -> Tensor:
    """New labels of what several units give, each the same unit as those that it reads."""
    different = [labels[0]]
    different += [other for other in labels[1:] if not torch.equal(other, labels[0])]
    if len(different) == 1:
        return labels[0]
    table = torch.stack([t.reshape(-1) for t in different])
    columns, place = table.unique(dim=1, return_inverse=True)
    new = watcher.units.new(columns.shape[1])
    for row in columns:
        watcher.units.join(new, row)
        watcher.record(Reads(row, new))
    return new[place].reshape(labels[0].shape)


def _single(watcher: Watcher, call: Call, values: list[Value]) -> Tensor:
    """One unit meets one other, or what has none."""
    labels = torch.stack([value.labels.reshape(-1)[0] for value in values if value.labels.numel()])
    own = labels[labels != FIXED].unique()
    if len(own) < 2:
        return (own if len(own) else labels[:1]).reshape([1] * call.out.ndim).expand(call.out.shape)
    return _joined(watcher, [label.reshape([1] * call.out.ndim) for label in own]).expand(call.out.shape)
