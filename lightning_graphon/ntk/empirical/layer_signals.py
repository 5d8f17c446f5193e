"""Inputs and back-propagated signals of every Linear and Conv layer, without touching the module.

Whether the gradient of a weight really is the sum over the captured calls is not assumed but checked: tied
weights, weights used by functional calls, layers inside reparametrisations or checkpoints, and batches that
are laid out in another order all fail the check and their parameters take the generic path.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from lightning_graphon.ntk.empirical.gradient_factors import Factors, concatenate, factors

_KINDS = (
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
    """What one chunk of samples gives.

    Attributes:
        outputs: C.
        layers: By site, the sides of its weight's gradients.
        biases: By site, δ summed over positions, [N, C, n_out].
    """

    samples: int
    outputs: int
    layers: list[Factors | None]
    biases: list[Tensor | None]


def find_layer_sites(fm: FunctionalModel) -> list[LayerSite]:
    """Layers whose forward is torch's own and whose parameters are trainable, before any check."""
    names = {id(p): n for n, p in fm.model.named_parameters() if n in fm.trainable}
    sites: list[LayerSite] = []
    seen: set[str] = set()
    for module in fm.model.modules():
        if not any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _KINDS):
            continue
        own = [names.get(id(module._parameters.get(key))) for key in ("weight", "bias")]
        fresh = [n if n not in seen else None for n in own]
        seen.update(n for n in own if n is not None)
        if any(fresh):
            sites.append(LayerSite(module, fresh[0], fresh[1]))
    return sites


def capture_signals(fm: FunctionalModel, x: Inputs, sites: list[LayerSite]) -> Signals:
    """One forward pass, one backward pass an output."""
    samples = batch_size(x)
    leaves = {n: fm.values[n].detach().requires_grad_() for s in sites for n in (s.weight, s.bias) if n}
    out, calls = _record(lambda: fm(leaves, x), sites)
    edges = [call.edge for site_calls in calls for call in site_calls]
    rows = out.shape[1]
    deltas: list[Tensor | None] = [None] * len(edges)
    for k in range(rows):
        grads = _grad(out[:, k].sum(), edges, retain=k + 1 < rows)
        for e, g in enumerate(grads):
            if g is not None:
                store = deltas[e]
                if store is None:
                    store = deltas[e] = g.new_zeros(rows, *g.shape)
                store[k] = g
    return _collect(samples, rows, sites, calls, deltas)


def _grad(scalar: Tensor, edges: list[GradientEdge], retain: bool) -> tuple[Tensor | None, ...]:
    if not edges or not scalar.requires_grad:
        return (None,) * len(edges)
    return torch.autograd.grad(scalar, edges, retain_graph=retain, allow_unused=True)


def _collect(
    samples: int, outputs: int, sites: list[LayerSite], calls: list[list[_Call]], deltas: list[Tensor | None]
) -> Signals:
    layers: list[Factors | None] = []
    biases: list[Tensor | None] = []
    flat = iter(deltas)
    for site, site_calls in zip(sites, calls, strict=True):
        live = [(c, d) for c, d in ((c, next(flat)) for c in site_calls) if d is not None]
        parts = [factors(site.module, samples, c.h, d) for c, d in live] if site.weight else []
        layers.append(concatenate(parts) if parts else None)
        sums = [_bias(site.module, samples, d) for _, d in live] if site.bias else []
        biases.append(torch.stack(sums).sum(0) if sums else None)
    return Signals(samples, outputs, layers, biases)


def _bias(module: nn.Module, samples: int, delta: Tensor) -> Tensor:
    """δ summed over positions, [K, N, n_out] to [N, K, n_out]."""
    last = delta if isinstance(module, nn.Linear) else delta.flatten(3).movedim(2, -1)
    return last.reshape(len(delta), samples, -1, last.shape[-1]).sum(2).transpose(0, 1)


