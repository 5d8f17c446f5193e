"""The centred recursion of the Graphon NTK, tile by tile over pairs of samples."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon._shared.choices import Get
from lightning_graphon.ntk.activations.base import DualActivation
from lightning_graphon.ntk.infinite.layers import Layer

# Pairs closer than this (squared distance over the sum of variances) get their distance term by term: in a Gram product
# the digits of near-duplicates cancel.
_NEAR = 1e-2
LIVE_TENSORS = 14  # of a tile's size that are in memory at a time, measured
_CACHE = {"cpu": 8 << 20, "cuda": 512 << 20}  # bytes per tile, on a CPU for each thread


@dataclass(frozen=True)
class Diagonals:
    """The diagonal of the recursion: what each sample needs without the others.

    Attributes:
        samples: Samples [N, d].
        inputs: Sums Σ_j A_pj x_j² of the first layer, [P, N].
        variances: Variances [P, N] of each layer's pre-activations.
        moments: Second moments [P, N] of each layer's inputs.
    """

    samples: Tensor
    inputs: Tensor
    variances: list[Tensor]
    moments: list[Tensor]


def diagonals(x: Tensor, layers: Sequence[Layer], duals: Sequence[DualActivation]) -> Diagonals:
    """The diagonal of the recursion for samples `x` [N, d]."""
    moments = [x.square().T]
    inputs = layers[0].covariance_map @ moments[0]
    variances = [inputs + layers[0].bias_variance[:, None]]
    for number, (layer, dual) in enumerate(zip(layers[1:], duals, strict=True), start=1):
        _warn_unresolved(dual, variances[-1], number)
        moments.append(dual.second_moment(variances[-1]))
        variances.append(layer.covariance_map @ moments[-1] + layer.bias_variance[:, None])
    return Diagonals(x, inputs, variances, moments)


def _warn_unresolved(dual: DualActivation, variances: Tensor, number: int) -> None:
    if variances.numel() and not dual.is_accurate(largest := variances.detach().max()):
        warnings.warn(
            f"the pre-activations of hidden layer {number} have variances up to {float(largest):.3g}, too large for "
            f"the quadrature of {dual.name!r}: the kernel of similar samples is inaccurate. Scale the inputs or "
            "weight_variance down, or take an activation with a closed form (erf, gelu, relu, ...)",
            stacklevel=6,
        )


def tile_edge(positions: int, itemsize: int, device: str, max_memory: int | None) -> int:
    """Samples along the edge of a square tile, so that its tensors fit the cache and `max_memory` bytes."""
    budget = _CACHE.get(device, 64 << 20) * (torch.get_num_threads() if device == "cpu" else 1)
    budget = budget if max_memory is None else min(budget, max_memory)
    # A tile has positions · edge² entries per tensor.
    edge = int((budget / (LIVE_TENSORS * positions * itemsize)) ** 0.5)
    return max(8, edge // 8 * 8)


def weighted_rows(x: Tensor, layer: Layer) -> Tensor:
    """Products A_pj x_j [P, rows, d], the left factor of the first layer's Gram products."""
    return layer.covariance_map[:, None, :] * x


def tile_kernel(
    weighted: Tensor, dx: Diagonals, dy: Diagonals, rows: slice, cols: slice,
    layers: Sequence[Layer], duals: Sequence[DualActivation], get: Get,
) -> Tensor:  # fmt: skip
    """Kernel [R, rows, cols] between the samples `rows` of `dx` and `cols` of `dy`; R rows of the last layer.

    `weighted` are the `weighted_rows` of the former.
    """
    qx, qy = (d.variances[0][:, s].unsqueeze(a) for d, s, a in ((dx, rows, 2), (dy, cols, 1)))
    distance = _first_distance(weighted, dx, dy, rows, cols, layers[0].covariance_map)
    tangent = _first_parameter(dx.samples[rows], dy.samples[cols], qx, qy, distance, layers[0])
    for number, (layer, dual) in enumerate(zip(layers[1:], duals, strict=True), start=1):
        distance, slope = dual.squared_distance(qx, qy, distance)
        if get == "ntk":
            inherited = apply_map(layer.covariance_map, slope * tangent)  # from the parameters of earlier layers
            moment = None if layer.ratio is not None else _moment(dx, dy, rows, cols, number, distance)
        # Squared distances of pre-activations: the bias, which both samples share, cancels.
        distance = apply_map(layer.covariance_map, distance)
        qx, qy = (d.variances[number][:, s].unsqueeze(a) for d, s, a in ((dx, rows, 2), (dy, cols, 1)))
        if get == "ntk":
            tangent = _parameter_term(layer, moment, qx, qy, distance).add_(inherited)
    return tangent if get == "ntk" else 0.5 * (qx + qy - distance)


def apply_map(matrix: Tensor, field: Tensor) -> Tensor:
    """Matrix [R, P] times a field [P, a, b]."""
    if matrix.numel() == 1:
        return field * matrix.reshape(())
    return (matrix @ field.reshape(len(field), -1)).reshape(len(matrix), *field.shape[1:])


def _moment(dx: Diagonals, dy: Diagonals, rows: slice, cols: slice, number: int, distance: Tensor) -> Tensor:
    """E[φφ'] from second moments and the squared distance."""
    return 0.5 * (dx.moments[number][:, rows, None] + dy.moments[number][:, None, cols] - distance)


def _parameter_term(layer: Layer, moment: Tensor | None, qx: Tensor, qy: Tensor, distance: Tensor) -> Tensor:
    """Part of the layer's own weights and biases in the tangent kernel."""
    if moment is not None:
        return apply_map(layer.parameter_map, moment) + layer.bias_term
    # γ n W Σ is `ratio` times the covariance without the bias, (q + q' - distance) / 2 - σ_b².
    ratio = 1.0 if layer.ratio is None else layer.ratio
    constant = layer.bias_term - ratio * layer.bias_variance[:, None, None]
    ends = (0.5 * ratio * qx + constant) + 0.5 * ratio * qy
    return ends.sub_(distance, alpha=0.5 * ratio)


def _first_distance(weighted: Tensor, dx: Diagonals, dy: Diagonals, rows: slice, cols: slice, matrix: Tensor) -> Tensor:
    """Σ_j A_pj (x_j - y_j)² [P, rows, cols]: by a Gram product, and term by term for pairs that are close."""
    x, y = dx.samples[rows], dy.samples[cols]
    ends = dx.inputs[:, rows, None] + dy.inputs[:, None, cols]
    distance = ends.sub_(torch.matmul(weighted, y.T), alpha=2)
    scale = (dx.variances[0][:, rows].amax(0)[:, None] + dy.variances[0][:, cols].amax(0)).detach()
    near = (distance.detach().amax(0) < _NEAR * scale).nonzero(as_tuple=True)
    if len(near[0]) == 0:
        return distance
    # In pieces, as [pairs, d] may be large where many samples are alike.
    exact = [(x[i] - y[j]).square() @ matrix.T for i, j in zip(*(index.split(4096) for index in near), strict=True)]
    return distance.permute(1, 2, 0).index_put(near, torch.cat(exact)).permute(2, 0, 1).contiguous()


def _first_parameter(x: Tensor, y: Tensor, qx: Tensor, qy: Tensor, distance: Tensor, layer: Layer) -> Tensor:
    """The first layer's own part: Σ_j Q_pj x_j y_j + bias."""
    if layer.ratio is not None:
        return _parameter_term(layer, None, qx, qy, distance)
    return torch.matmul(layer.parameter_map[:, None, :] * x, y.T) + layer.bias_term
