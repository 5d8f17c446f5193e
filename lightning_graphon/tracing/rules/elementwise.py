"""Elementwise functions of one tensor, sums and products of several."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_graphon.tracing.rules.parts import join_positions
from lightning_graphon.tracing.steps import Part, Pointwise, Product, Spatial, Sum
from lightning_graphon.tracing.tracer import Call, Tracer, refusal, rule
from lightning_graphon.tracing.views import View, encode

FUNCTIONS = (
    "relu", "leaky_relu", "prelu", "rrelu", "gelu", "silu", "elu", "selu", "celu", "tanh", "sigmoid", "softplus",
    "softsign", "mish", "hardtanh", "relu6", "hardsigmoid", "hardswish", "hardshrink", "softshrink", "threshold",
    "logsigmoid", "log_sigmoid", "tanhshrink", "erf", "sin", "cos", "exp", "abs", "square", "atan", "sinh", "asinh",
    "sign", "sqrt", "rsqrt", "log", "log1p", "expm1", "reciprocal", "neg", "negative", "pow", "float_power",
    "__rpow__", "clamp", "clamp_min", "clamp_max", "clip", "sinc", "cosh", "arctan", "erfc", "heaviside", "logit",
)  # fmt: skip
_SUMS, _PRODUCTS = ("add", "sub", "subtract", "rsub"), ("mul", "multiply")
ARITHMETIC = (*_SUMS, *_PRODUCTS, "div", "divide", "true_divide", "__rdiv__", "__rtruediv__", "maximum", "minimum",
               "where")  # fmt: skip


@rule(*FUNCTIONS, *ARITHMETIC)
def _elementwise(tracer: Tracer, call: Call) -> None:
    constants = [t for t in _tensors(call) if t.numel() > 1 and not any(t is other for other in call.tracked)]
    views = [tracer.view(t, call.label) for t in call.tracked]
    if call.name == "prelu":
        _check_slopes(call)
        constants = []
    elif any(tracer.is_parameter(t) and t.requires_grad and t.numel() == 1 for t in _tensors(call)):
        raise refusal(f"{call.label} with one trained number for all units")
    if not constants and _same_root(views, tracer):
        _pointwise(tracer, call, views)
    elif call.name in _SUMS:
        _sum(tracer, call)
    elif call.name in _PRODUCTS:
        _product(tracer, call)
    elif call.name in ("div", "divide", "true_divide") and constants and len(call.tracked) == 1:
        _product(tracer, call, divisor=constants[0])
    else:
        raise refusal(f"{call.label} of several tensors")


@rule("addcmul", "addcdiv")
def _add_product(tracer: Tracer, call: Call) -> None:
    first, second = call.argument(1, "tensor1"), call.argument(2, "tensor2")
    with tracer:  # as the sum and the product that it stands for
        product = first * second if call.name == "addcmul" else first / second
        out = call.argument(0, "input") + call.kwargs.get("value", 1) * product
    tracer.follow(call.out, tracer.view(out, call.label))


@rule("glu")
def _glu(tracer: Tracer, call: Call) -> None:
    view, dim = tracer.view(call.tracked[0]), call.argument(1, "dim", -1)
    left, right = (view.with_codes(c) for c in view.codes.chunk(2, dim))
    gate = Pointwise(
        call.label, view.step.units, view.step.positions, (view.index,), function=torch.sigmoid, source=torch.sigmoid
    )
    gated = tracer.record(torch.empty(0), gate, right.codes, [right], torch.sigmoid)
    _join(tracer, call, Product, [left, gated], lambda a, b: a * b)


# ---- one tensor


def _pointwise(tracer: Tracer, call: Call, views: list[View]) -> None:
    base = _root(views[0], tracer)
    inner = [_function(view) for view in views]

    def function(z: Tensor) -> Tensor:
        # Copies, as the function may write to its argument.
        out: Tensor = call.run(*(f(z).clone() for f in inner))
        return out

    alone = all(view.index == base.index for view in views)
    step = Pointwise(
        call.label, base.step.units, base.step.positions, (base.index,), base.step.batched,
        function=function, source=call if alone else None,
    )  # fmt: skip
    tracer.record(call.out, step, base.codes, [base], function)


def _root(view: View, tracer: Tracer) -> View:
    """What a tensor is an elementwise function of."""
    if not isinstance(view.step, Pointwise):
        return view
    (index,) = view.step.inputs
    return View(index, tracer.steps[index], view.codes)


def _function(view: View) -> Callable[[Tensor], Tensor]:
    return view.step.function if isinstance(view.step, Pointwise) else lambda z: z


def _same_root(views: list[View], tracer: Tracer) -> bool:
    roots = [_root(view, tracer) for view in views]
    return all(r.index == roots[0].index and torch.equal(r.codes, roots[0].codes) for r in roots)


def _check_slopes(call: Call) -> None:
    slopes = call.argument(1, "weight").numel()
    if slopes > 1:
        raise refusal(f"{call.label}: PReLU with {slopes} slopes is a different activation in every unit and")


# ---- several tensors


def _tensors(call: Call) -> list[Tensor]:
    return [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)]


def _sum(tracer: Tracer, call: Call) -> None:
    left, right = _operands(call)
    alpha = float(call.kwargs.get("alpha", 1))
    signs = {"add": (1.0, alpha), "rsub": (-alpha, 1.0)}.get(call.name, (1.0, -alpha))
    terms = [(sign, tracer.view(t, call.label)) for sign, t in zip(signs, (left, right), strict=True)]
    spread = [(sign * c, base) for sign, view in terms for c, base in _terms(view, tracer)]
    if len({base.index for _, base in spread}) < len(spread):  # something comes twice: its coefficients are added
        terms = _collected(spread)
    if not _same_map(tracer, call, terms):
        factors = [c for c, _ in terms]
        _join(tracer, call, Sum, [v for _, v in terms], _weighted_sum(factors), coefficients=tuple(factors))


def _weighted_sum(factors: list[float]) -> Callable[..., Tensor]:
    return lambda *tensors: functools.reduce(torch.add, [c * t for c, t in zip(factors, tensors, strict=True)])


def _terms(view: View, tracer: Tracer) -> list[tuple[float, View]]:
    """What a sum consists of, with coefficients; the tensor itself where it is none."""
    step = view.step
    if isinstance(step, Pointwise) and step.linear is not None and step.linear[1] == 0:
        return [(step.linear[0] * c, base) for c, base in _terms(_root(view, tracer), tracer)]
    if not isinstance(step, Sum) or not _is_whole(step, tracer):
        return [(1.0, view)]
    found = zip(step.coefficients, step.inputs, strict=True)
    return [(c * d, base) for c, i in found for d, base in _terms(View(i, tracer.steps[i], view.codes), tracer)]


def _is_whole(step: Sum, tracer: Tracer) -> bool:
    """Whether the units and positions of each input are all there, in order."""
    for part, number in zip(step.parts, step.inputs, strict=True):
        source = tracer.steps[number]
        numbers = torch.arange(len(source.units)), torch.arange(source.positions)
        if not (source.batched and torch.equal(part.units, numbers[0]) and torch.equal(part.positions, numbers[1])):
            return False
    return True


def _collected(terms: list[tuple[float, View]]) -> list[tuple[float, View]]:
    found: list[tuple[float, View]] = []
    for c, view in terms:
        same = [i for i, (_, v) in enumerate(found) if v.index == view.index and torch.equal(v.codes, view.codes)]
        if same:
            found[same[0]] = (found[same[0]][0] + c, view)
        else:
            found.append((c, view))
    return found


def _same_map(tracer: Tracer, call: Call, terms: list[tuple[float, View]]) -> bool:
    """Record a sum of linear maps over the positions of one step as one map, as of pooling minus the tensor itself."""
    bases = {view.step.inputs[0] if isinstance(view.step, Spatial) else view.index for _, view in terms}
    codes = terms[0][1].codes
    if len(bases) > 1 or not all(torch.equal(view.codes, codes) for _, view in terms):
        return False
    index = bases.pop()
    base = View(index, tracer.steps[index], codes)
    eye = torch.eye(base.step.positions, dtype=call.out.dtype)
    weights = torch.zeros_like(eye)
    for c, view in terms:
        weights += c * (view.step.weights.to(eye) if isinstance(view.step, Spatial) else eye)
    step = Spatial(call.label, base.step.units, base.step.positions, (base.index,), weights=weights)
    tracer.record(call.out, step, codes, [view for _, view in terms], _weighted_sum([c for c, _ in terms]))
    return True


def _product(tracer: Tracer, call: Call, divisor: Tensor | None = None) -> None:
    left, right = _operands(call)
    views = [tracer.view(t, call.label) for t in (left, right if divisor is None else 1 / divisor)]
    _join(tracer, call, Product, views, lambda a, b: a * b)


def _operands(call: Call) -> tuple[Tensor, Tensor]:
    left, right = call.argument(0, "input"), call.argument(1, "other")
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        raise refusal(f"{call.label} of several tensors")
    return left, right


def _join(
    tracer: Tracer, call: Call, kind: type[Sum] | type[Product], views: list[View],
    run: Callable[..., Tensor], **options: Any,
) -> None:  # fmt: skip
    shape = call.out.shape
    expanded = [view.with_codes(view.codes.expand(shape)) for view in views]
    if any(bool((view.codes < 0).any()) for view in views):
        raise refusal(f"{call.label} of a padded tensor")
    batched = next(view for view in expanded if view.step.batched)
    unit, unit_index, units = join_positions([view.unit for view in expanded])
    position, position_index, positions = join_positions([view.position for view in expanded])
    if any(len(index.unique()) < units for index in unit_index):
        raise refusal(f"{call.label}, which spreads one unit over several,")
    owners = [view.step.units[index] for view, index in zip(views, unit_index, strict=True)]
    tracer.joined += [(owners[0], other) for other in owners[1:]]
    parts = tuple(Part(u, p) for u, p in zip(unit_index, position_index, strict=True))
    step = kind(call.label, owners[0], positions, tuple(view.index for view in views), parts=parts, **options)
    codes = encode(batched.sample, unit, position, step)
    tracer.record(call.out, step, codes, views, run)
