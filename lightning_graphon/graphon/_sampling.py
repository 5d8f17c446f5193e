"""Bernoulli masks drawn from a step graphon."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_graphon._checks import check_choice
from lightning_graphon._random import generator as seeded
from lightning_graphon.graphon import _partition

if TYPE_CHECKING:
    from lightning_graphon.graphon.step_graphon import StepGraphon

_CHUNK = 1 << 20
"""Entries drawn at a time. Part of the contract: another value gives another mask for the same seed."""


def sample_mask(
    graphon: "StepGraphon",
    shape: Sequence[int],
    *,
    seed: int,
    generator: torch.Generator | None,
    positions: str,
) -> Tensor:
    """Implement `StepGraphon.sample`."""
    check_choice("positions", positions, ("grid", "random"))
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape must be [out, in, *taps] with no empty axis, got {tuple(shape)}")
    source = generator if generator is not None else seeded(seed, "sampled masks")
    device = source.device
    rows = _partition.locate(_positions(shape[0], positions, source), graphon.row_measure.to(device))
    cols = _partition.locate(_positions(shape[1], positions, source), graphon.col_measure.to(device))
    table = graphon.values.detach().to(device=device, dtype=torch.float64)
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=graphon.device)
    step = max(1, _CHUNK // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        p = table[rows[start : start + step]][:, cols]
        p = p.reshape(p.shape + (1,) * (len(shape) - 2))
        noise = torch.rand((len(p), *shape[1:]), generator=source, dtype=torch.float64, device=device)
        mask[start : start + step] = noise < p
    return mask


def _positions(count: int, kind: str, source: torch.Generator) -> Tensor:
    if kind == "random":
        return torch.rand(count, generator=source, dtype=torch.float64, device=source.device)
    return (torch.arange(count, dtype=torch.float64, device=source.device) + 0.5) / count
