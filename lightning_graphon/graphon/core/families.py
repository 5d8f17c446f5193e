"""Named families of graphons with an exact density, to train on a designed graphon.

A family fixes a shape g(u, v); the graphon is min(1, c · g) with the c that gives the density. Shapes are averaged
over cells before they are capped at 1, so the density of the step graphon is exact.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_graphon._shared.checks import as_numbers, check_choice, checked, nearest, plain
from lightning_graphon.graphon.core.step_graphon import StepGraphon


@checked
def constant(density: float) -> StepGraphon:
    """W = density, the limit of random pruning.

    >>> constant(0.1)
    StepGraphon(rows=1, cols=1, density=0.1)
    """
    return StepGraphon([[_density(density)]])


@checked
def product(density: float, power: float = 1.0, bins: int = 64) -> StepGraphon:
    """W ∝ ((1 − u)(1 − v))^power, capped at 1: hubs on both sides, a factorised saliency without noise.

    Args:
        density: ∬ W in [0, 1].
        power: 0 is the constant graphon, larger is more uneven; not negative.
        bins: Cells of each axis.

    >>> product(0.2, power=2.0)
    StepGraphon(rows=64, cols=64, density=0.2)
    """
    if not 0 <= power < float("inf"):
        raise ValueError(f"power must be a finite number >= 0, got {power!r}")
    profile = _cell_powers(bins, power).flip(0)
    return _scaled(profile[:, None] * profile, density)


@checked
def power_law(density: float, exponent: float = 0.5, bins: int = 64) -> StepGraphon:
    """W ∝ (u v)^(−exponent), capped at 1: degrees with the tail P(degree > x) ~ x^(−1 / exponent).

    Args:
        density: ∬ W in [0, 1].
        exponent: In [0, 1), so that the shape is integrable.
        bins: Cells of each axis.

    >>> power_law(0.1, exponent=0.5)
    StepGraphon(rows=64, cols=64, density=0.1)
    """
    if not 0 <= exponent < 1:
        raise ValueError(f"exponent must lie in [0, 1), got {exponent!r}")
    profile = _cell_powers(bins, -exponent)
    return _scaled(profile[:, None] * profile, density)


@checked
def block(values: Any, density: float | None = None, row_measure: Any = None, col_measure: Any = None) -> StepGraphon:
    """Stochastic block model: constant on given blocks.

    Args:
        values: Non-negative shape [rows, cols]; probabilities where `density` is None.
        density: Scale the shape to this density, capped at 1; None keeps it.
        row_measure: Shares [rows] of the outputs in each block, default equal.
        col_measure: Shares [cols] of the inputs.

    >>> block([[4.0, 1.0], [1.0, 4.0]], density=0.25).values.tolist()
    [[0.4, 0.1], [0.1, 0.4]]
    """
    if density is None:
        return StepGraphon(values, row_measure, col_measure)
    shape = as_numbers("values", values).double()
    return _scaled(shape, density, row_measure, col_measure)


FAMILIES: dict[str, Callable[..., StepGraphon]] = {
    "constant": constant,
    "product": product,
    "block": block,
    "power-law": power_law,
}
"""Families by the name that `as_graphon` reads."""


@checked
def as_graphon(spec: Any) -> StepGraphon:
    """Read a graphon from what a user or a YAML file may give.

    Args:
        spec: A StepGraphon; cell values as tensor, numpy array or nested list; one number (a constant);
            a mapping such as `{"family": "power-law", "exponent": 0.5, "density": 0.1}`; or the same as text,
            `"power-law(exponent=0.5, density=0.1)"`.

    Raises:
        ValueError: Unknown family, or an argument that it does not take; the message names the nearest.
        TypeError: `spec` is none of these.

    Example:
        >>> as_graphon({"family": "power-law", "exponent": 0.5, "density": 0.1})
        StepGraphon(rows=64, cols=64, density=0.1)
        >>> as_graphon("constant(density=0.2)")
        StepGraphon(rows=1, cols=1, density=0.2)
    """
    if isinstance(spec, StepGraphon):
        return spec
    if isinstance(spec, str):
        return as_graphon(_parse(spec))
    if isinstance(spec, Mapping):
        return _from_mapping(dict(spec))
    if isinstance(spec, (Tensor, np.ndarray, list, tuple)):
        return StepGraphon(spec)
    if isinstance(plain(spec), (int, float)) and not isinstance(spec, bool):
        return constant(spec)
    raise TypeError(
        f"cannot read a graphon from {type(spec).__name__}: give a StepGraphon, cell values [rows, cols], "
        f"a number, or a family such as {{'family': 'product', 'density': 0.1}}"
    )


def _from_mapping(spec: dict[str, Any]) -> StepGraphon:
    name = spec.pop("family", None)
    if name is None:
        raise ValueError(f"a graphon given as a mapping needs the key 'family', got keys {sorted(spec)}")
    check_choice("graphon family", name, FAMILIES)
    parameters = inspect.signature(FAMILIES[name]).parameters
    for key in spec:
        if key not in parameters:
            raise ValueError(f"graphon family {name!r} takes no {key!r}. {nearest(str(key), parameters)}")
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in spec]
    if missing:
        raise ValueError(f"graphon family {name!r} needs {', '.join(missing)}")
    return FAMILIES[name](**spec)


def _parse(text: str) -> dict[str, Any]:
    """`name(key=number, ...)` to a mapping."""
    name, _, rest = text.strip().partition("(")
    spec: dict[str, Any] = {"family": name.strip()}
    for item in filter(None, (part.strip() for part in rest.removesuffix(")").split(","))):
        key, _, value = item.partition("=")
        try:
            spec[key.strip()] = int(value) if value.strip().isdecimal() else float(value)
        except ValueError:
            raise ValueError(f"cannot read {item!r} in {text!r}: write name(key=number, key=number)") from None
    return spec


def _density(density: float) -> float:
    if not 0 <= density <= 1:
        raise ValueError(f"density is the fraction of weights kept and must lie in [0, 1], got {density!r}")
    return float(density)


def _cell_powers(bins: int, power: float) -> Tensor:
    """Means [bins] of x^power over equal cells of [0, 1], power > −1."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins!r}")
    # From the antiderivative: point values would be infinite at 0 for negative powers.
    cuts = torch.linspace(0, 1, bins + 1, dtype=torch.float64) ** (power + 1)
    return cuts.diff() * bins / (power + 1)


