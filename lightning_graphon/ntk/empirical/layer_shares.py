"""How much of the tangent kernel each parameter gives, without the kernel itself."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_graphon._shared.checks import checked
from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon.ntk.empirical.functional_model import (
    FunctionalModel,
    Inputs,
    batch_size,
    detach_inputs,
    functional_model,
    input_device,
    select_samples,
)
from lightning_graphon.ntk.empirical.kernel import DEFAULT_MEMORY, samples_per_chunk, scaled, weight_matrix
from lightning_graphon.ntk.empirical.layer_gram import squared_norm
from lightning_graphon.ntk.empirical.layer_signals import KernelPlan, capture_signals, make_plan
from lightning_graphon.ntk.empirical.per_sample_gradients import entry_weights, gradients


@dataclass(frozen=True)
class LayerShare:
    """One parameter's part of the tangent kernel.

    Attributes:
        name: Qualified parameter name.
        entries: Number of entries that the mask keeps.
        trace: Part of the full kernel's trace, Σ over samples, outputs and entries of P (∂f)².
        share: The trace relative to that of all parameters; 0 for the zero kernel.
    """

    name: str
    entries: int
    trace: float
    share: float


@checked
def ntk_layer_shares(
    model: nn.Module,
    x: Inputs,
    *,
    masks: Mapping[str, Tensor] | None = None,
    preconditioner: Mapping[str, Tensor] | None = None,
    max_memory: int | None = None,
) -> list[LayerShare]:
    """Share of each trainable parameter in the tangent kernel's trace, in the module's order.

    Costs one backward pass per output; no kernel is formed for Linear and Conv layers. A parameter with share 0 is not
    trained by these samples. The traces sum to C times the trace of `empirical_ntk(..., reduce="mean")`.

    Args:
        model: As in `empirical_ntk`.
        x: As in `empirical_ntk`.
        masks: As in `empirical_ntk`.
        preconditioner: As in `empirical_ntk`.
        max_memory: As in `empirical_ntk`.

    Raises:
        KeyError, ValueError: As in `empirical_ntk`.

    >>> import torch
    >>> model = nn.Linear(3, 2, bias=False)
    >>> ntk_layer_shares(model, torch.eye(3))
    [LayerShare(name='weight', entries=6, trace=6.0, share=1.0)]
    """
    fm = functional_model(model, masks, preconditioner, "standard", 1.0, 1.0)
    traces = dict.fromkeys(fm.trainable, 0.0)
    with eval_semantics(model, input_device(x)):
        x = detach_inputs(x)
        plan = make_plan(fm, x)
        budget = max_memory or DEFAULT_MEMORY
        # Traces of chunks add up, so no pair of chunks is needed.
        step = samples_per_chunk(fm, plan, budget)
        for i in range(0, batch_size(x), step):
            _add_traces(traces, fm, plan, select_samples(x, slice(i, i + step)), budget)
    total = sum(traces.values())
    return [LayerShare(n, _entries(fm, n), t, t / total if total > 0 else 0.0) for n, t in traces.items()]


def _add_traces(traces: dict[str, float], fm: FunctionalModel, plan: KernelPlan, x: Inputs, budget: int) -> None:
    signals = capture_signals(fm, x, plan.sites)
    for site, factors, bias in zip(plan.sites, signals.layers, signals.biases, strict=True):
        if site.weight and factors is not None:
            traces[site.weight] += squared_norm(factors, weight_matrix(fm, site.module, site.weight), budget)
        if site.bias and bias is not None:
            traces[site.bias] += float(scaled(bias, fm.weight(site.bias)).mul(bias).sum())
    # Trace of J P Jᵀ, without the products of different samples.
    for name in plan.generic:
        jacobian = gradients(fm, x, [name], plan.outputs)
        traces[name] += float(scaled(jacobian, entry_weights(fm, [name])).mul(jacobian).sum())


def _entries(fm: FunctionalModel, name: str) -> int:
    weight = fm.weights[name]
    return fm.values[name].numel() if weight is None else int((weight != 0).sum())
