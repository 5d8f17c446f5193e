r"""The exact tangent kernel of a finite network, masked or not, without its Jacobian.

:math:`Θ(x, x') = \sum_p P_p ∂_p f(x) ∂_p f(x')` over the trainable parameters p, P the mask (or mask times a
diagonal preconditioner). For Linear and Conv layers it is computed from activations and back-propagated
signals; pruned weights contribute nothing. For everything else per-sample gradients are taken in chunks.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import check_choice
from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon._shared.memory import is_out_of_memory
from lightning_graphon.ntk.empirical.functional_model import (
    FunctionalModel,
    Inputs,
    batch_size,
    functional_model,
    plain,
    select,
)
from lightning_graphon.ntk.empirical.gradient_factors import as_matrix
from lightning_graphon.ntk.empirical.layer_gram import contract, layer_gram, squared_norm
from lightning_graphon.ntk.empirical.layer_signals import KernelPlan, Signals, capture, make_plan
from lightning_graphon.ntk.empirical.per_sample_gradients import entry_weights, gradients, groups
from lightning_graphon.ntk.operators.tiling import TileShard, tiles

_MODES = {"mean": "mean", "per_output": "outputs", "none": "full"}
DEFAULT_MEMORY = 1 << 30
Modes = tuple[str, ...]


def empirical_ntk(
    model: nn.Module,
    x: Inputs,
    *,
    masks: Mapping[str, Tensor] | None = None,
    parameterization: str = "standard",
    reduce: str | None = "mean",
    x2: Inputs | None = None,
    preconditioner: Mapping[str, Tensor] | None = None,
    weight_variance: float = 2.0,
    bias_variance: float = 0.0,
    max_memory: int | None = None,
    group: object | None = None,
) -> Tensor:
    """Tangent kernel of a module between all pairs of samples.

    The module is evaluated in eval mode (BatchNorm with its running statistics, Dropout off) at its masked
    weights. Its parameters, gradients, buffers, training flags and torch's random state are as before
    afterwards. Parameters with `requires_grad=False` are not trained and do not contribute. The function may
    be called under `torch.no_grad`.

    Args:
        model: Any module whose forward maps `x` to a tensor [N, ...]; further dimensions are flattened to C
            outputs.
        x: Samples [N, ...], or a tuple of tensors that forward takes as arguments.
        masks: Qualified parameter name to a tensor of the weight's shape, non-zero where kept.
        parameterization: "standard" is the kernel that SGD on the module's own parameters sees. "ntk"
            multiplies the part of each Linear and Conv weight by `weight_variance` / fan_in and of its bias
            by `bias_variance`.
        reduce: "mean" averages the outputs' own kernels (trace over outputs / C), "per_output" keeps them
            apart, None (or "none") is the full kernel.
        x2: Other samples; the kernel between `x` and `x2` then.
        preconditioner: Parameter name to P of its shape: Σ P ∂f ∂f' (an optimizer's diagonal); ones where not
            named.
        weight_variance: σ_w² of the "ntk" parameterisation.
        bias_variance: σ_b² of the "ntk" parameterisation.
        max_memory: Bytes for signals and temporary tensors, 1 GiB by default; samples are taken in chunks
            that fit. Running out of memory halves the chunk, and a warning says what did fit.
        group: "world" or a process group of torch.distributed: the work is shared out and the kernel
            gathered; model, `x` and masks must be the same on all. Or a `TileShard`.

    Returns:
        [N, M] for "mean", [C, N, M] for "per_output", [N, C, M, C] for None; the outputs' dtype and device.

    Raises:
        KeyError: A mask or preconditioner names no parameter.
        ValueError: Shapes or options; or an output depends on other samples of the batch.
        TypeError: The model does not return a tensor.

    >>> model = nn.Linear(3, 2).double()
    >>> empirical_ntk(model, torch.eye(3, dtype=torch.float64))  # xᵀx' from the weights, 1 from the bias
    tensor([[2., 1., 1.],
            [1., 2., 1.],
            [1., 1., 2.]], dtype=torch.float64)
    """
    check_choice("parameterization", parameterization, ("standard", "ntk"))
    check_choice("reduce", "none" if reduce is None else reduce, _MODES)
    mode = _MODES[reduce or "none"]
    fm = functional_model(model, masks, preconditioner, parameterization, weight_variance, bias_variance)
    return evaluate(fm, x, x2, (mode,), max_memory, TileShard.from_group(group))[0]


def evaluate(
    fm: FunctionalModel, x: Inputs, x2: Inputs | None, modes: Modes, max_memory: int | None, share: TileShard
) -> list[Tensor]:
    """The kernel in several modes (`layer_gram`'s) from one pass over the signals, means in place of sums.

    Args:
        fm: The model with its masks.
        x: Samples.
        x2: Other samples; "samples" needs None.
        modes: Which.
        max_memory: As in `empirical_ntk`.
        share: This process's part.
    """
    n, m = batch_size(x), batch_size(x if x2 is None else x2)
    with eval_semantics(fm.model, _device(x)):
        left, right = plain(x), None if x2 is None else plain(x2)
        plan = make_plan(fm, left)
        budget = max_memory or DEFAULT_MEMORY
        chunk = share.edge(_chunk(fm, plan, budget), max(n, m))
        kernels = _with_retries(fm, plan, left, right, modes, budget, min(chunk, max(n, m)), share)
    counts = {"mean": plan.outputs, "samples": n}
    return [k / counts[mode] if mode in counts else k for mode, k in zip(modes, kernels, strict=True)]


@dataclass(frozen=True)
class LayerShare:
    """One parameter's part of the tangent kernel.

    Attributes:
        name: Qualified parameter name.
        entries: Number of entries with a non-zero weight (kept by the mask).
        trace: Its part of the full kernel's trace, Σ over samples, outputs and entries of P (∂f)².
        share: Trace divided by the sum over all parameters; 0 for the zero kernel.
    """

    name: str
    entries: int
    trace: float
    share: float


def ntk_layer_shares(
    model: nn.Module,
    x: Inputs,
    *,
    masks: Mapping[str, Tensor] | None = None,
    preconditioner: Mapping[str, Tensor] | None = None,
    max_memory: int | None = None,
) -> list[LayerShare]:
    """How much of the tangent kernel's trace each trainable parameter gives, in the module's order.

    Costs one backward pass an output; no kernel is formed for Linear and Conv layers. A parameter with share
    0 is not trained by these samples. The traces sum to C times the trace of `empirical_ntk(...,
    reduce="mean")`.

    Args:
        model: As in `empirical_ntk`.
        x: Samples [N, ...].
        masks: As in `empirical_ntk`.
        preconditioner: As in `empirical_ntk`.
        max_memory: Bytes for signals and temporary tensors.

    Returns:
        One `LayerShare` a trainable parameter.

    Raises:
        KeyError: A mask or preconditioner names no parameter.
        ValueError: As in `empirical_ntk`.

    >>> model = nn.Linear(3, 2, bias=False)
    >>> ntk_layer_shares(model, torch.eye(3))
    [LayerShare(name='weight', entries=6, trace=6.0, share=1.0)]
    """
    fm = functional_model(model, masks, preconditioner, "standard", 1.0, 1.0)
    traces = dict.fromkeys(fm.trainable, 0.0)
    with eval_semantics(model, _device(x)):
        x = plain(x)
        plan = make_plan(fm, x)
        budget = max_memory or DEFAULT_MEMORY
        step = _chunk(fm, plan, budget)
        for i in range(0, batch_size(x), step):
            _add_traces(traces, fm, plan, select(x, slice(i, i + step)), budget)
    total = sum(traces.values())
    return [LayerShare(n, _entries(fm, n), t, t / total if total > 0 else 0.0) for n, t in traces.items()]


def _add_traces(traces: dict[str, float], fm: FunctionalModel, plan: KernelPlan, x: Inputs, budget: int) -> None:
    signals = capture(fm, x, plan.sites)
    for site, sides, bias in zip(plan.sites, signals.layers, signals.biases, strict=True):
        if site.weight and sides is not None:
            traces[site.weight] += squared_norm(sides, _matrix(fm, site.module, site.weight), budget)
        if site.bias and bias is not None:
            traces[site.bias] += float(_scaled(bias, fm.weight(site.bias)).mul(bias).sum())
    for name in plan.generic:
        jacobian = gradients(fm, x, [name], plan.outputs)
        traces[name] += float(_scaled(jacobian, entry_weights(fm, [name])).mul(jacobian).sum())


def _entries(fm: FunctionalModel, name: str) -> int:
    weight = fm.weights[name]
    return fm.values[name].numel() if weight is None else int((weight != 0).sum())


def _device(x: Inputs) -> torch.device:
    return x.device if isinstance(x, Tensor) else x[0].device


def _chunk(fm: FunctionalModel, plan: KernelPlan, budget: int) -> int:
    """Samples whose signals, twice (two chunks) and once more for the backward pass, fit the budget."""
    generic = plan.outputs * max((fm.values[n].numel() for n in plan.generic), default=0)
    itemsize = max(fm.values[n].element_size() for n in fm.trainable)
    return max(1, budget // max(1, itemsize * (4 * plan.floats + 4 * generic)))


def _with_retries(
    fm: FunctionalModel,
    plan: KernelPlan,
    x: Inputs,
    x2: Inputs | None,
    modes: Modes,
    budget: int,
    chunk: int,
    share: TileShard,
) -> list[Tensor]:
    """Run with ever smaller chunks while memory runs out, and say so; alone only: processes must agree on the tiles."""
    first = chunk
    while True:
        try:
            kernels = _assemble(fm, plan, x, x2, modes, budget, chunk, share)
        except (RuntimeError, MemoryError) as error:  # noqa: PERF203 - a few tries
            if not is_out_of_memory(error) or chunk == 1 or share.size > 1:
                raise
            budget, chunk = max(1, budget // 2), chunk // 2
        else:
            break
    if chunk < first:
        warnings.warn(
            f"empirical_ntk ran out of memory with {first} samples at a time and went on with {chunk}, "
            f"max_memory={budget} bytes: give that as max_memory to begin there",
            stacklevel=4,
        )
    return kernels


@dataclass(frozen=True)
class _Chunk:
    x: Inputs
    signals: Signals


def _assemble(
    fm: FunctionalModel,
    plan: KernelPlan,
    x: Inputs,
    x2: Inputs | None,
    modes: Modes,
    budget: int,
    chunk: int,
    share: TileShard,
) -> list[Tensor]:
    n, m = batch_size(x), batch_size(x if x2 is None else x2)
    out = _zeros(fm, n, m, plan.outputs, modes)
    rows_now, left = None, None
    for rows, cols in share.mine(tiles(n, m, chunk, symmetric=x2 is None)):
        if left is None or rows != rows_now:
            left, rows_now = _read(fm, plan, select(x, rows)), rows
        same = x2 is None and rows == cols
        right = left if same else _read(fm, plan, select(x if x2 is None else x2, cols))
        # Self-terms lie in the tiles on the diagonal alone.
        here = modes if same else tuple(mode for mode in modes if mode != "samples")
        for mode, block in _block(fm, plan, left, right, here, budget).items():
            _place(out[mode], block, rows, cols, mode)
            if x2 is None and not same:
                _place(out[mode], block.permute(2, 3, 0, 1) if mode == "full" else block.mT, cols, rows, mode)
    return [share.collect(out[mode]) for mode in modes]


def _zeros(fm: FunctionalModel, n: int, m: int, c: int, modes: Modes) -> dict[str, Tensor]:
    shapes = {"mean": (n, m), "outputs": (c, n, m), "full": (n, c, m, c), "samples": (c, c)}
    return {mode: fm.values[fm.trainable[0]].new_zeros(shapes[mode]) for mode in modes}


def _place(out: Tensor, block: Tensor, rows: slice, cols: slice, mode: str) -> None:
    if mode == "samples":
        out += block
    elif mode == "full":
        out[rows, :, cols] = block
    else:
        out[..., rows, cols] = block


def _read(fm: FunctionalModel, plan: KernelPlan, x: Inputs) -> _Chunk:
    return _Chunk(x, capture(fm, x, plan.sites))


def _block(
    fm: FunctionalModel, plan: KernelPlan, left: _Chunk, right: _Chunk, modes: Modes, budget: int
) -> dict[str, Tensor]:
    """All parameters' parts for one pair of chunks."""
    n, m, c = left.signals.samples, right.signals.samples, plan.outputs
    totals = _zeros(fm, n, m, c, modes)
    for i, site in enumerate(plan.sites):
        a, b = left.signals.layers[i], right.signals.layers[i]
        if site.weight and a is not None and b is not None:
            weight = _matrix(fm, site.module, site.weight)
            for mode, total in totals.items():
                total += layer_gram(a, b, weight, mode, budget // 4)
        p, q = left.signals.biases[i], right.signals.biases[i]
        if site.bias and p is not None and q is not None:
            _add(totals, _scaled(p, fm.weight(site.bias)), q)
    per_entry = (n + m) * c * fm.values[fm.trainable[0]].element_size() * 2
    for names in groups(fm, plan.generic, max(1, budget // 2 // per_entry)):
        ja = gradients(fm, left.x, names, c)
        jb = ja if left is right else gradients(fm, right.x, names, c)
        _add(totals, _scaled(ja, entry_weights(fm, names)), jb)
    return totals


def _add(totals: dict[str, Tensor], left: Tensor, right: Tensor) -> None:
    for mode, total in totals.items():
        total += contract(left, right, mode)


def _matrix(fm: FunctionalModel, module: nn.Module, name: str) -> Tensor | None:
    weight = fm.weight(name)
    return None if weight is None else as_matrix(module, weight)


def _scaled(t: Tensor, weight: Tensor | None) -> Tensor:
    return t if weight is None else t * weight.reshape(-1)
