"""Masks drawn from given graphons."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lightning_graphon._shared.checks import nearest
from lightning_graphon._shared.random import generator
from lightning_graphon._shared.weight_layout import WeightLayout, layout_of
from lightning_graphon.graphon import StepGraphon, as_graphon
from lightning_graphon.pruning.scoring.registry import ScoringContext, register_method

# Log-odds of cells with W = 1 or 0: finite, but beyond any logistic noise.
CERTAIN = 1e4


@register_method("graphon", needs="nothing")
def graphon(context: ScoringContext, *, graphons: Any = None) -> dict[str, Tensor]:
    """logit W(u_i, v_j) plus logistic noise, with u_i = (i + ½) / out and v_j = (j + ½) / in.

    A threshold of zero would give independent draws M_ij ~ Bernoulli(W(u_i, v_j)). The budget moves the threshold to
    keep its exact number, which multiplies all odds by one factor, close to one if the graphons have the density asked
    for.

    Args:
        context: Weights to score.
        graphons: One graphon for all layers: a StepGraphon, cell values, or a family such as
            {"family": "power-law", "exponent": 0.5}, whose density is that of the plan unless given. Or a dict from
            layer names or globs to such graphons, one for each layer.

    Raises:
        ValueError: No graphon, or none for a layer; the message names it.
    """
    if graphons is None:
        raise ValueError(
            "method 'graphon' needs the graphons to draw from: options={'graphons': {'family': 'product'}}"
        )
    layers = {name: graphon_of(name, graphons, context.density) for name in context.weights}
    check_patterns(context.weights, graphons)
    _check_support(context, layers)
    source = generator(context.seed, "graphon masks")
    return {
        name: _log_odds(layers[name], w.shape, layout_of(context.model, name), source).to(w.device)
        for name, w in context.weights.items()
    }


def _log_odds(step: StepGraphon, shape: torch.Size, layout: WeightLayout, source: torch.Generator) -> Tensor:
    """Noisy log-odds of every weight, float32; drawn on the CPU, so the same for every device."""
    # The logit of a uniform number is logistic, and P(logit W > logistic) = W.
    noise = layout.rows(torch.logit(torch.rand(shape, generator=source).clamp_(1e-7, 1 - 1e-7)))
    u, v = ((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in noise.shape[:2])
    odds = torch.logit(step.to("cpu", torch.float32)(u[:, None], v)).clamp_(-CERTAIN, CERTAIN)
    return layout.stored(odds.reshape(*odds.shape, *[1] * (noise.ndim - 2)) - noise)


def _check_support(context: ScoringContext, layers: Mapping[str, StepGraphon]) -> None:
    """Raise if the budget must keep weights where W = 0."""
    sizes = {name: weight.numel() for name, weight in context.weights.items()}
    room = sum(
        sizes[name] * float(step.row_measure @ (step.values > 0).to(step.dtype) @ step.col_measure)
        for name, step in layers.items()
    )
    # One weight per layer of tolerance, for rounding.
    wanted = context.density * sum(sizes.values())
    if wanted > room + len(sizes):
        raise ValueError(
            f"the graphons are positive on {room:.0f} weights only, but the sparsity keeps {wanted:.0f}: raise the "
            "sparsity or widen the graphons"
        )


def graphon_of(name: str, graphons: Any, density: float) -> StepGraphon:
    """The graphon of a layer."""
    if not isinstance(graphons, Mapping) or "family" in graphons:
        return as_graphon(_with_density(graphons, density))
    for pattern, spec in graphons.items():
        if _matches(name, pattern):
            return as_graphon(_with_density(spec, density))
    raise ValueError(
        f"method 'graphon': no graphon for layer {name!r}; given are {', '.join(map(repr, graphons))}. Add '*' for all "
        "other layers (a single family is a dict with the key 'family')"
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def check_patterns(names: Mapping[str, Any], graphons: Any) -> None:
    """Raise if a pattern names no layer."""
    if isinstance(graphons, Mapping) and "family" not in graphons:
        for pattern in graphons:
            if not any(_matches(name, str(pattern)) for name in names):
                raise ValueError(f"method 'graphon': {pattern!r} names no layer. {nearest(str(pattern), names)}")


def _with_density(spec: Any, density: float) -> Any:
    if isinstance(spec, str) and "density" not in spec:
        return f"{spec.rstrip(')')}{', ' if '(' in spec else '('}density={density})"
    if isinstance(spec, Mapping) and "density" not in spec:
        return {**spec, "density": density}
    return spec
