"""Attention that is written out: matmul of queries and keys, scale, mask, softmax, matmul with values.

What stands in between is followed as `Scores`, which only a product with values makes a step that has a limit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_graphon.tracing.rules.attention import record_attention
from lightning_graphon.tracing.steps import Step
from lightning_graphon.tracing.tracer import Call, Tracer, refusal, rule
from lightning_graphon.tracing.views import View, constant_along, encode

_FAR = -1e4  # an added number as negative as that leaves nothing after the softmax
_PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum")
_AFFINE = ("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "neg", "negative",
           "masked_fill", "where", "tril", "triu")  # fmt: skip


@dataclass(eq=False)
class Scores(Step):
    """factor ∘ (q kᵀ) + shift, or its softmax; units are heads, positions are pairs (query, key).

    Attributes:
        query: Queries [samples, heads, queries, width].
        key: Keys [samples, heads, keys, width].
        factor: [heads, queries, keys].
        shift: [heads, queries, keys]; -inf is left out.
        softmax: Whether the softmax over keys has been taken.
    """

    query: View = field(kw_only=True)
    key: View = field(kw_only=True)
    factor: Tensor = field(kw_only=True)
    shift: Tensor = field(kw_only=True)
    softmax: bool = field(default=False, kw_only=True)

    @property
    def codes(self) -> Tensor:
        """Codes [samples, heads, queries, keys] of the whole array."""
        samples, heads = self.query.codes.shape[:2]
        places = torch.arange(self.positions).reshape(self.factor.shape[1:])
        return encode(torch.arange(samples).reshape(-1, 1, 1, 1), torch.arange(heads).reshape(-1, 1, 1), places, self)

    def run(self, q: Tensor, k: Tensor) -> Tensor:
        """The scores themselves."""
        scores = self.factor.to(q) * (q @ k.mT) + self.shift.to(q)
        return scores.softmax(-1) if self.softmax else scores


# ---- products


@rule(*_PRODUCTS)
def _query_times_key(tracer: Tracer, call: Call) -> None:
    (left, right), (first, second), out = _operands(tracer, call)
    batch, summed = _letters(call, first, second, out)
    query, restore = _with_heads(call, _ordered(left, first, batch + _only(first, batch + summed) + summed))
    key, _ = _with_heads(call, _ordered(right, second, batch + _only(second, batch + summed) + summed))
    if query.codes.shape[:2] != key.codes.shape[:2] or query.codes.shape[-1] != key.codes.shape[-1]:
        raise refusal(call.label)
    one = torch.ones(query.codes.shape[1], query.codes.shape[2], key.codes.shape[2], dtype=torch.float64)
    scores = _record(tracer, call, query, key, one, torch.zeros_like(one))
    order = batch + _only(first, batch + summed) + _only(second, batch + summed)
    tracer.follow(call.out, _ordered(scores.with_codes(restore(scores.codes)), order, out))


@rule(*_PRODUCTS, of=Scores)
def _scores_times_value(tracer: Tracer, call: Call) -> None:
    views, letters, out = _operands(tracer, call)
    if sum(isinstance(view.step, Scores) for view in views) != 1:
        raise refusal(f"{call.label} of attention weights with each other")
    turned = isinstance(views[1].step, Scores)
    (weights, value), (first, second) = (views[::-1], letters[::-1]) if turned else (views, letters)
    batch, summed = _letters(call, first, second, out)
    ordered = _ordered(weights, first, batch + _only(first, batch + summed) + summed)
    weights, restore = _with_heads(call, ordered)
    value, _ = _with_heads(call, _ordered(value, second, batch + summed + _only(second, batch + summed)))
    weights = next((w for w in (weights, _turned(tracer, call, weights)) if _is_whole(w)), weights)
    step = _scores_of(weights)
    if not _is_whole(weights):
        raise refusal(f"{call.label} with some of the attention weights, or along the queries,")
    scale, mask = _scale_and_mask(call, step)
    parts = [step.query, step.key, value]
    # q (kᵀ v), of which kᵀ v came first, is (q kᵀ) v.
    first_kv = not step.softmax and mask is None and constant_along(step.query.unit, 0, 2) is None
    if first_kv:
        parts = [view.with_codes(view.codes.mT) for view in (value, step.key, step.query)]
    attended = record_attention(tracer, call.label, torch.empty(0), parts, scale, mask, step.softmax)
    codes = attended.codes.mT if first_kv else attended.codes
    order = batch + _only(first, batch + summed) + _only(second, batch + summed)
    tracer.follow(call.out, _ordered(attended.with_codes(restore(codes)), order, out))


def _is_whole(view: View) -> bool:
    return torch.equal(view.codes, _scores_of(view).codes)


def _operands(tracer: Tracer, call: Call) -> tuple[list[View], list[str], str]:
    """The two factors, the letters of their axes as einsum writes them, and those of the result."""
    tensors = [t for t in _flat(call.args) if isinstance(t, Tensor)] + [*call.kwargs.values()]
    if len(tensors) != 2 or not all(isinstance(t, Tensor) and tracer.follows(t) for t in tensors):
        raise refusal(call.label)
    views = [tracer.view(t, call.label) for t in tensors]
    if not all(view.step.batched for view in views):
        raise refusal(call.label)
    if call.name == "einsum":
        inputs, _, out = str(call.args[0]).replace(" ", "").partition("->")
        letters = inputs.split(",")
        if "." in inputs or not out or len(letters) != 2:
            raise refusal(f"{call.label} with the equation {call.args[0]!r}")
        return views, letters, out
    batch = "abcdefgh"[: call.out.ndim - 2]
    if any(view.codes.ndim != call.out.ndim for view in views):
        raise refusal(call.label)
    return views, [f"{batch}xy", f"{batch}yz"], f"{batch}xz"


def _flat(args: tuple[object, ...]) -> list[object]:
    return [item for arg in args for item in (arg if isinstance(arg, list | tuple) else [arg])]


def _letters(call: Call, first: str, second: str, out: str) -> tuple[str, str]:
    """Axes that both factors have and the result too, and the one that is summed."""
    batch = "".join(a for a in out if a in first and a in second)
    summed = "".join(a for a in first if a in second and a not in out)
    whole = len(out) == len(batch) + 2 and len(first) == len(second) == len(batch) + 2
    if len(summed) != 1 or not whole or not 1 <= len(batch) <= 2:
        raise refusal(call.label)
    return batch, summed


def _only(letters: str, without: str) -> str:
    return "".join(a for a in letters if a not in without)


def _ordered(view: View, letters: str, order: str) -> View:
    return view.with_codes(view.codes.permute([letters.index(a) for a in order]))


def _with_heads(call: Call, view: View) -> tuple[View, Callable[[Tensor], Tensor]]:
    """A view [samples, heads, *, *], and how its first axes were before, of a view whose heads may be in the batch."""
    codes, sample = view.codes, view.sample[..., 0, 0]
    count = int(view.sample.max()) + 1
    numbers = torch.arange(count)
    if codes.ndim == 4 and torch.equal(sample, numbers[:, None].expand_as(sample)):
        return view, lambda t: t
    if codes.ndim == 4 and sample.shape[1] == count and torch.equal(sample, numbers.expand_as(sample)):
        return view.with_codes(codes.transpose(0, 1)), lambda t: t.transpose(0, 1)
    heads = len(codes) // count
    if codes.ndim == 3 and torch.equal(sample, numbers.repeat_interleave(heads)):
        return view.with_codes(codes.unflatten(0, (count, heads))), lambda t: t.flatten(0, 1)
    if codes.ndim == 3 and torch.equal(sample, numbers.repeat(heads)):
        split = codes.unflatten(0, (heads, count)).transpose(0, 1)
        return view.with_codes(split), lambda t: t.transpose(0, 1).flatten(0, 1)
    raise refusal(f"{call.label}, which mixes samples,")


def _scale_and_mask(call: Call, step: Scores) -> tuple[float, Tensor | None]:
    """Of scores that multiply values: added before the softmax, or multiplied where there is none."""
    left = step.shift != -torch.inf
    if step.softmax:
        factors, mask = step.factor[left], step.shift if bool(step.shift.any()) else None
        if bool((factors != factors[0]).any()):
            raise refusal(f"{call.label} with a temperature for each position")
        return float(factors[0]), mask
    if bool(step.shift.any()):
        raise refusal(f"{call.label} of scores to which numbers were added, without a softmax,")
    scale = float(step.factor.abs().max())
    return scale, None if bool((step.factor == scale).all()) else step.factor / scale


# ---- what happens to scores


def _record(tracer: Tracer, call: Call, query: View, key: View, factor: Tensor, shift: Tensor, softmax: bool = False
            ) -> View:  # fmt: skip
    heads, queries, keys = factor.shape
    step = Scores(
        f"{call.label}: attention weights by themselves", tracer.new_units(heads), queries * keys,
        (query.index, key.index), query=query, key=key, factor=factor, shift=shift, softmax=softmax,
    )  # fmt: skip
    return tracer.record(call.out, step, step.codes, [query, key], step.run)


@rule(*_AFFINE, of=Scores)
def _affine(tracer: Tracer, call: Call) -> None:
    """Scale and mask are read from what the function makes of three numbers."""
    view = tracer.view(call.tracked[0])
    step = _scores_of(view)
    others = [
        t for t in _flat((*call.args, *call.kwargs.values())) if isinstance(t, Tensor) and t is not call.tracked[0]
    ]
    if step.softmax or not all(map(tracer.is_constant, others)):
        raise refusal(f"{call.label} of attention weights")
    if call.out.shape != view.codes.shape:
        raise refusal(f"{call.label}, which gives attention weights another shape,")
    zero, one, two = (call.run(torch.full(view.codes.shape, n).to(call.out)).double() for n in (0.0, 1.0, -2.0))
    out = zero <= _FAR
    factor, shift = torch.where(out, 0.0, one - zero), torch.where(out, -torch.inf, zero)
    bent = (two - zero + 2 * factor).abs() > 1e-5 * (factor.abs() + zero.abs())
    if bool((bent & ~out).any()):
        raise refusal(f"{call.label} of attention weights")
    a, b = (_on_heads(call, view, values) for values in (factor, shift))
    left = (b != -torch.inf) & (step.shift != -torch.inf)
    own = torch.where(left, a * step.shift + b, torch.where(a == 0, b, -torch.inf))
    changed = _record(tracer, call, step.query, step.key, torch.where(own == -torch.inf, 0.0, a * step.factor), own)
    tracer.follow(call.out, changed.with_codes(view.codes))


def _on_heads(call: Call, view: View, values: Tensor) -> Tensor:
    """Values of the entries of a view as [heads, queries, keys]."""
    whole = _scores_of(view).codes
    if not torch.equal(view.codes.reshape(-1).sort().values, whole.reshape(-1)):
        raise refusal(f"{call.label} of some of the attention weights")
    values = values.reshape(-1).cpu()
    found = torch.empty_like(values).index_put((view.codes.reshape(-1),), values).view_as(whole)
    if not bool((found == found[:1]).all()):
        raise refusal(f"{call.label} of attention weights, different for each sample,")
    return found[0]


@rule("softmax", "_softmax", of=Scores)
def _softmax(tracer: Tracer, call: Call) -> None:
    view, dim = tracer.view(call.tracked[0]), call.argument(1, "dim")
    dim = view.codes.ndim - 1 if dim is None else dim
    found = next((v for v in (view, _turned(tracer, call, view)) if _runs_over_keys(v, dim)), None)
    if found is None:
        raise refusal(f"{call.label} of attention weights, not over the keys,")
    step = _scores_of(found)
    normalised = _record(tracer, call, step.query, step.key, step.factor, step.shift, softmax=True)
    tracer.follow(call.out, normalised.with_codes(found.codes))


def _runs_over_keys(view: View, dim: int) -> bool:
    """Whether an axis holds all keys of one query of one head."""
    step, along = _scores_of(view), view.codes.movedim(dim, -1)
    keys = step.factor.shape[2]
    row = along - along % keys
    return not step.softmax and along.shape[-1] == keys and torch.equal(row, row[..., :1].expand_as(row))


def _turned(tracer: Tracer, call: Call, view: View) -> View:
    """The same with queries and keys in each other's place: only what comes after a product tells which are which."""
    step = _scores_of(view)
    if step.softmax:
        return view
    turned = _record(tracer, call, step.key, step.query, step.factor.mT, step.shift.mT)
    place = torch.empty(step.codes.numel(), dtype=torch.long)
    place[step.codes.reshape(-1)] = _scores_of(turned).codes.mT.reshape(-1)
    return turned.with_codes(place[view.codes])


def _scores_of(view: View) -> Scores:
    """The step of a view of scores."""
    assert isinstance(view.step, Scores)  # noqa: S101
    return view.step
