"""Elementwise functions φ: k⁺ = E[φφ'], t⁺ = E[φ̇φ̇'] t, μ⁺ = E[φ] under the Gaussian law of the input."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_graphon.ntk.activations.base import DualActivation
from lightning_graphon.ntk.activations.reading import dual_from_values, named_dual
from lightning_graphon.ntk.infinite.fields import Field, Moments
from lightning_graphon.ntk.infinite.nodes.base import Node, Samples
from lightning_graphon.ntk.infinite.pairs import Pairs
from lightning_graphon.ntk.infinite.setting import Setting
from lightning_graphon.tracing import NotReadableError
from lightning_graphon.tracing.steps import Pointwise
from lightning_graphon.tracing.tracer import Call

_OPTIONS = {"leaky_relu": ("negative_slope",), "elu": ("alpha",), "celu": ("alpha",), "prelu": ("weight",),
            "hardtanh": ("min_val", "max_val")}  # fmt: skip
_FLAGS = ("inplace", "input", "out")


def read_dual(step: Pointwise) -> DualActivation:
    """The dual of a step's function."""
    call = step.source
    if isinstance(call, Call):
        dual = named_dual(call.name, _options(call))
        if dual is not None:
            return dual
    name = call.name if isinstance(call, Call) else "function"
    try:
        return dual_from_values(step.function, name)
    except ValueError as error:
        raise NotReadableError(f"{step.label}: {error}") from None


def _options(call: Call) -> dict[str, Any]:
    """Arguments that change the function."""
    names = _OPTIONS.get(call.name, ())
    extra = {names[i] if i < len(names) else str(i): a for i, a in enumerate(call.args[1:]) if not isinstance(a, bool)}
    return extra | {key: value for key, value in call.kwargs.items() if key not in _FLAGS}


class PointwiseNode(Node):
    """φ of a Gaussian; of a sum with another part the Gaussian with its mean and variance is taken."""

    step: Pointwise

    def build(self, setting: Setting) -> None:
        """Of what is known φ is known; a linear function keeps a Gaussian."""
        (source,) = self.inputs
        self.linear = self.step.linear
        if self.linear is not None:
            self.centred = source.centred and self.linear[1] == 0
            self.uses_means = self.linear[1] != 0 and not source.centred
        elif source.certain:
            self.centred, self.uses_means = False, True
        else:
            self._read_nonlinear(source)

    def _read_nonlinear(self, source: Node) -> None:
        self.dual = read_dual(self.step)
        self.gaussian, self.centred, self.random_slope = False, False, True
        self.uses_squares, self.uses_means = True, not source.centred
        if not source.gaussian:
            warnings.warn(
                f"{self.step.label} acts on {source.step.label}, which is not Gaussian; the Gaussian with its mean and "
                "variance is taken, 1 to 1.5 % off in a block of a residual network with activations after the sum",
                stacklevel=8,
            )

    def propagate(self, inputs: Sequence[Field], pairs: Pairs, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """By the dual activation, centred where there is no mean."""
        (z,) = inputs
        if self.linear is not None:
            return self._propagate_linear(z, *self.linear)
        if self.inputs[0].certain:
            means = z.means
            assert means is not None  # noqa: S101
            return self.step.function(means[0]) * self.step.function(means[1]), None
        k, slope = self._expectations(z)
        return k, None if z.t is None else slope.mul_(z.t)

    def _expectations(self, z: Field) -> tuple[Tensor, Tensor]:
        (qx, qy), means = z.squares, z.means
        if means is None:
            return self.dual.covariance(qx, qy, z.k)
        mx, my = means
        qx, qy = (qx - mx.square()).clamp_min(0), (qy - my.square()).clamp_min(0)
        return self.dual.shifted(mx, my, qx, qy, z.k - mx * my)

    def _propagate_linear(self, z: Field, a: float, b: float) -> tuple[Tensor, Tensor | None]:
        k = a * a * z.k + b * b
        means = z.means if b else None
        if means is not None:
            k = k + a * b * (means[0] + means[1])
        return k, None if z.t is None else a * a * z.t

    def mean(self, inputs: Sequence[Moments], x: Tensor) -> Tensor | None:
        """E[φ]."""
        (z,) = inputs
        if self.linear is not None:
            return self._linear_mean(z.mean, len(x), x)
        if self.inputs[0].certain:
            assert z.mean is not None  # noqa: S101
            return self.step.function(z.mean)
        assert z.square is not None  # noqa: S101
        mean = torch.zeros_like(z.square) if z.mean is None else z.mean
        return self.dual.shifted_mean(mean, (z.square - mean.square()).clamp_min(0))[0]

    def _linear_mean(self, mean: Tensor | None, samples: int, x: Tensor) -> Tensor | None:
        assert self.linear is not None  # noqa: S101
        a, b = self.linear
        if mean is not None:
            return a * mean + b
        return x.new_full((self.step.positions, self.bins, samples), b) if b else None
