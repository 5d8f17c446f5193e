"""Bernoulli masks drawn from a step graphon."""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from lightning_graphon._shared.checks import check_choice
from lightning_graphon._shared.choices import Points
from lightning_graphon._shared.random import generator as seeded
from lightning_graphon.graphon.core.partition import locate

# Entries drawn at a time. Other values gave the same masks for a seed on a CPU, but need not on another device.
_CHUNK = 1 << 20


def sample_mask(
    values: Tensor,
    row_measure: Tensor,
    col_measure: Tensor,
    shape: Sequence[int],
    *,
    seed: int,
    generator: torch.Generator | None,
    points: Points,
) -> Tensor:
    """Draw M ~ Bernoulli(W(u, v)) from cells `values` [rows, cols]; the other arguments as in `StepGraphon.sample`."""
    check_choice("points", points, get_args(Points))
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape must be [out, in, *taps] with no empty axis, got {tuple(shape)}")
    source = generator if generator is not None else seeded(seed, "sampled masks")
    device = source.device
    rows = locate(_points(shape[0], points, source), row_measure.to(device))
    cols = locate(_points(shape[1], points, source), col_measure.to(device))
    # Drawn in float64 on the generator's device, so that a seed gives one mask whatever the graphon's dtype and device.
    probabilities = values.detach().to(device=device, dtype=torch.float64)
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=values.device)
    step = max(1, _CHUNK // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        p = probabilities[rows[start : start + step]][:, cols]
        # Every tap of a convolution is a draw of its own, with the probability of its pair of channels.
        p = p.reshape(p.shape + (1,) * (len(shape) - 2))
        noise = torch.rand((len(p), *shape[1:]), generator=source, dtype=torch.float64, device=device)
        mask[start : start + step] = noise < p
    return mask


def _points(count: int, kind: Points, source: torch.Generator) -> Tensor:
    if kind == "random":
        return torch.rand(count, generator=source, dtype=torch.float64, device=source.device)
    return (torch.arange(count, dtype=torch.float64, device=source.device) + 0.5) / count
