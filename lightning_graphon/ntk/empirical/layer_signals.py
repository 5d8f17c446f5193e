"""Inputs and back-propagated signals of every Linear and Conv layer, without changing the module.

That the gradient of a weight is the sum over the captured calls is checked, not assumed: it fails for tied weights,
weights used by functional calls, layers inside reparametrisations or checkpoints, and batches in another layout. Their
parameters take the generic path of per-sample gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_graphon.ntk.empirical.functional_model import (
    FunctionalModel,
    Inputs,
    batch_size,
    detach_inputs,
    select_samples,
)
from lightning_graphon.ntk.empirical.gradient_factors import GradientFactors, concatenate, gradient_factors

_LAYER_TYPES = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(frozen=True)
class LayerSite:
    """A layer with the names of its trainable parameters; None where frozen or absent."""

    module: nn.Module
    weight: str | None
    bias: str | None


@dataclass
class _Call:
    h: Tensor
    edge: GradientEdge


@dataclass(frozen=True)
class Signals:
    """Gradient factors of one chunk of samples.

    Attributes:
        x: The samples themselves.
        outputs: Number C of outputs.
        layers: Per site, the factors of its weight's gradients.
        biases: Per site, the gradients [N, C, n_out] of its bias: δ summed over positions.
    """

    x: Inputs
    outputs: int
    layers: list[GradientFactors | None]
    biases: list[Tensor | None]

    @property
    def samples(self) -> int:
        """Number N of samples."""
        return batch_size(self.x)


def find_layer_sites(fm: FunctionalModel) -> list[LayerSite]:
    """Layers whose forward is torch's own and whose parameters are trainable, not yet checked."""
    names = {id(p): n for n, p in fm.model.named_parameters() if n in fm.trainable}
    sites: list[LayerSite] = []
    seen: set[str] = set()
    for module in fm.model.modules():
        if not any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _LAYER_TYPES):
            continue
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        own = [names.get(id(parameters.get(key))) for key in ("weight", "bias")]
        new = [n if n not in seen else None for n in own]  # a tied weight belongs to its first layer
        seen.update(n for n in own if n is not None)
        if any(new):
            sites.append(LayerSite(module, new[0], new[1]))
    return sites


def capture_signals(fm: FunctionalModel, x: Inputs, sites: list[LayerSite]) -> Signals:
    """One forward pass, and one backward pass per output."""
    leaves = {n: fm.values[n].detach().requires_grad_() for s in sites for n in (s.weight, s.bias) if n}
    with _recorded_calls(sites) as calls:
        out = fm(leaves, x)
    edges = [call.edge for site_calls in calls for call in site_calls]
    outputs = out.shape[1]
    deltas: list[Tensor | None] = [None] * len(edges)
    for k in range(outputs):
        # Samples do not depend on each other, so the gradient of the sum holds the gradient of each.
        for e, g in enumerate(_grad(out[:, k].sum(), edges, retain=k + 1 < outputs)):
            if g is not None:
                delta = deltas[e]
                if delta is None:
                    delta = deltas[e] = g.new_zeros(outputs, *g.shape)
                delta[k] = g
    return _collect(x, outputs, sites, calls, deltas)


def _grad(scalar: Tensor, edges: list[GradientEdge], retain: bool) -> tuple[Tensor | None, ...]:
    if not edges or not scalar.requires_grad:
        return (None,) * len(edges)
    return torch.autograd.grad(scalar, edges, retain_graph=retain, allow_unused=True)


def _collect(
    x: Inputs, outputs: int, sites: list[LayerSite], calls: list[list[_Call]], deltas: list[Tensor | None]
) -> Signals:
    samples = batch_size(x)
    layers: list[GradientFactors | None] = []
    biases: list[Tensor | None] = []
    flat = iter(deltas)
    # A module that is called several times has the sum of the gradients of its calls.
    for site, site_calls in zip(sites, calls, strict=True):
        live = [(c, d) for c, d in ((c, next(flat)) for c in site_calls) if d is not None]
        parts = [gradient_factors(site.module, samples, c.h, d) for c, d in live] if site.weight else []
        layers.append(concatenate(parts) if parts else None)
        sums = [_bias(site.module, samples, d) for _, d in live] if site.bias else []
        biases.append(torch.stack(sums).sum(0) if sums else None)
    return Signals(x, outputs, layers, biases)


def _bias(module: nn.Module, samples: int, delta: Tensor) -> Tensor:
    """δ summed over positions, [K, N, n_out] to [N, K, n_out]."""
    last = delta if isinstance(module, nn.Linear) else delta.flatten(3).movedim(2, -1)
    return last.reshape(len(delta), samples, -1, last.shape[-1]).sum(2).transpose(0, 1)


