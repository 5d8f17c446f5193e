"""One affine layer of an infinitely wide masked network as matrices between positions, and how they are built.

A layer with graphon W, energy E and drift D (values [rows, cols]) acts on functions of the position v through
`n_in ∫ E(u, v) · dv` and the like; with a measure on the cells every such integral is a matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


class Graphon(Protocol):
    """What the kernels need of a `StepGraphon`: attributes only."""

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
    """Matrices of one affine layer, all float, rows = positions u of its outputs, columns = positions v of its inputs.

    Attributes:
        propagate: n_in E μ(v), maps E[hh'] to the pre-activations' covariance [rows, cols].
        parameter: γ n_in W μ(v), maps E[hh'] to the weights' own part of the kernel [rows, cols].
        bias: Variance that the bias adds [rows].
        bias_parameter: What a trainable bias adds to the kernel, 1 or σ_b² or 0.
        ratio: `parameter / propagate` where it is one number, else None.
        row_measure: Measure of the rows [rows].
        mean: n_in D μ(v), maps E[h] to the pre-activations' mean [rows, cols], or None when centred.
        mean_square: n_in D² μ(v), or None.
        bias_mean: Mean of the bias [rows], or None.
        units: Number of output units that the rows stand for, or None where nothing depends on it.
    """

    propagate: Tensor
    parameter: Tensor
    bias: Tensor
    bias_parameter: float
    ratio: float | None
    row_measure: Tensor
    mean: Tensor | None = None
    mean_square: Tensor | None = None
    bias_mean: Tensor | None = None
    units: int | None = None

    def averaged(self) -> "Layer":
        """The layer with its rows averaged: one output that stands for the mean of all."""
        weights = self.row_measure / self.row_measure.sum()
        return replace(
            self,
            propagate=(weights @ self.propagate)[None],
            parameter=(weights @ self.parameter)[None],
            bias=(weights @ self.bias)[None],
            row_measure=torch.ones_like(weights[:1]),
        )


def expand_inputs(layer: Layer, inputs: int) -> Layer:
    """Spread a single column over all `inputs` coordinates, each of measure 1 / inputs."""

    def spread(matrix: Tensor | None) -> Tensor | None:
        return None if matrix is None else matrix.expand(-1, inputs) / inputs

    if layer.propagate.shape[1] != 1 or inputs == 1:
        return layer
    changes = {name: spread(getattr(layer, name)) for name in ("propagate", "parameter", "mean", "mean_square")}
    return replace(layer, **changes)  # type: ignore[arg-type]


def merge_positions(layers: Sequence[Layer]) -> list[Layer]:
    """Keep one copy of positions whose rows are identical; their columns in the next layer are added up.

    Exact: positions with equal rows have equal kernels. A constant graphon becomes one position.
    """
    merged: list[Layer] = []
    groups: Tensor | None = None
    for layer in layers:
        if groups is not None:
            layer = _add_columns(layer, groups)
        key = torch.cat([layer.propagate, layer.parameter, layer.bias[:, None]], dim=1)
        unique, groups = torch.unique(key.detach(), dim=0, return_inverse=True)
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

    return replace(layer, propagate=add(layer.propagate), parameter=add(layer.parameter))


def _keep_rows(layer: Layer, groups: Tensor, count: int) -> Layer:
    first = torch.full((count,), len(groups), device=groups.device).scatter_reduce(
        0, groups, torch.arange(len(groups), device=groups.device), "amin"
    )
    measure = layer.row_measure.new_zeros(count).index_add(0, groups, layer.row_measure)
    return replace(
        layer,
        propagate=layer.propagate[first],
        parameter=layer.parameter[first],
        bias=layer.bias[first],
        row_measure=measure,
    )
