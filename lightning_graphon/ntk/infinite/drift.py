r"""The Graphon NTK with a drift: kept weights whose mean does not vanish.

SNIP keeps more positive than negative hidden weights. With a mean D(u, v) = E[wM] of order 1/n the sum of n terms is of
order one, so pre-activations are Gaussians with a mean, and so are the back-propagated signals. At each position:

.. math::
    m^{(l)}(u;x) = n_{l-1}\int D\,μ^{(l-1)}\,dv, \qquad
    \tildeΣ^{(l)}(u) = n_{l-1}\int (E\,Σ^{(l-1)} - D^2 μ^{(l-1)} μ'^{(l-1)})\,dv, \qquad μ = E[φ(z)],\ Σ =
    E[φ(z)φ(z')]

with z no longer centred, and for output o, with :math:`e_o(v) = n_{l+1}\int D(u,v)\,\barδ_o(u)\,du`,
:math:`\barδ_o = E[φ'(z)]\,e_o`,

.. math::
    Γ^{(l)}(v) = E[φ'φ'] \Big( n_{l+1}\int (E\,Γ^{(l+1)} - D^2 \textstyle\sum_o \barδ_o\barδ'_o)\,du
                 + \sum_o e_o e'_o \Big), \qquad
    Θ = \sum_l n_l \int Γ^{(l)}(u)\,\big(γ n_{l-1}\int W Σ^{(l-1)} dv + γ_b\big)\,du .

With D = 0 this is the centred kernel. This is research: gradients and forward signals are assumed independent given the
positions, as everywhere in this theory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon._shared.choices import Get, Reduce
from lightning_graphon.ntk.activations.base import DualActivation
from lightning_graphon.ntk.infinite.layers import Layer
from lightning_graphon.ntk.infinite.recursion import LIVE_TENSORS, apply_map, tile_edge
from lightning_graphon.ntk.operators.tiling import TileShard, tiles


@dataclass(frozen=True)
class _Signals:
    """First moments of each sample's signals, one tensor per layer.

    Attributes:
        mean: Means [P, N] of the pre-activations z.
        variance: Variances [P, N] of z.
        inputs: Means [P, N] of what enters the layer, x or φ(z).
        delta: Means [O, P, N] of the back-propagated signals δ of O outputs.
        before_slope: Means [O, P, N] of these signals before the multiplication by φ'(z).
    """

    mean: list[Tensor]
    variance: list[Tensor]
    inputs: list[Tensor]
    delta: list[Tensor]
    before_slope: list[Tensor]


def drift_kernel(
    x: Tensor, layers: Sequence[Layer], duals: Sequence[DualActivation], *,
    reduce: Reduce | None, x2: Tensor | None, get: Get, max_memory: int | None, shard: TileShard,
) -> Tensor:  # fmt: skip
    """`graphon_ntk` of layers with `mean_map` and `mean_square_map`; the last one's rows are the C outputs.

    With `get="nngp"` it is the second moment of the outputs, mean included.
    """
    # Units in each row cell; where the number of outputs is not known, one in each.
    counts = [layer.row_measure * (layer.units or len(layer.row_measure)) for layer in layers]
    adjoints = [
        _Adjoint.from_layer(layer, after, before)
        for layer, after, before in zip(layers[1:], counts[1:], counts, strict=False)
    ]
    left = _signals(x, layers, duals, adjoints)
    right = left if x2 is None else _signals(x2, layers, duals, adjoints)
    y = x if x2 is None else x2
    # Every layer's two kernels stay until the backward recursion, and the products of the inputs.
    fields = 2 * sum(len(layer.covariance_map) for layer in layers) + math.ceil(x.shape[1] / LIVE_TENSORS)
    edge = shard.edge(tile_edge(fields, x.element_size(), x.device.type, max_memory), max(len(x), len(y)))
    out = x.new_zeros(len(layers[-1].covariance_map), len(x), len(y))
    for rows, cols in shard.mine(tiles(len(x), len(y), edge, symmetric=x2 is None)):
        block = _tile(x[rows], y[cols], _slice(left, rows), _slice(right, cols), layers, duals, adjoints, counts, get)
        out[:, rows, cols] = block
        if x2 is None and rows != cols:
            out[:, cols, rows] = block.mT
    out = shard.collect(out)
    # Outputs may stand for groups of different size.
    weights = layers[-1].row_measure / layers[-1].row_measure.sum()
    return torch.einsum("c,cij->ij", weights, out) if reduce == "mean" else out


@dataclass(frozen=True)
class _Adjoint:
    """Maps of one layer from its outputs u back to its inputs v, each [v, u]."""

    covariance_map: Tensor
    mean_map: Tensor
    mean_square_map: Tensor

    @classmethod
    def from_layer(cls, layer: Layer, after: Tensor, before: Tensor) -> "_Adjoint":
        # The maps hold n_in and the measure of v; here n_out and the measure of u are needed.
        maps = (layer.covariance_map, layer.mean_map, layer.mean_square_map)
        return cls(*((after[:, None] * matrix / before).T for matrix in maps if matrix is not None))


def _signals(
    x: Tensor, layers: Sequence[Layer], duals: Sequence[DualActivation], adjoints: Sequence[_Adjoint]
) -> _Signals:
    inputs, moment = x.T, x.square().T
    signals = _Signals([], [], [], [], [])
    slopes: list[Tensor] = []
    for number, layer in enumerate(layers):
        mean, variance = _preactivation_moments(layer, inputs, moment)
        signals.inputs.append(inputs)
        signals.mean.append(mean)
        signals.variance.append(variance)
        if number < len(duals):
            inputs, slope = duals[number].shifted_mean(mean, variance)
            slopes.append(slope)
            moment = duals[number].shifted(mean, mean, variance, variance, variance)[0]
    # Each output's own signal starts as 1 at that output.
    delta = torch.eye(len(layers[-1].covariance_map), dtype=x.dtype, device=x.device)[:, :, None].expand(-1, -1, len(x))
    signals.delta.append(delta)
    for adjoint, slope in zip(reversed(adjoints), reversed(slopes), strict=True):
        before_slope = adjoint.mean_map @ delta
        delta = slope * before_slope
        signals.before_slope.insert(0, before_slope)
        signals.delta.insert(0, delta)
    return signals


def _preactivation_moments(layer: Layer, inputs: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    assert layer.mean_map is not None  # noqa: S101
    assert layer.mean_square_map is not None  # noqa: S101
    assert layer.bias_mean is not None  # noqa: S101
    mean = layer.mean_map @ inputs + layer.bias_mean[:, None]
    variance = layer.covariance_map @ moment - layer.mean_square_map @ inputs.square() + layer.bias_variance[:, None]
    return mean, variance.clamp_min(0)  # negative only by rounding


def _slice(signals: _Signals, part: slice) -> _Signals:
    return _Signals(*([t[..., part] for t in getattr(signals, name)] for name in _Signals.__dataclass_fields__))


def _tile(
    x: Tensor, y: Tensor, sx: _Signals, sy: _Signals, layers: Sequence[Layer], duals: Sequence[DualActivation],
    adjoints: Sequence[_Adjoint], counts: Sequence[Tensor], get: Get,
) -> Tensor:  # fmt: skip
    """Kernels [C, a, b] of one pair of sample tiles."""
    moments, slopes = [x.T[:, :, None] * y.T[:, None, :]], []
    for number, layer in enumerate(layers):
        assert layer.mean_square_map is not None  # noqa: S101
        means = apply_map(layer.mean_square_map, _outer(sx.inputs[number], sy.inputs[number]))
        covariance = apply_map(layer.covariance_map, moments[-1]) - means + layer.bias_variance[:, None, None]
        mx, my = sx.mean[number][:, :, None], sy.mean[number][:, None, :]
        if number == len(duals):
            if get == "nngp":
                return covariance + mx * my
            break
        qx, qy = sx.variance[number][:, :, None], sy.variance[number][:, None, :]
        moment, slope = duals[number].shifted(mx, my, qx, qy, covariance)
        moments.append(moment)
        slopes.append(slope)
    parameter_terms = [
        apply_map(layer.parameter_map, s) + layer.bias_term for layer, s in zip(layers, moments, strict=True)
    ]
    return torch.stack([
        _one_output(o, sx, sy, parameter_terms, slopes, adjoints, counts) for o in range(len(layers[-1].covariance_map))
    ])  # fmt: skip


def _one_output(
    o: int, sx: _Signals, sy: _Signals, parameter_terms: Sequence[Tensor], slopes: Sequence[Tensor],
    adjoints: Sequence[_Adjoint], counts: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Kernel of output `o`: the backward recursion, and the sum over layers."""
    gamma = _outer(sx.delta[-1][o], sy.delta[-1][o])
    total = parameter_terms[-1][o]
    for number in range(len(adjoints) - 1, -1, -1):
        adjoint = adjoints[number]
        # A second moment is the variance that the weights add, plus the product of the means.
        means = _outer(sx.delta[number + 1][o], sy.delta[number + 1][o])
        variance = apply_map(adjoint.covariance_map, gamma) - apply_map(adjoint.mean_square_map, means)
        gamma = slopes[number] * (variance + _outer(sx.before_slope[number][o], sy.before_slope[number][o]))
        total = total + torch.einsum("p,pij->ij", counts[number], gamma * parameter_terms[number])
    return total


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[..., :, None] * right[..., None, :]