def _record_call(site_calls: list[_Call], module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
    if args and isinstance(out, Tensor) and out.requires_grad:
        site_calls.append(_Call(args[0].detach(), get_gradient_edge(out)))


@contextmanager
def _recorded_calls(sites: list[LayerSite]) -> Iterator[list[list[_Call]]]:
    """Record every call of the sites' modules in a forward pass."""
    calls: list[list[_Call]] = [[] for _ in sites]
    # Hooks see the layer's own output, whatever the model does with it afterwards.
    handles = []
    for site, site_calls in zip(sites, calls, strict=True):
        handles.append(site.module.register_forward_hook(partial(_record_call, site_calls)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class KernelPlan:
    """Which parameters are read from signals, which need the generic path, and what a sample costs.

    Attributes:
        sites: Layers whose parameters passed the check.
        generic: Names of the other trainable parameters on which the outputs depend.
        unused: Names of trainable parameters on which the outputs do not depend.
        outputs: Number C of outputs.
        floats: Size of one sample's signals.
    """

    sites: list[LayerSite]
    generic: tuple[str, ...]
    unused: tuple[str, ...]
    outputs: int
    floats: int


def make_plan(fm: FunctionalModel, x: Inputs) -> KernelPlan:
    """Check on three samples for which layers the captured factors give the gradient.

    Raises:
        ValueError: An output depends on other samples of the batch.
    """
    probe = detach_inputs(select_samples(x, torch.arange(3) % batch_size(x)))
    sites = find_layer_sites(fm)
    leaves = fm.leaves()
    with _recorded_calls(sites) as calls:
        out = fm(leaves, probe)
    _check_samples_are_independent(fm, probe, out)
    # The middle sample along one random direction of the outputs: other samples and layouts would show.
    direction = torch.randn(out.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
    scalar = out[1] @ direction
    edges = [c.edge for site_calls in calls for c in site_calls]
    wanted: list[Any] = [*leaves.values(), *edges]
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(scalar, wanted, allow_unused=True)
    true: dict[str, Tensor | None] = dict(zip(leaves, grads, strict=False))
    captured = _collect(probe, 1, sites, calls, _with_output_axis(list(grads[len(leaves) :])))
    checked = [_checked(s, captured.layers[i], captured.biases[i], true) for i, s in enumerate(sites)]
    kept = [s for s in checked if s.weight or s.bias]
    named = {n for s in kept for n in (s.weight, s.bias) if n}
    used = {n for n, g in true.items() if g is not None}
    floats = sum(c.h[0].numel() for cs in calls for c in cs) + out.shape[1] * sum(
        g[0].numel() for g in grads[len(leaves) :] if g is not None
    )
    rest = tuple(n for n in fm.trainable if n in used and n not in named)
    return KernelPlan(kept, rest, tuple(n for n in fm.trainable if n not in used), out.shape[1], floats)


def _with_output_axis(grads: list[Tensor | None]) -> list[Tensor | None]:
    """Signals with a leading axis for the one output, without those whose first dimension cannot be sample-major."""
    return [None if g is None or len(g) % 3 else g[None] for g in grads]


def _checked(
    site: LayerSite, factors: GradientFactors | None, bias: Tensor | None, true: dict[str, Tensor | None]
) -> LayerSite:
    """The site with those parameters whose gradient of sample 1's output is what was captured for sample 1."""
    weight_ok = site.weight is not None and factors is not None and _equal(_weight_gradient(factors), true[site.weight])
    bias_ok = site.bias is not None and bias is not None and _equal(bias[1, 0], true[site.bias])
    return LayerSite(site.module, site.weight if weight_ok else None, site.bias if bias_ok else None)


def _weight_gradient(factors: GradientFactors) -> Tensor:
    return torch.einsum("tgr,tgc->grc", factors.row_factors[1, 0], factors.col_factors[1, 0])


def _equal(captured: Tensor, true: Tensor | None) -> bool:
    if true is None or captured.numel() != true.numel():
        return False
    # A wrong gradient is off by its own size, rounding by far less; a gradient of zero proves nothing.
    tolerance, size = 10 * torch.finfo(true.dtype).eps ** 0.5, float(true.norm())
    return size > 0 and float((captured.reshape(true.shape) - true).norm()) <= tolerance * size


def _check_samples_are_independent(fm: FunctionalModel, probe: Inputs, out: Tensor) -> None:
    with torch.no_grad():
        without_last = fm({}, select_samples(probe, slice(0, 2)))[0]
    out = out.detach()
    # The first two samples alone must give the same outputs as with a third one.
    gap, scale = float((without_last - out[0]).abs().max()), float(out.abs().max())
    if gap > 100 * torch.finfo(out.dtype).eps ** 0.5 * max(scale, 1e-30):
        raise ValueError(
            "a sample's output depends on the other samples of its batch (batch statistics in eval, such as "
            "BatchNorm with track_running_stats=False?); a tangent kernel between samples is then not defined"
        )
