"""How many weights each layer keeps: global, uniform, ER, ERK or given; totals are exact."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from torch import Tensor, nn

from lightning_graphon._shared.checks import check_choice, check_sparsity
from lightning_graphon._shared.choices import Allocation
from lightning_graphon.pruning.allocation.top_k import keep_largest
from lightning_graphon.pruning.layer_selection import match_layers
from lightning_graphon.pruning.lazy_tensors import LazyTensorMapping, shapes_of


def er_density(shape: Sequence[int]) -> float:
    """Relative density of a layer under Erdős–Rényi: (n_out + n_in) / (n_out · n_in), Mocanu et al. 2018."""
    return (shape[0] + shape[1]) / (shape[0] * shape[1]) if len(shape) > 1 else 1.0


def erk_density(shape: Sequence[int]) -> float:
    """Relative density under Erdős–Rényi-Kernel: sum of all sides / product of all sides, Evci et al. 2020."""
    return sum(shape) / math.prod(shape)


_PROFILES: dict[str, Callable[[Sequence[int]], float]] = {
    "uniform": lambda shape: 1.0,
    "er": er_density,
    "erk": erk_density,
}


def layer_budgets(
    shapes: Mapping[str, Sequence[int]],
    keep: int,
    profile: str,
    floors: Mapping[str, int],
    matrices: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, int]:
    """Weights kept in each layer so that they sum to `keep` exactly.

    Densities are proportional to the profile, but at most 1 and at least the floor of a layer. Fractions are rounded by
    the method of largest remainders.

    Args:
        shapes: Name -> shape of the weight.
        keep: Number to keep in all.
        profile: "uniform", "er" or "erk".
        floors: Name -> least number to keep.
        matrices: Name -> shape [out, in, *taps] of a matrix in it, where it is not one.

    >>> layer_budgets({"a": (10, 10), "b": (100, 10)}, 110, "uniform", {})
    {'a': 10, 'b': 100}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    wanted = {name: sizes[name] * _PROFILES[profile](shape) for name, shape in (matrices or shapes).items()}
    return proportional_counts(wanted, sizes, floors, keep)


def proportional_counts(
    wanted: Mapping[str, float], sizes: Mapping[str, int], floors: Mapping[str, int], keep: int
) -> dict[str, int]:
    """Numbers proportional to `wanted`, but at most `sizes` and at least `floors`, that sum to `keep` exactly.

    >>> proportional_counts({"a": 1.0, "b": 3.0}, {"a": 9, "b": 5}, {}, 8)
    {'a': 3, 'b': 5}
    """

    def counts(scale: float) -> dict[str, float]:
        return {n: min(sizes[n], max(floors.get(n, 0), scale * wanted[n])) for n in wanted}

    # The total grows with the scale, so bisection finds it, down to the spacing of floats.
    low, high = 0.0, max((sizes[n] / wanted[n] for n in wanted if wanted[n]), default=1.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(counts(middle).values()) >= keep else (middle, high)
    return _round_to_total(counts(high), sizes, keep)


def _round_to_total(ideal: Mapping[str, float], sizes: Mapping[str, int], keep: int) -> dict[str, int]:
    """Round down, then give the rest to the largest remainders, among equals to the earlier layer."""
    # 1e-6 guards against 9.9999999 for an exact 10.
    kept = {name: min(sizes[name], math.floor(value + 1e-6)) for name, value in ideal.items()}
    by_remainder = sorted(ideal, key=lambda name: kept[name] - ideal[name])
    missing = keep - sum(kept.values())
    while missing > 0:
        for name in by_remainder:
            if missing and kept[name] < sizes[name]:
                kept[name] += 1
                missing -= 1
    return kept


def given_layer_budgets(
    model: nn.Module, shapes: Mapping[str, Sequence[int]], sparsities: Mapping[str, float], rest: float
) -> dict[str, int]:
    """Weights kept in each layer, from a dict pattern -> sparsity; other layers have the sparsity `rest`.

    Raises:
        ValueError: A pattern matches no selected layer, two patterns claim one layer, or a sparsity is not in [0, 1).
    """
    chosen: dict[str, tuple[str, float]] = {}
    for pattern, value in sparsities.items():
        sparsity = check_sparsity(value, f"allocation[{pattern!r}]")
        for name in match_layers(pattern, model, shapes):
            if name in chosen:
                raise ValueError(f"allocation: {pattern!r} and {chosen[name][0]!r} both match {name!r}")
            chosen[name] = (pattern, sparsity)
    return {
        name: keep_count(math.prod(shape), chosen[name][1] if name in chosen else rest)
        for name, shape in shapes.items()
    }


def keep_count(total: int, sparsity: float) -> int:
    """Number of weights kept: round((1 - sparsity) · total)."""
    return round((1 - sparsity) * total)


def floor_counts(shapes: Mapping[str, Sequence[int]], min_density: float | None, keep: int) -> dict[str, int]:
    """Least number of weights each layer keeps: ceil(min_density · size).

    Raises:
        TypeError: `min_density` is not a number.
        ValueError: It is not in [0, 1], or all floors together exceed `keep`.
    """
    if min_density is None:
        return {}
    if isinstance(min_density, bool) or not isinstance(min_density, (int, float)):
        raise TypeError(f"min_density must be a number in [0, 1], got {min_density!r}")
    if not 0 <= min_density <= 1:
        raise ValueError(f"min_density must lie in [0, 1], got {min_density!r}")
    floors = {name: math.ceil(min_density * math.prod(shape) - 1e-9) for name, shape in shapes.items()}
    if sum(floors.values()) > keep:
        raise ValueError(
            f"min_density={min_density} needs {sum(floors.values())} weights but the sparsity leaves only {keep}: "
            "lower one of them"
        )
    return floors


def select_globally(scores: Mapping[str, Tensor], keep: int, floors: Mapping[str, int]) -> dict[str, Tensor]:
    """One threshold over all layers; a layer that falls below its floor keeps its best `floor` weights."""
    masks: dict[str, Tensor] = {}
    remaining = shapes_of(scores)
    # Layers below their floor leave the competition, which lowers the number for the others and may bring them below.
    while remaining:
        chosen = keep_largest(LazyTensorMapping(remaining, scores.__getitem__), keep)
        below_floor = [n for n, floor in floors.items() if n in chosen and int(chosen[n].count_nonzero()) < floor]
        if not below_floor:
            masks.update(chosen)
            break
        for name in below_floor:
            del remaining[name]
            masks.update(keep_largest({name: scores[name]}, floors[name]))
            keep -= floors[name]
    return {name: masks[name] for name in scores}


def check_allocation(allocation: object) -> None:
    """Raise unless `allocation` is one of the names or a dict of sparsities; for N:M see `NMPattern`.

    Raises:
        TypeError: Neither a string nor a mapping.
        ValueError: An unknown name.
    """
    if isinstance(allocation, Mapping):
        for key in allocation:
            if not isinstance(key, (str, type)):
                raise TypeError(f"allocation maps layer names or patterns to sparsities, got the key {key!r}")
        return
    names = (*get_args(Allocation), "2:4")
    if not isinstance(allocation, str):
        raise TypeError(f"allocation must be one of {names} or a dict pattern -> sparsity, got {allocation!r}")
    check_choice("allocation", allocation, names)
