r"""The exact tangent kernel of a finite network, masked or not, without its Jacobian.

:math:`Θ(x, x') = \sum_p P_p ∂_p f(x) ∂_p f(x')` over the trainable parameters p, P the mask (or mask times a
diagonal preconditioner). For Linear and Conv layers it is computed from activations and back-propagated
signals; pruned weights contribute nothing. For everything else per-sample gradients are taken in chunks.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn

from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon._shared.choices import Parameterization, Reduce
from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon._shared.memory import is_out_of_memory
from lightning_graphon.ntk.empirical.functional_model import (
    FunctionalModel,
    Inputs,
    batch_size,
    detach_inputs,
    functional_model,
    input_device,
    select_samples,
)
from lightning_graphon.ntk.empirical.gradient_factors import as_matrix
from lightning_graphon.ntk.empirical.layer_gram import Mode, contract, layer_gram
from lightning_graphon.ntk.empirical.layer_signals import KernelPlan, Signals, capture_signals, make_plan
from lightning_graphon.ntk.empirical.per_sample_gradients import entry_weights, gradients, split_by_size
from lightning_graphon.ntk.operators.tiling import TileShard, tiles

DEFAULT_MEMORY = 1 << 30  # bytes
Modes = tuple[Mode, ...]


@checked
def empirical_ntk(
    model: nn.Module,
    x: Inputs,
    *,
    masks: Mapping[str, Tensor] | None = None,
    parameterization: Parameterization = "standard",
    reduce: Reduce | None = "mean",
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
        reduce: "mean" averages the outputs' own kernels (trace over outputs / C), "per_output" gives each
            output's own kernel, None the full kernel between all pairs of outputs.
        x2: Other samples; the kernel between `x` and `x2` then.
        preconditioner: Parameter name to P of its shape: Σ P ∂f ∂f' (an optimizer's diagonal); ones where not
            named.
        weight_variance: σ_w² of the "ntk" parameterisation.
        bias_variance: σ_b² of the "ntk" parameterisation.
        max_memory: Bytes for signals and temporary tensors, 1 GiB by default; samples are taken in chunks
            that fit. Running out of memory halves the chunk, and a warning says what did fit.
        group: "world" or a process group of torch.distributed: the work is divided among the processes and the
            kernel gathered; model, `x` and masks must be the same on all. Or a `TileShard`.

    Returns:
        [N, M] for "mean", [C, N, M] for "per_output", [N, C, M, C] for None; the outputs' dtype and device.

    Raises:
        KeyError: A mask or preconditioner names no parameter.
        ValueError: Shapes or options; or an output depends on other samples of the batch.
        TypeError: The model does not return a tensor.

    >>> import torch
    >>> model = nn.Linear(3, 2).double()
    >>> empirical_ntk(model, torch.eye(3, dtype=torch.float64))  # xᵀx' from the weights, 1 from the bias
    tensor([[2., 1., 1.],
            [1., 2., 1.],
            [1., 1., 2.]], dtype=torch.float64)
    """
    check_choice("parameterization", parameterization, get_args(Parameterization))
    check_choice("reduce", "mean" if reduce is None else reduce, get_args(Reduce))
    fm = functional_model(model, masks, preconditioner, parameterization, weight_variance, bias_variance)
    return empirical_kernels(fm, x, x2, (reduce or "full",), max_memory, TileShard.from_group(group))[0]