def _record(run: Callable[[], Tensor], sites: list[LayerSite]) -> tuple[Tensor, list[list[_Call]]]:
    """Run a forward pass and keep every call of the sites' modules."""
    calls: list[list[_Call]] = [[] for _ in sites]

    def keep(store: list[_Call]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if args and isinstance(out, Tensor) and out.requires_grad:
                store.append(_Call(args[0].detach(), get_gradient_edge(out)))

        return hook

    handles = [site.module.register_forward_hook(keep(c)) for site, c in zip(sites, calls, strict=True)]
    try:
        return run(), calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class KernelPlan:
    """What is read from signals, what needs the generic path, and what one sample costs.

    Attributes:
        sites: Layers whose parameters passed the check.
        generic: Names of the other trainable parameters that the outputs depend on.
        unused: Trainable parameters that the outputs do not depend on.
        outputs: C.
        floats: Numbers that one sample's signals take.
    """

    sites: list[LayerSite]
    generic: tuple[str, ...]
    unused: tuple[str, ...]
    outputs: int
    floats: int


def make_plan(fm: FunctionalModel, x: Inputs) -> KernelPlan:
    """Check on three samples which layers' gradients are what was captured.

    Raises:
        ValueError: An output depends on other samples of the batch.
    """
    probe = detach_inputs(select_samples(x, torch.arange(3) % batch_size(x)))
    sites = find_layer_sites(fm)
    leaves = fm.leaves()
    out, calls = _record(lambda: fm(leaves, probe), sites)
    _check_alone(fm, probe, out)
    direction = torch.randn(out.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
    scalar = out[1] @ direction
    edges = [c.edge for site_calls in calls for c in site_calls]
    wanted: list[Any] = [*leaves.values(), *edges]
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(scalar, wanted, allow_unused=True)
    truth: dict[str, Tensor | None] = dict(zip(leaves, grads, strict=False))
    given = _collect(3, 1, *_only_batched(sites, calls, list(grads[len(leaves) :])))
    proven = [_proven(s, given.layers[i], given.biases[i], truth) for i, s in enumerate(sites)]
    kept = [s for s in proven if s.weight or s.bias]
    named = {n for s in kept for n in (s.weight, s.bias) if n}
    used = {n for n, g in truth.items() if g is not None}
    floats = sum(c.h[0].numel() for cs in calls for c in cs) + out.shape[1] * sum(
        g[0].numel() for g in grads[len(leaves) :] if g is not None
    )
    rest = tuple(n for n in fm.trainable if n in used and n not in named)
    return KernelPlan(kept, rest, tuple(n for n in fm.trainable if n not in used), out.shape[1], floats)


def _only_batched(
    sites: list[LayerSite], calls: list[list[_Call]], grads: list[Tensor | None]
) -> tuple[list[LayerSite], list[list[_Call]], list[Tensor | None]]:
    """Drop signals whose first dimension cannot be sample-major; give the others a leading output dimension."""
    return sites, calls, [None if g is None or len(g) % 3 else g[None] for g in grads]


def _proven(site: LayerSite, sides: Factors | None, bias: Tensor | None, truth: dict[str, Tensor | None]) -> LayerSite:
    """The site with those parameters whose gradient of sample 1's output is what was captured of sample 1."""
    weight_ok = site.weight is not None and sides is not None and _equal(_weight_gradient(sides), truth[site.weight])
    bias_ok = site.bias is not None and bias is not None and _equal(bias[1, 0], truth[site.bias])
    return LayerSite(site.module, site.weight if weight_ok else None, site.bias if bias_ok else None)


def _weight_gradient(sides: Factors) -> Tensor:
    return torch.einsum("tgr,tgc->grc", sides.units[1, 0], sides.inputs[1, 0])


def _equal(mine: Tensor, truth: Tensor | None) -> bool:
    if truth is None or mine.numel() != truth.numel():
        return False
    close = 10 * torch.finfo(truth.dtype).eps ** 0.5  # a wrong layer is off by its own size, rounding by far less
    size = float(truth.norm())  # zero proves nothing
    return size > 0 and float((mine.reshape(truth.shape) - truth).norm()) <= close * size


def _check_alone(fm: FunctionalModel, probe: Inputs, out: Tensor) -> None:
    with torch.no_grad():
        alone = fm({}, select_samples(probe, slice(0, 2)))[0]
    out = out.detach()
    gap, scale = float((alone - out[0]).abs().max()), float(out.abs().max())
    if gap > 100 * torch.finfo(out.dtype).eps ** 0.5 * max(scale, 1e-30):
        raise ValueError(
            "a sample's output depends on the other samples of its batch (batch statistics in eval, such as "
            "BatchNorm with track_running_stats=False?); a tangent kernel between samples is then not defined"
        )
