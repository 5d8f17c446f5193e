"""Growth toward graphons: the designed topology is kept while weights move."""

from typing import Any

import torch
from torch import Tensor

from lightning_graphon.graphon import StepGraphon, values_at_density
from lightning_graphon.graphon.core.partition import locate
from lightning_graphon.pruning.growth.exchange import exchange
from lightning_graphon.pruning.growth.registry import GrowthContext, register_growth
from lightning_graphon.pruning.scoring.graphon import CERTAIN, check_patterns, graphon_of


@register_growth("graphon", begins="graphon")
def graphon_growth(context: GrowthContext, *, graphons: Any = None) -> dict[str, Tensor]:
    """Weights grow in the cells of the target graphon that have too few of them, at random inside a cell.

    Unit i stands at u = (i + ½) / out and input j at v = (j + ½) / in, as in the pruning method "graphon". The odds of
    all cells are multiplied by one factor that gives the layer's density.

    Args:
        context: Weights, masks and counts.
        graphons: One target for all layers, or a dict from layer names or globs to targets, as in the pruning method.

    Raises:
        ValueError: No target, or none for a layer.
    """
    if graphons is None:
        raise ValueError("growth 'graphon' needs its targets: options={'graphons': {'family': 'product'}}")
    check_patterns(context.masks, graphons)
    return exchange(context, lambda name, kept, count: _scores(context, name, graphons, kept, count))


def _scores(context: GrowthContext, name: str, graphons: Any, kept: Tensor, count: int) -> Tensor:
    """Random numbers, and two more where a weight is to grow."""
    layout, density = context.layout(name), (int(kept.count_nonzero()) + count) / kept.numel()
    noise, survivors = (layout.rows(tensor).cpu() for tensor in (context.uniform(name), kept))
    cells, values = _cells(graphon_of(name, graphons, density), noise.shape, density)
    offset = float(noise.flatten()[0])
    wanted = _growth_by_cell(cells, values, survivors.flatten(), count, offset)
    chosen = _pick(cells, noise.flatten().double(), ~survivors.flatten(), wanted)
    return layout.stored(noise + 2 * chosen.reshape(noise.shape)).contiguous().to(kept.device)


def _cells(target: StepGraphon, shape: torch.Size, density: float) -> tuple[Tensor, Tensor]:
    """Cell [out · in · taps] of every weight, and the density [cells] of each cell."""
    target = target.to("cpu", torch.float64)
    u, v = ((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in shape[:2])
    row, column = locate(u, target.row_measure), locate(v, target.col_measure)
    cells = row[:, None] * target.shape[1] + column
    cells = cells.reshape(*cells.shape, *[1] * (len(shape) - 2)).expand(shape).flatten()
    odds = torch.logit(target.values).clamp(-CERTAIN, CERTAIN)
    return cells, values_at_density(odds, density, target.row_measure, target.col_measure).flatten()


def _growth_by_cell(cells: Tensor, values: Tensor, kept: Tensor, count: int, offset: float) -> Tensor:
    """How many weights [cells] grow in each cell: in proportion to how many it has too few, `count` in all.

    Rounded by systematic sampling, so that cells of a single weight grow as often as they should.
    """
    sizes, present = (torch.bincount(cells[where], minlength=len(values)) for where in (slice(None), kept))
    missing = (values * sizes - present).clamp(min=0)
    # To nine digits, as whole numbers must not depend on the order of summation.
    ends = (missing.cumsum(0) * (count / missing.sum().clamp(min=1e-300)) + offset).round(decimals=9).floor()
    return ends.diff(prepend=ends.new_zeros(1))


def _pick(cells: Tensor, noise: Tensor, free: Tensor, wanted: Tensor) -> Tensor:
    """Of the free entries of each cell as many as are wanted, those of the smallest noise."""
    places = free.nonzero().squeeze(1)
    order = (cells[places] + noise[places]).sort(stable=True).indices
    places = places[order]
    ends = torch.bincount(cells[places], minlength=len(wanted)).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])[cells[places]]
    chosen = torch.zeros_like(free)
    chosen[places[torch.arange(len(places)) - starts < wanted[cells[places]]]] = True
    return chosen
