"""What a sparse first layer can express: its active inputs, and the units that are joined to several inputs.

[P2] (Pham, Ta, Tran-Thanh, ICML 2026, arXiv:2602.06675) proves universal approximation for sparse networks on the
subspace of their active coordinates. A function of k inputs needs hidden units joined to all k of them; of n units
n ∫ ∏_j W(u, v_j) du are expected to be. Functions give exact numbers for a mask, and expectations for a layer of n
units for a graphon. A graphon must keep the identity of the inputs, one column each, as
`layer_graphons(order="joint")` and `order="none"` do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import gammaln
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.graphon.core.step_graphon import StepGraphon


@checked
def active_inputs(first: Tensor | StepGraphon) -> Tensor:
    """Inputs with at least one weight (positive density): the active coordinates, bool [in].

    Their number is the intrinsic dimension of [P2]. The network does not depend on the other inputs.

    Args:
        first: Mask [out, in] of the first layer ([out, in, *taps] is read as [out, in · taps]), or its graphon.

    Raises:
        ValueError: A mask with fewer than two axes, an empty axis or entries other than 0 and 1.

    >>> active_inputs(torch.tensor([[1, 0, 1], [0, 0, 1]])).tolist()
    [True, False, True]
    """
    return rows_of(first)[0].amax(0) > 0


@checked
def dead_units(first: Tensor) -> Tensor:
    """Outputs of a mask without any weight, bool [out]: constant hidden units.

    >>> dead_units(torch.tensor([[1, 0], [0, 0]])).tolist()
    [False, True]
    """
    return _mask(first).amax(1) == 0


@checked
def effective_inputs(first: Tensor | StepGraphon) -> float:
    """Number of inputs that share the weights evenly: (Σ d_j)² / Σ d_j² of the inputs' degrees d_j.

    A soft version of the count of `active_inputs`: an input with a single weight is active but adds almost nothing
    here. 0 for an empty mask.

    >>> effective_inputs(torch.tensor([[1, 0, 1], [1, 0, 1]]))
    2.0
    """
    values, measure = rows_of(first)
    degree = measure @ values
    return float(degree.sum() ** 2 / degree.square().sum()) if bool(degree.any()) else 0.0


@checked
def common_neighbour_count(first: Tensor | StepGraphon, inputs: Sequence[int], units: int | None = None) -> float:
    """Number of hidden units joined to every one of the given inputs: n ∫ ∏_j W(u, v_j) du.

    Args:
        first: Mask of the first layer for the exact number, or its graphon for the expected one.
        inputs: Column indices, all different; none gives all units.
        units: Number n of hidden units; needed with a graphon.

    Raises:
        ValueError: `units` is missing or does not fit, or two inputs are the same.
        IndexError: An input that the layer does not have.

    >>> common_neighbour_count(torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]), [0, 1])
    2.0
    >>> common_neighbour_count(StepGraphon([[0.5, 0.4]]), [0, 1], units=100)
    20.0
    """
    values, measure = rows_of(first)
    columns = check_inputs(values, inputs)
    return units_of(first, units) * float(measure @ values[:, columns].prod(1))


@checked
def mean_common_neighbour_count(first: Tensor | StepGraphon, size: int, units: int | None = None) -> float:
    """The mean of `common_neighbour_count` over all sets of `size` active inputs, in closed form.

    For a mask it is Σ_i C(d_i, k) / C(a, k) with the rows' degrees d_i and a active inputs. For a graphon it is the
    same mean of products: elementary symmetric polynomials of the values W(u, ·).

    Args:
        first: Mask of the first layer, or its graphon.
        size: Number k of inputs, at least 1.
        units: Number of hidden units, with a graphon.

    Raises:
        ValueError: `size` is below 1, or `units` is missing or does not fit.

    >>> round(mean_common_neighbour_count(torch.tensor([[1, 1, 1], [1, 1, 0]]), 2), 9)  # of pairs: 2, 1, 1
    1.333333333
    """
    if size < 1:
        raise ValueError(f"size is the number of inputs in a set and must be at least 1, got {size}")
    values, measure = rows_of(first)
    values = values[:, active_inputs(first)]
    active, count = values.shape[1], units_of(first, units)
    if isinstance(first, StepGraphon):
        return count * float(measure @ _mean_products(values, size))
    degree = values.sum(1).cpu().numpy()
    # Logarithms, as binomials of hundreds of inputs overflow.
    logs = _log_binomial(degree[degree >= size], size) - _log_binomial(np.float64(active), size)
    return float(np.exp(logs).sum())


@dataclass(frozen=True)
class CoveredOrder:
    """Bracket of the largest k such that for any k active inputs one hidden unit is joined to them all.

    Attributes:
        lower: Every set of this many active inputs is covered.
        upper: Not every larger set is covered: `witness`, of `upper + 1` inputs, is not.
        witness: Column indices of that set; empty where every set is covered.
    """

    lower: int
    upper: int
    witness: tuple[int, ...]


@checked
def covered_order(first: Tensor | StepGraphon, units: int | None = None) -> CoveredOrder:
    """Largest k such that any k active inputs are covered, as a bracket.

    A mask covers a set of inputs if at least one unit is joined to all of them, a graphon if at least one of n units
    is expected to be, n ∫ ∏_j W(u, v_j) du >= 1.

    The smallest set that a mask does not cover hits the complement of every row. To find it is the minimum hitting set
    problem, which is NP-hard. So the upper end is a witness that is found greedily, and the lower end the best of three
    bounds: counts of all pairs, degrees, and the smallest values of each row.

    Args:
        first: Mask of the first layer, or its graphon.
        units: Number of hidden units, with a graphon.

    Raises:
        ValueError: `units` is missing or does not fit.

    >>> covered_order(torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]]))  # every pair, not all three
    CoveredOrder(lower=2, upper=2, witness=(0, 1, 2))
    """
    values, measure = rows_of(first)
    active = active_inputs(first).nonzero().squeeze(1)
    values, weight = values[:, active], measure * units_of(first, units)
    if not len(active):
        return CoveredOrder(0, 0, ())
    witness = _uncovered_set(values, weight)
    upper = len(witness) - 1 if witness else len(active)
    lower = max(bound(values, weight) for bound in (_pairs_bound, _degrees_bound, _smallest_values_bound))
    return CoveredOrder(lower, upper, tuple(active[witness].tolist()))


@checked
def expressivity_table(layers: Mapping[str, Tensor], sizes: Sequence[int] = (1, 2, 3)) -> list[dict[str, Any]]:
    """One row for each first-layer mask: numbers of the inputs that it reads, alone and together.

    Args:
        layers: Label (method, sparsity) to the mask [out, in] of a first layer.
        sizes: Numbers k of inputs for which units are counted.

    Returns:
        Rows with `layer`, `density`, `active_inputs`, `cut_off_inputs`, `effective_inputs`, `dead_units`,
        `covered_lower` and `covered_upper` (see `covered_order`), and for each k `joined_k`, the mean number of units
        joined to k active inputs.

    >>> expressivity_table({"snip": torch.tensor([[1, 1, 0], [1, 0, 0]])}, sizes=(2,))  # doctest: +NORMALIZE_WHITESPACE
    [{'layer': 'snip', 'density': 0.5, 'active_inputs': 2, 'cut_off_inputs': 1, 'effective_inputs': 1.8,
      'dead_units': 0, 'covered_lower': 2, 'covered_upper': 2, 'joined_2': 1.0}]
    """
    return [{"layer": name, **_row(mask, sizes)} for name, mask in layers.items()]


def _row(mask: Tensor, sizes: Sequence[int]) -> dict[str, Any]:
    active, order = int(active_inputs(mask).sum()), covered_order(mask)
    values = _mask(mask)
    return {
        "density": float(values.mean()),
        "active_inputs": active,
        "cut_off_inputs": values.shape[1] - active,
        "effective_inputs": effective_inputs(mask),
        "dead_units": int(dead_units(mask).sum()),
        "covered_lower": order.lower,
        "covered_upper": order.upper,
        **{f"joined_{k}": mean_common_neighbour_count(mask, k) for k in sizes},
    }


# ---- masks and graphons in one form


def check_inputs(values: Tensor, inputs: Sequence[int]) -> Tensor:
    """Column indices [k] of inputs, all of them different columns of [rows, in]."""
    columns = torch.as_tensor(list(inputs), dtype=torch.long, device=values.device)
    if len(set(columns.tolist())) < len(columns):
        raise ValueError(f"inputs must be different columns, got {list(inputs)}")
    for column in columns.tolist():
        if not 0 <= column < values.shape[1]:
            raise IndexError(f"input {column} is not one of the {values.shape[1]} inputs of the layer")
    return columns


def rows_of(first: Tensor | StepGraphon) -> tuple[Tensor, Tensor]:
    """Probability of a weight for each row and input [rows, in], and the measure [rows] of the rows, float64."""
    if isinstance(first, StepGraphon):
        return first.values.detach().double(), first.row_measure.detach().double()
    values = _mask(first)
    return values, torch.full((len(values),), 1 / len(values), dtype=torch.float64, device=values.device)


def _mask(mask: Tensor) -> Tensor:
    if mask.ndim < 2 or 0 in mask.shape:
        raise ValueError(f"a first-layer mask must be [out, in] with no empty axis, got shape {tuple(mask.shape)}")
    values = mask.detach().to("cpu" if mask.device.type == "mps" else mask.device, torch.float64).flatten(1)
    if not bool(((values == 0) | (values == 1)).all()):
        raise ValueError("a mask must have entries 0 and 1 only; for probabilities pass a StepGraphon")
    return values


def units_of(first: Tensor | StepGraphon, units: int | None) -> int:
    """Number of hidden units: that of a mask, or the one given with a graphon."""
    if isinstance(first, StepGraphon):
        if units is None or units < 1:
            raise ValueError(f"a graphon needs the number of hidden units, units >= 1, got {units!r}")
        return units
    if units not in (None, first.shape[0]):
        raise ValueError(f"the mask has {first.shape[0]} hidden units, got units={units!r}: leave it out")
    return first.shape[0]


def _log_binomial(n: Any, k: int) -> Any:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def _mean_products(values: Tensor, size: int) -> Tensor:
    """Mean over all sets of `size` columns of the product of their values, for each row."""
    table = [values.new_ones(len(values)), *(values.new_zeros(len(values)) for _ in range(size))]
    for count, column in enumerate(values.T, start=1):
        # Elementary symmetric polynomials by their recursion, as means so that nothing overflows: the new column is in
        # the share k / count of all sets of k among `count` columns.
        for k in range(min(size, count), 0, -1):
            table[k] = table[k] * (1 - k / count) + table[k - 1] * column * (k / count)
    return table[size]


# ---- the covered order; `weight` is the number of units that a row stands for


def _is_covered(counts: Tensor) -> Tensor:
    """At least one unit, up to the rounding of sums of a million shares."""
    return counts >= 1 - 1e-9


def _uncovered_set(values: Tensor, weight: Tensor) -> list[int]:
    """A small set that is not covered, or none: starting from each input, add the one that leaves the fewest units."""
    best: list[int] = []
    starts = (weight @ values).argsort(stable=True)[:16]
    for start in starts.tolist():
        chosen, left = [start], weight * values[:, start]
        while bool(_is_covered(left.sum())) and len(chosen) < values.shape[1] and (not best or len(chosen) < len(best)):
            counts = left @ values
            counts[chosen] = torch.inf
            chosen.append(int(counts.argmin()))
            left = left * values[:, chosen[-1]]
        if not bool(_is_covered(left.sum())) and (not best or len(chosen) < len(best)):
            best = chosen
    return sorted(best)


def _pairs_bound(values: Tensor, weight: Tensor) -> int:
    """2 if every pair is covered, else 1 if every input is, else 0."""
    pairs = values.T @ (values * weight[:, None])
    if not bool(_is_covered(pairs.diagonal()).all()):
        return 0
    pairs.fill_diagonal_(torch.inf)
    return 2 if len(pairs) > 1 and bool(_is_covered(pairs).all()) else 1


def _degrees_bound(values: Tensor, weight: Tensor) -> int:
    """A set of k inputs misses at most Σ_j (n − d_j) units; while those are fewer than n, one is joined to all k."""
    missed = ((1 - values).T @ weight).sort(descending=True).values.cumsum(0)
    return int(_is_covered(weight.sum() - missed).count_nonzero())


def _smallest_values_bound(values: Tensor, weight: Tensor) -> int:
    """At every row the product over any k inputs is at least that of its k smallest values."""
    return int(_is_covered(weight @ values.sort(1).values.cumprod(1)).count_nonzero())