def _scaled(shape: Tensor, density: float, row_measure: Any = None, col_measure: Any = None) -> StepGraphon:
    """min(1, c · shape) with the c that gives the density."""
    density = _density(density)
    if shape.ndim != 2 or not bool((shape >= 0).all()) or not bool(shape.isfinite().all()):
        raise ValueError("the shape of a block graphon must be a matrix of finite numbers >= 0")
    # A graphon of zeros checks and normalises the measures.
    grid = StepGraphon(torch.zeros_like(shape), row_measure, col_measure)
    rows, cols = grid.row_measure, grid.col_measure
    area = rows[:, None] * cols
    support = float(area[shape > 0].sum())
    if density > support + 1e-12:
        raise ValueError(f"density {density} does not fit: the shape is positive on an area of {support:.4g}")
    return StepGraphon((_scale(shape, area, density) * shape).clamp_max(1.0), rows, cols)


def _scale(shape: Tensor, area: Tensor, density: float) -> float:
    """The c of min(1, c · shape)."""
    # The mean is piecewise linear in c with a kink at each 1 / value. So cells are capped from the largest down: entry
    # k of `scales` is the c with k cells capped, and the first one that leaves cell k uncapped is right.
    order = shape.flatten().argsort(descending=True)
    values, areas = shape.flatten()[order], area.flatten()[order]
    capped = areas.cumsum(0) - areas
    mass = values * areas
    uncapped = mass.flip(0).cumsum(0).flip(0)
    scales = (density - capped) / uncapped.clamp_min(1e-300)
    fits = (scales * values <= 1 + 1e-12) & (uncapped > 0)
    if bool(fits.any()):
        return max(float(scales[fits][0]), 0.0)
    positive = values[values > 0]  # the density is the whole support, so all of it is capped
    return 1 / float(positive.min()) if len(positive) else 0.0
