"""One affine layer of an infinitely wide masked network as matrices between positions.

A layer with graphon W, energy E and drift D (values [rows, cols]) acts on functions of the position v through
integrals such as `n_in ∫ E(u, v) · dv`. With a measure on the cells each of them is a matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Graphon(Protocol):
    """The attributes of a `StepGraphon` that kernels need."""

    @property
    def values(self) -> Any:
        """Densities [rows, cols] in [0, 1]."""

    @property
    def row_measure(self) -> Any:
        """Measure of the row cells [rows], summing to 1."""

    @property
    def col_measure(self) -> Any:
        """Measure of the column cells [cols], summing to 1."""

    @property
    def energy(self) -> Any:
        """Cell means of w²·M [rows, cols], or None."""

    @property
    def drift(self) -> Any:
        """Cell means of w·M [rows, cols], or None."""


@dataclass(frozen=True)
class Layer:
    """Matrices of one affine layer, rows = positions u of its outputs, columns = positions v of its inputs.

    Attributes:
        covariance_map: Matrix n_in E μ(v) [rows, cols] from E[hh'] to the pre-activations' covariance.
        parameter_map: Matrix γ n_in W μ(v) [rows, cols] from E[hh'] to the weights' own part of the kernel.
        bias_variance: Variance [rows] that the bias adds.
        bias_term: Part of a trainable bias in the kernel: 1, σ_b² or 0.
        ratio: `parameter_map / covariance_map` where that is one number, else None.
        row_measure: Measure [rows] of the rows.
        mean_map: Matrix n_in D μ(v) [rows, cols] from E[h] to the pre-activations' mean, or None when centred.
        mean_square_map: Matrix n_in D² μ(v) [rows, cols], or None.
        bias_mean: Mean of the bias [rows], or None.
        units: Number of output units that the rows represent, or None where nothing depends on it.
    """

    covariance_map: Tensor
    parameter_map: Tensor
    bias_variance: Tensor
    bias_term: float
    ratio: float | None
    row_measure: Tensor
    mean_map: Tensor | None = None
    mean_square_map: Tensor | None = None
    bias_mean: Tensor | None = None
    units: int | None = None

    def averaged(self) -> "Layer":
        """The layer with its rows averaged to a single output."""
        weights = self.row_measure / self.row_measure.sum()
        return replace(
            self,
            covariance_map=(weights @ self.covariance_map)[None],
            parameter_map=(weights @ self.parameter_map)[None],
            bias_variance=(weights @ self.bias_variance)[None],
            row_measure=torch.ones_like(weights[:1]),
        )


def expand_inputs(layer: Layer, inputs: int) -> Layer:
    """Spread a single column over all `inputs` coordinates, each of measure 1 / inputs."""

    def spread(matrix: Tensor | None) -> Tensor | None:
        return None if matrix is None else matrix.expand(-1, inputs) / inputs

    if layer.covariance_map.shape[1] != 1 or inputs == 1:
        return layer
    names = ("covariance_map", "parameter_map", "mean_map", "mean_square_map")
    changes = {name: spread(getattr(layer, name)) for name in names}
    return replace(layer, **changes)  # type: ignore[arg-type]


def merge_positions(layers: Sequence[Layer]) -> list[Layer]:
    """Keep one copy of positions whose rows are identical, and add up their columns in the next layer.

    Exact: positions with equal rows have equal kernels. A constant graphon becomes one position.
    """
    merged: list[Layer] = []
    groups: Tensor | None = None
    for layer in layers:
        if groups is not None:
            layer = _add_columns(layer, groups)
        # Positions are equal if all that the recursion reads of them is equal.
        key = torch.cat([layer.covariance_map, layer.parameter_map, layer.bias_variance[:, None]], dim=1)
        unique, groups = torch.unique(key.detach(), dim=0, return_inverse=True)
        # The last layer's rows are the outputs, which the caller wants each.
        if len(unique) < len(key) and layer is not layers[-1] and len(merged) < len(layers) - 1:
            layer = _keep_rows(layer, groups, len(unique))
        else:
            groups = None
        merged.append(layer)
    return merged


def _add_columns(layer: Layer, groups: Tensor) -> Layer:
    count = int(groups.max()) + 1

    def add(matrix: Tensor) -> Tensor:
        return matrix.new_zeros(len(matrix), count).index_add(1, groups, matrix)

    return replace(layer, covariance_map=add(layer.covariance_map), parameter_map=add(layer.parameter_map))


def _keep_rows(layer: Layer, groups: Tensor, count: int) -> Layer:
    first = torch.full((count,), len(groups), device=groups.device).scatter_reduce(
        0, groups, torch.arange(len(groups), device=groups.device), "amin"
    )
    measure = layer.row_measure.new_zeros(count).index_add(0, groups, layer.row_measure)
    return replace(
        layer,
        covariance_map=layer.covariance_map[first],
        parameter_map=layer.parameter_map[first],
        bias_variance=layer.bias_variance[first],
        row_measure=measure,
    )
