"""Linear layers and convolutions: k⁺ = Σ_τ A_τ k + E[b²], t⁺ = Σ_τ A_τ t + Σ_τ Q_τ k + γ_b over taps τ."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_graphon.ntk.infinite.fields import Field
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.pairs import Pairs, Taps, sparse_rows
from lightning_graphon.ntk.infinite.setting import Setting, bin_means
from lightning_graphon.tracing.steps import Affine


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
        propagate, own = pairs.link(
            self,
            z.pairs,
            lambda: (TapProduct(self.covariance_map, rows, z.k), TapProduct(self.parameter_map, rows, z.k)),
        )
        k = propagate(z.k)
        t = self._tangent(propagate, own, z, k) if samples.tangent else None
        return k.add_(self.bias_square.to(k)[:, None, None]), t

    def _tangent(self, propagate: "TapProduct", own: "TapProduct", z: Field, k: Tensor) -> Tensor:
        t = (own(z.k) if self.ratio is None else self.ratio * k).add_(self.bias_term)
        return t if z.t is None else t.add_(propagate(z.t))


class TapProduct:
    """Σ_τ maps[τ] · field[rows[τ]], [R, K_out, n, m].

    Args:
        maps: Matrices [taps, K_out, K_in].
        rows: Numbers [taps, R] of pairs of the field; -1 is zero.
        like: A field [pairs, K_in, n, m].
    """

    def __init__(self, maps: Tensor, rows: Tensor, like: Tensor) -> None:
        self.maps, self.rows = maps.to(like), rows.to(like.device)
        self._sparse: Tensor | None = None
        if maps.shape[1] == maps.shape[2] == 1:  # the sparse product reads each tap once and writes once
            self._sparse = sparse_rows(self.rows.T, self.maps[:, 0, 0].expand(rows.shape[1], -1), len(like))

    def __call__(self, field: Tensor) -> Tensor:
        """The sum for one field."""
        n, m = field.shape[2:]
        flat = field.flatten(2)
        out = self._gathered(flat) if self._sparse is None else (self._sparse @ flat[:, 0])[:, None]
        return out.unflatten(2, (n, m))

    def _gathered(self, field: Tensor) -> Tensor:
        taps, outs, ins = self.maps.shape
        matrix = self.maps.transpose(0, 1).reshape(outs, taps * ins)
        out = field.new_empty(self.rows.shape[1], outs, field.shape[2])
        step = max(1, len(out) * outs // (taps * ins))  # what is gathered at a time is as large as the result
        for start in range(0, len(out), step):
            part = self.rows[:, start : start + step].T
            gathered = field[part.clamp_min(0).reshape(-1)].unflatten(0, part.shape)
            gathered[part < 0] = 0
            out[start : start + step] = matrix @ gathered.flatten(1, 2)
        return out
