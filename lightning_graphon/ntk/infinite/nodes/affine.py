"""Linear layers and convolutions: k⁺ = Σ_τ A_τ k + E[b²], t⁺ = Σ_τ A_τ t + Σ_τ Q_τ k + γ_b over taps τ."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.pairs import Pairs, Taps, sparse_rows
from lightning_graphon.ntk.infinite.setting import Setting, bin_means
from lightning_graphon.tracing.steps import Affine

_GATHERED = 1 << 24  # entries of the input that are gathered at a time


class AffineNode(Node):
    """A layer of independent weights with mean zero: a fresh atom, Gaussian and centred."""

    step: Affine

    def build(self, setting: Setting) -> None:
        """Maps between bins [taps, K_out, K_in] of second moments, and of the weights' own part."""
        step, (source,) = self.step, self.inputs
        self.places = [Taps(step.taps, source.step.positions)]
        self.atoms, self.gaussian, self.centred = self.new_atom(), True, True
        mask, weight = setting.mask(step.weight_name, step.weight), step.weight.detach().to("cpu", torch.float64)
        density = self._cells(mask)
        ntk = setting.parameterization == "ntk"
        per_weight = setting.variance(step) / step.fan_in if ntk or setting.propagate == "density" else 1.0
        energy = per_weight * density if setting.propagate == "density" else self._cells(weight.square() * mask)
        moved = density if setting.parameter_term == "kept" else self._cells(torch.ones_like(mask))
        gamma = (per_weight if ntk else 1.0) * float(step.weight.requires_grad)
        self.covariance_map, self.parameter_map = energy, gamma * moved
        # Where the maps are proportional, one product with them does for both.
        proportional = setting.propagate == "density" and setting.parameter_term == "kept" and per_weight > 0
        self.ratio = gamma / per_weight if proportional else None
        self._read_bias(ntk)

    def _cells(self, values: Tensor) -> Tensor:
        """Means over the rows of each bin of sums over the columns of each bin, tap by tap."""
        (source,) = self.inputs
        step, taps = self.step, len(self.step.taps)
        matrix = step.matrix(values)
        cell = step.tap_of * source.bins + source.bin_of_unit[step.features]
        sums = matrix.new_zeros(len(matrix), taps * source.bins).index_add_(1, cell, matrix)
        return bin_means(sums, self.bin_of_unit).unflatten(1, (taps, -1)).transpose(0, 1).contiguous()

    def _read_bias(self, ntk: bool) -> None:
        bias = self.step.bias
        self.bias_square, self.bias_term = torch.zeros(self.bins, dtype=torch.float64), 0.0
        if bias is not None:
            squares = self.step.vector(bias.detach()).to("cpu", torch.float64).square()
            self.bias_square = bin_means(squares, self.bin_of_unit)
            self.bias_term = (float(squares.mean()) if ntk else 1.0) * float(bias.requires_grad)

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """As in the formula above."""
        (z,) = inputs
        taps = self.places[0]
        assert isinstance(taps, Taps)  # noqa: S101
        rows = taps.rows(pairs, z.pairs)
        k = apply_taps(self.covariance_map, rows, z.k)
        t = self._tangent(rows, z, k) if samples.tangent else None
        return k.add_(self.bias_square.to(k)[:, None, None]), t

    def _tangent(self, rows: Tensor, z: Field, k: Tensor) -> Tensor:
        if self.ratio is not None:
            own = k * self.ratio
        else:
            own = apply_taps(self.parameter_map, rows, z.k)
        own.add_(self.bias_term)
        return own if z.t is None else own.add_(apply_taps(self.covariance_map, rows, z.t))


def apply_taps(maps: Tensor, rows: Tensor, field: Tensor) -> Tensor:
    """Σ_τ maps[τ] · field[rows[τ]], [R, K_out, n, m].

    Args:
        maps: Matrices [taps, K_out, K_in].
        rows: Numbers [taps, R] of pairs of the field; -1 is zero.
        field: Kernels [pairs, K_in, n, m].
    """
    maps, (n, m) = maps.to(field), field.shape[2:]
    flat, (taps, outs, ins) = field.reshape(len(field), field.shape[1], -1), maps.shape
    if outs == ins == 1:  # the sparse product reads each tap once and writes once
        matrix = sparse_rows(rows.T, maps[:, 0, 0].expand(rows.shape[1], -1), len(field))
        return (matrix @ flat[:, 0]).reshape(-1, 1, n, m)
    matrix = maps.transpose(0, 1).reshape(outs, taps * ins)
    out = flat.new_empty(rows.shape[1], outs, flat.shape[2])
    step = max(1, _GATHERED // (taps * ins * flat.shape[2]))
    for start in range(0, rows.shape[1], step):
        part = rows[:, start : start + step].T
        gathered = flat[part.clamp_min(0).reshape(-1)].unflatten(0, part.shape)
        gathered[part < 0] = 0
        torch.matmul(matrix, gathered.flatten(1, 2), out=out[start : start + step])
    return out.unflatten(2, (n, m))
