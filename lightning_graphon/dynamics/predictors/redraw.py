"""Draw all layers of a network anew: from its graphons, or with its degrees only."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_graphon._shared.choices import Positions
from lightning_graphon.dynamics.predictors.cell_draws import (
    Fields,
    cells_of,
    draw_layer,
    draw_with_degrees,
    units_of_bins,
)
from lightning_graphon.dynamics.predictors.resized_network import Matrix, Units
from lightning_graphon.dynamics.predictors.width_scaling import Scaling
from lightning_graphon.graphon.estimation.unit_bins import unit_bins

_Draws = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def graphon_draws(
    units: Units, masks: Mapping[str, Tensor], source: torch.Generator, width: float, bins: int, fields: Fields,
    scaling: Scaling, positions: Positions,
) -> tuple[dict[int, Tensor], _Draws]:  # fmt: skip
    """For every group of units the places that the new ones take; mask and weight of each layer as matrices."""
    bin_of = torch.empty(int(units.classes.max()) + 1, dtype=torch.long)
    bin_of[units.classes] = unit_bins(units.trace, masks, bins, positions)
    chosen = {
        group: units_of_bins(_numbered(bin_of[members]), max(1, round(width * len(members))), source)
        for group, members in units.hidden.items()
    }
    draws = {}
    for old in units.matrices():
        new, step = units.resized(old.step, chosen), old.step
        rows, row = bin_of[old.rows].unique(return_inverse=True)
        cells, column = _column_bins(old, bin_of).unique(return_inverse=True)
        draws[step.weight_name] = draw_layer(
            cells_of(masks[step.weight_name].flatten(1), step.weight.flatten(1), row, column, fields),
            torch.searchsorted(rows, bin_of[new.rows]),
            torch.searchsorted(cells, _column_bins(new, bin_of)),
            ratio=len(new.columns) / len(old.columns),
            fluctuation="unit" if scaling == "mup" and units.is_last(step) else "sum",
            source=source,
        )
    return chosen, draws


@torch.no_grad()
def degree_draws(
    units: Units, masks: Mapping[str, Tensor], source: torch.Generator
) -> tuple[dict[int, Tensor], _Draws]:
    """The same with the degrees of each mask only."""
    chosen = {group: torch.randperm(len(members), generator=source) for group, members in units.hidden.items()}
    draws = {}
    for matrix in units.matrices():
        step = matrix.step
        drawn, weight = draw_with_degrees(masks[step.weight_name].flatten(1), step.weight.flatten(1), source)
        # Rows move and the next mask's columns do not: a neuron's two degrees come from different neurons.
        rows = units.order(step, chosen)
        draws[step.weight_name] = (drawn[rows], weight[rows])
    return chosen, draws


def _numbered(labels: Tensor) -> Tensor:
    return labels.unique(return_inverse=True)[1]


def _column_bins(matrix: Matrix, bin_of: Tensor) -> Tensor:
    """One bin for each tap of a bin of units."""
    return bin_of[matrix.columns] * len(matrix.step.taps) + matrix.taps
