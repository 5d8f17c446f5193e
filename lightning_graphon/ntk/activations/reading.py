"""The dual of an elementwise function that was met in a module: by its name, or by its values."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lightning_graphon.ntk.activations.base import DualActivation, HermiteDual
from lightning_graphon.ntk.activations.closed_form import CLOSED_FORMS
from lightning_graphon.ntk.activations.elu import celu, elu
from lightning_graphon.ntk.activations.piecewise_linear import PiecewiseLinear, ReLULike
from lightning_graphon.ntk.activations.registry import dual_activation

_NAMED = {"relu", "abs", "erf", "gelu", "sin", "cos", "exp", "square", "tanh", "sigmoid", "silu", "mish", "softplus",
          "selu", "softsign", "relu6", "hardsigmoid"}  # fmt: skip
_SAME = 1e-12  # relative difference below which two functions are one
_MOST_TERMS = 12  # of a polynomial


def named_dual(name: str, options: dict[str, object]) -> DualActivation | None:
    """Dual of torch's function of this name with these arguments; None where it is not known by name.

    >>> named_dual("leaky_relu", {"negative_slope": 0.2})
    ReLULike('leaky_relu')
    """
    if name == "leaky_relu":
        return ReLULike(float(options.get("negative_slope", 0.01)), 1.0, name)  # type: ignore[arg-type]
    if name in ("elu", "celu"):
        return (elu if name == "elu" else celu)(float(options.get("alpha", 1.0)))  # type: ignore[arg-type]
    if name == "hardtanh":
        low, high = (float(options.get(k, v)) for k, v in (("min_val", -1.0), ("max_val", 1.0)))  # type: ignore[arg-type]
        return PiecewiseLinear(low, 0.0, [(low, 1.0), (high, -1.0)], name)
    plain = not options or (name == "gelu" and options.get("approximate") == "none")
    return dual_activation(name) if name in _NAMED and plain else None


def dual_from_values(function: Callable[[Tensor], Tensor], name: str) -> DualActivation:
    """Dual of any elementwise function: a closed form whose values it has, a polynomial, else a Hermite series.

    Raises:
        ValueError: It is not finite everywhere.

    >>> dual_from_values(lambda z: torch.exp(-z * z), "exp(-z²)")
    ClosedForm('gaussian')
    """
    z = torch.linspace(-4, 4, 321, dtype=torch.float64)
    values = function(z)
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} is not finite for every number")
    known = [ReLULike(-float(function(-one)), float(function(one)), name) for one in [torch.ones((), dtype=z.dtype)]]
    for dual in (*known, *CLOSED_FORMS.values()):
        if _same(dual.forward(z), values):
            return dual
    degree = polynomial_degree(z, values)
    return HermiteDual(function, name=name) if degree is None else HermiteDual(function, degree=degree + 1, name=name)


def polynomial_degree(z: Tensor, values: Tensor) -> int | None:
    """Degree of the polynomial that has these values, at most 11; None where there is none."""
    for degree in range(_MOST_TERMS):
        basis = _basis(degree)
        fit = basis @ np.linalg.lstsq(basis, values.numpy(), rcond=None)[0]
        if _same(torch.from_numpy(fit), values):
            return degree
    return None


@cache
def _basis(degree: int) -> np.ndarray:
    return np.polynomial.chebyshev.chebvander(np.linspace(-1, 1, 321), degree)


def _same(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() <= _SAME * right.abs().max().clamp_min(1e-30))