def empirical_kernels(
    fm: FunctionalModel, x: Inputs, x2: Inputs | None, modes: Modes, max_memory: int | None, shard: TileShard
) -> list[Tensor]:
    """The kernel in several modes of `layer_gram` from one pass over the signals, means in place of sums.

    Mode "samples" needs `x2=None`; the other arguments are as in `empirical_ntk`.
    """
    n, m = batch_size(x), batch_size(x if x2 is None else x2)
    budget = max_memory or DEFAULT_MEMORY
    with eval_semantics(fm.model, input_device(x)):
        left, right = detach_inputs(x), None if x2 is None else detach_inputs(x2)
        plan = make_plan(fm, left)
        task = _Task(fm, plan, left, right, modes, shard)
        first = chunk = min(shard.edge(samples_per_chunk(fm, plan, budget), max(n, m)), max(n, m))
        kernels = None
        while kernels is None:
            try:
                kernels = _sum_tiles(task, budget, chunk)
            except (RuntimeError, MemoryError) as error:  # noqa: PERF203 - a few tries
                # One process alone may take smaller chunks: several must agree on the tiles.
                if not is_out_of_memory(error) or chunk == 1 or shard.size > 1:
                    raise
                budget, chunk = max(1, budget // 2), chunk // 2
    if chunk < first:
        warnings.warn(
            f"empirical_ntk ran out of memory with {first} samples at a time and went on with {chunk}, "
            f"max_memory={budget} bytes: give that as max_memory to begin there",
            stacklevel=3,
        )
    # `layer_gram` sums over outputs or samples; here sums become means.
    counts = {"mean": plan.outputs, "samples": n}
    return [k / counts[mode] if mode in counts else k for mode, k in zip(modes, kernels, strict=True)]


def samples_per_chunk(fm: FunctionalModel, plan: KernelPlan, budget: int) -> int:
    """Samples whose signals, twice (two chunks) and once more for the backward pass, fit the budget."""
    # The generic path holds the gradients of one parameter at least.
    generic = plan.outputs * max((fm.values[n].numel() for n in plan.generic), default=0)
    itemsize = max(fm.values[n].element_size() for n in fm.trainable)
    return max(1, budget // max(1, itemsize * (4 * plan.floats + 4 * generic)))


@dataclass(frozen=True)
class _Task:
    """What is computed, whatever the size of the tiles; `x2` None stands for `x` itself."""

    fm: FunctionalModel
    plan: KernelPlan
    x: Inputs
    x2: Inputs | None
    modes: Modes
    shard: TileShard


def _sum_tiles(task: _Task, budget: int, chunk: int) -> list[Tensor]:
    fm, plan, symmetric = task.fm, task.plan, task.x2 is None
    y = task.x if task.x2 is None else task.x2
    out = _zeros(fm, batch_size(task.x), batch_size(y), plan.outputs, task.modes)
    left_rows, left = None, None
    for rows, cols in task.shard.mine(tiles(batch_size(task.x), batch_size(y), chunk, symmetric)):
        if left is None or rows != left_rows:  # the tiles of one row share their left side
            left, left_rows = capture_signals(fm, select_samples(task.x, rows), plan.sites), rows
        diagonal = symmetric and rows == cols
        right = left if diagonal else capture_signals(fm, select_samples(y, cols), plan.sites)
        # Self-terms lie in the tiles on the diagonal alone.
        modes = task.modes if diagonal else tuple(mode for mode in task.modes if mode != "samples")
        for mode, block in _tile_kernels(fm, plan, left, right, modes, budget).items():
            _place(out[mode], block, rows, cols, mode)
            if symmetric and not diagonal:
                _place(out[mode], block.permute(2, 3, 0, 1) if mode == "full" else block.mT, cols, rows, mode)
    return [task.shard.collect(out[mode]) for mode in task.modes]


def _zeros(fm: FunctionalModel, n: int, m: int, c: int, modes: Modes) -> dict[Mode, Tensor]:
    shapes = {"mean": (n, m), "per_output": (c, n, m), "full": (n, c, m, c), "samples": (c, c)}
    return {mode: fm.values[fm.trainable[0]].new_zeros(shapes[mode]) for mode in modes}


def _place(out: Tensor, block: Tensor, rows: slice, cols: slice, mode: Mode) -> None:
    if mode == "samples":
        out += block
    elif mode == "full":
        out[rows, :, cols] = block
    else:
        out[..., rows, cols] = block


def _tile_kernels(
    fm: FunctionalModel, plan: KernelPlan, left: Signals, right: Signals, modes: Modes, budget: int
) -> dict[Mode, Tensor]:
    """All parameters' parts for one pair of chunks."""
    n, m, c = left.samples, right.samples, plan.outputs
    totals = _zeros(fm, n, m, c, modes)
    for i, site in enumerate(plan.sites):
        a, b = left.layers[i], right.layers[i]
        if site.weight and a is not None and b is not None:
            weight = weight_matrix(fm, site.module, site.weight)
            for mode, total in totals.items():
                total += layer_gram(a, b, weight, mode, budget // 4)
        p, q = left.biases[i], right.biases[i]
        if site.bias and p is not None and q is not None:
            _add(totals, scaled(p, fm.weight(site.bias)), q)
    # Per-sample gradients of both chunks, and their weighted copies.
    per_entry = (n + m) * c * fm.values[fm.trainable[0]].element_size() * 2
    for names in split_by_size(fm, plan.generic, max(1, budget // 2 // per_entry)):
        ja = gradients(fm, left.x, names, c)
        jb = ja if left is right else gradients(fm, right.x, names, c)
        _add(totals, scaled(ja, entry_weights(fm, names)), jb)
    return totals


def _add(totals: dict[Mode, Tensor], left: Tensor, right: Tensor) -> None:
    for mode, total in totals.items():
        total += contract(left, right, mode)


def weight_matrix(fm: FunctionalModel, module: nn.Module, name: str) -> Tensor | None:
    """P of a layer's weight as [groups, rows, cols], or None for ones."""
    weight = fm.weight(name)
    return None if weight is None else as_matrix(module, weight)


def scaled(t: Tensor, weight: Tensor | None) -> Tensor:
    """Gradients [..., p] times the weights of their entries."""
    return t if weight is None else t * weight.reshape(-1)
