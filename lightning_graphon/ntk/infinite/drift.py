r"""The Graphon NTK with a drift: kept weights whose mean does not vanish.

SNIP keeps more positive than negative hidden weights; with a mean D(u, v) = E[wM] of order 1/n the sum of n
terms is of order one, so pre-activations are Gaussians with a mean, and so are the back-propagated signals.
Per position:

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

With D = 0 this is the centred kernel. It is research: gradients and forward signals are taken as independent
given the positions, as everywhere in this theory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon._shared.choices import Get, Reduce
from lightning_graphon.ntk.activations.base import DualActivation
from lightning_graphon.ntk.infinite.layers import Layer
from lightning_graphon.ntk.infinite.recursion import LIVE, tile_edge
from lightning_graphon.ntk.operators.tiling import TileShard, tiles


@dataclass(frozen=True)
class _Signals:
    """Per sample: means and variances of z, means of φ(z) and φ'(z) by layer, and backward means by layer.

    `mean[l]`, `variance[l]` are [P, N]; `active[l]` is E[h] entering layer l, [P, N]; `backward[l]` and
    `arriving[l]` are the means of δ and of the signal before φ', [O, P, N].
    """

    mean: list[Tensor]
    variance: list[Tensor]
    active: list[Tensor]
    backward: list[Tensor]
    arriving: list[Tensor]


def drift_kernel(
    x: Tensor, layers: Sequence[Layer], duals: Sequence[DualActivation], *,
    reduce: Reduce | None, x2: Tensor | None, get: Get, max_memory: int | None, shard: TileShard,
) -> Tensor:  # fmt: skip
    """`graphon_ntk` of layers that have `mean` and `mean_square`; the last one's rows are the C outputs.

    With `get="nngp"` it is the second moment of the outputs, mean included.
    """
    counts = [_counts(layer) for layer in layers]
    back = [
        _Back.from_layer(layer, after, before)
        for layer, after, before in zip(layers[1:], counts[1:], counts, strict=False)
    ]
    left = _signals(x, layers, duals, back)
    right = left if x2 is None else _signals(x2, layers, duals, back)
    y = x if x2 is None else x2
    edge = shard.edge(_edge(x, layers, max_memory), max(len(x), len(y)))
    out = x.new_zeros(len(layers[-1].propagate), len(x), len(y))
    for rows, cols in shard.mine(tiles(len(x), len(y), edge, symmetric=x2 is None)):
        block = _tile(x[rows], y[cols], _slice(left, rows), _slice(right, cols), layers, duals, back, counts, get)
        out[:, rows, cols] = block
        if x2 is None and rows != cols:
            out[:, cols, rows] = block.mT
    out = shard.collect(out)
    weights = layers[-1].row_measure / layers[-1].row_measure.sum()
    return torch.einsum("c,cij->ij", weights, out) if reduce == "mean" else out


def _edge(x: Tensor, layers: Sequence[Layer], max_memory: int | None) -> int:
    """Edge of a tile: every layer's two kernels are alive until the backward recursion, and the inputs' products."""
    fields = 2 * sum(len(layer.propagate) for layer in layers) + math.ceil(x.shape[1] / LIVE)
    return tile_edge(fields, x.element_size(), x.device.type, max_memory)


def _counts(layer: Layer) -> Tensor:
    """Number of units in each row cell."""
    units = len(layer.propagate) if layer.units is None else layer.units
    return layer.row_measure * units


@dataclass(frozen=True)
class _Back:
    """Transposed operators of one layer: from its outputs u back to its inputs v, each [v, u]."""

    energy: Tensor
    mean: Tensor
    mean_square: Tensor

    @classmethod
    def from_layer(cls, layer: Layer, after: Tensor, before: Tensor) -> "_Back":
        def turn(matrix: Tensor | None) -> Tensor:
            assert matrix is not None  # noqa: S101 - layers with a drift have all three
            return (after[:, None] * matrix / before).T

        return cls(turn(layer.propagate), turn(layer.mean), turn(layer.mean_square))


def _signals(x: Tensor, layers: Sequence[Layer], duals: Sequence[DualActivation], back: Sequence[_Back]) -> _Signals:
    active, moment = x.T, x.square().T
    signals = _Signals([], [], [], [], [])
    slopes: list[Tensor] = []
    for number, layer in enumerate(layers):
        mean, variance = _push(layer, active, moment)
        signals.active.append(active)
        signals.mean.append(mean)
        signals.variance.append(variance)
        if number < len(duals):
            active, slope = duals[number].shifted_mean(mean, variance)
            slopes.append(slope)
            moment = duals[number].shifted(mean, mean, variance, variance, variance)[0]
    delta = torch.eye(len(layers[-1].propagate), dtype=x.dtype, device=x.device)[:, :, None].expand(-1, -1, len(x))
    signals.backward.append(delta)
    for operators, slope in zip(reversed(back), reversed(slopes), strict=True):
        arriving = operators.mean @ delta
        delta = slope * arriving
        signals.arriving.insert(0, arriving)
        signals.backward.insert(0, delta)
    return signals


def _push(layer: Layer, active: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    assert layer.mean is not None  # noqa: S101
    assert layer.mean_square is not None  # noqa: S101
    assert layer.bias_mean is not None  # noqa: S101
    mean = layer.mean @ active + layer.bias_mean[:, None]
    variance = layer.propagate @ moment - layer.mean_square @ active.square() + layer.bias[:, None]
    return mean, variance.clamp_min(0)  # a variance: negative only by rounding


def _slice(signals: _Signals, part: slice) -> _Signals:
    return _Signals(*([t[..., part] for t in getattr(signals, name)] for name in _Signals.__dataclass_fields__))


def _tile(
    x: Tensor, y: Tensor, sx: _Signals, sy: _Signals, layers: Sequence[Layer], duals:
    Sequence[DualActivation],
    back: Sequence[_Back], counts: Sequence[Tensor], get: Get,
) -> Tensor:  # fmt: skip
    """Kernels [C, a, b] of one pair of sample tiles."""
    moments, slopes = [x.T[:, :, None] * y.T[:, None, :]], []
    for number, layer in enumerate(layers):
        covariance = _covariance(layer, moments[-1], sx.active[number], sy.active[number])
        mx, my = sx.mean[number][:, :, None], sy.mean[number][:, None, :]
        if number == len(duals):
            if get == "nngp":
                return covariance + mx * my
            break
        qx, qy = sx.variance[number][:, :, None], sy.variance[number][:, None, :]
        moment, slope = duals[number].shifted(mx, my, qx, qy, covariance)
        moments.append(moment)
        slopes.append(slope)
    own = [_flat(layer.parameter, s) + layer.bias_parameter for layer, s in zip(layers, moments, strict=True)]
    return torch.stack([
        _one_output(o, sx, sy, own, slopes, back, counts) for o in range(len(layers[-1].propagate))
    ])  # fmt: skip


def _one_output(
    o: int, sx: _Signals, sy: _Signals, own: Sequence[Tensor], slopes: Sequence[Tensor],
    back: Sequence[_Back], counts: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Kernel of output `o`: the backward recursion, and the sum over layers."""
    gamma = _outer(sx.backward[-1][o], sy.backward[-1][o])
    total = own[-1][o]
    for number in range(len(back) - 1, -1, -1):
        operators = back[number]
        deltas = _outer(sx.backward[number + 1][o], sy.backward[number + 1][o])
        arriving = _outer(sx.arriving[number][o], sy.arriving[number][o])
        gamma = slopes[number] * (_flat(operators.energy, gamma) - _flat(operators.mean_square, deltas) + arriving)
        total = total + torch.einsum("p,pij->ij", counts[number], gamma * own[number])
    return total


def _covariance(layer: Layer, moment: Tensor, left: Tensor, right: Tensor) -> Tensor:
    assert layer.mean_square is not None  # noqa: S101
    return _flat(layer.propagate, moment) - _flat(layer.mean_square, _outer(left, right)) + layer.bias[:, None, None]


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[..., :, None] * right[..., None, :]


def _flat(matrix: Tensor, field: Tensor) -> Tensor:
    return (matrix @ field.reshape(len(field), -1)).reshape(len(matrix), *field.shape[1:])
