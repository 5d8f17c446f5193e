"""Distances between step graphons on any two grids."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.graphon.core.partition import refine
from lightning_graphon.graphon.core.step_graphon import StepGraphon, common_refinement
from lightning_graphon.graphon.distances.cut_norm import cut_norm

# Simplex steps of one transport problem; POT's own 500 stop before the optimum at 64 bins.
_TRANSPORT_STEPS = 1_000_000


@dataclass(frozen=True)
class CutDistance:
    """Bracket of the cut norm of the difference of two graphons.

    Attributes:
        lower: Lower bound of the cut norm of the difference, by a witness.
        upper: Certified upper bound.
        alignment: "given" or "degree", the relabelling to which both bounds belong.
        relabelling_lower: Lower bound of the distance over all relabellings.
        exact: Whether `lower` is the cut norm itself.
    """

    lower: float
    upper: float
    alignment: str
    relabelling_lower: float
    exact: bool


@checked
def cut_distance(
    a: StepGraphon, b: StepGraphon, *, align: bool = True, restarts: int = 64, seed: int = 0
) -> CutDistance:
    """Bracket ‖a − b‖□ = sup_{S,T} |∫_{S×T} (a − b)|, on the common refinement of both grids.

    The cut distance δ□ of graph limits (Lovász, Large Networks and Graph Limits, 2012, Section 8.2; here
    bipartite, so rows and columns are relabelled separately) is the least over all relabellings. That minimum
    is not computed. With `align=True` two relabellings are tried, the given one and sorting both graphons by
    degree, and the one with the smaller `upper` is kept. So `upper` is an upper bound of δ□, `lower` belongs to
    the kept relabelling only, and `relabelling_lower` is a lower bound of δ□: half the L1 distance between the
    sorted degree functions of the rows or of the columns, or the difference of densities.

    Args:
        a: First graphon.
        b: Second graphon, on any grid.
        align: Also try the relabelling by degree.
        restarts: See `cut_norm`.
        seed: See `cut_norm`.

    Example:
        >>> a, b = StepGraphon([[0.5]]), StepGraphon([[0.9, 0.1], [0.1, 0.9]])
        >>> d = cut_distance(a, b)
        >>> round(d.lower, 6), round(d.upper, 6), d.exact
        (0.1, 0.1, True)
    """
    norms = []
    for name, pair in _alignments(a, b, align):
        left, right = common_refinement(*pair)
        difference = left.values.double() - right.values.double()
        norm = cut_norm(difference, left.row_measure, left.col_measure, restarts=restarts, seed=seed)
        norms.append((name, norm))
    name, norm = min(norms, key=lambda item: item[1].upper)
    relabelling_lower = min(_relabelling_lower(a, b), norm.upper)  # above it by rounding only
    return CutDistance(norm.lower, norm.upper, name, relabelling_lower, norm.exact)


@checked
def l2_distance(a: StepGraphon, b: StepGraphon, *, align: bool = True) -> float:
    """(∬ (a − b)²)^½ on the common refinement, what [P1] plots against width.

    [P1] is Pham et al., The Graphon Limit Hypothesis, NeurIPS 2025, arXiv:2510.17515, Section 4.

    With `align=True` the smaller of the distances as given and after sorting both by degree.

    >>> round(l2_distance(StepGraphon([[0.5]]), StepGraphon([[0.9, 0.1]])), 6)
    0.4
    """
    return min(_norm(*pair, power=2) for _, pair in _alignments(a, b, align))


@checked
def l1_distance(a: StepGraphon, b: StepGraphon, *, align: bool = True) -> float:
    """∬ |a − b| on the common refinement, at least the cut norm of the difference.

    With `align=True` the smaller of the distances as given and after sorting both by degree.

    >>> round(l1_distance(StepGraphon([[0.5]]), StepGraphon([[0.9, 0.3]])), 6)
    0.3
    """
    return min(_norm(*pair, power=1) for _, pair in _alignments(a, b, align))


@checked
def transport_distance(a: StepGraphon, b: StepGraphon) -> float:
    """Permutation-free distance by co-optimal transport: (min Σ (a_ij − b_kl)² π_ik γ_jl)^½.

    The minimum is over couplings π of the row measures and γ of the column measures (Redko et al., CO-Optimal
    Transport, NeurIPS 2020, eq. 1), so it is at most the L2 distance of any relabelling. The problem is not
    convex: block coordinate descent runs from the independent coupling, from the degree order and from the
    given order, and the least value is returned, an upper bound of the distance.

    Raises:
        ImportError: POT is not installed.
    """
    try:
        from ot.coot import co_optimal_transport2
    except ImportError as error:
        raise ImportError(
            "transport_distance needs POT, install it by: pip install 'lightning-graphon[transport]'"
        ) from error
    x, y = (g.values.detach().double().cpu().numpy() for g in (a, b))
    weights = {
        f"w{side}_{axis}": getattr(g, measure).detach().double().cpu().numpy()
        for side, g in (("x", a), ("y", b))
        for axis, measure in (("samp", "row_measure"), ("feat", "col_measure"))
    }
    best = min(
        float(co_optimal_transport2(x, y, **weights, warmstart=start, nits_ot=_TRANSPORT_STEPS))
        for start in _warm_starts(a, b)
    )
    return max(best, 0.0) ** 0.5


def _alignments(a: StepGraphon, b: StepGraphon, align: bool) -> list[tuple[str, tuple[StepGraphon, StepGraphon]]]:
    pairs = [("given", (a, b))]
    if align:
        pairs.append(("degree", (a.sort_by_degree(), b.sort_by_degree())))
    return pairs


def _norm(a: StepGraphon, b: StepGraphon, power: int) -> float:
    a, b = common_refinement(a, b)
    difference = (a.values.detach().double() - b.values.detach().double()).abs() ** power
    return float(a.row_measure.double() @ difference @ a.col_measure.double()) ** (1 / power)


def _relabelling_lower(a: StepGraphon, b: StepGraphon) -> float:
    """Half the L1 distance of sorted degree functions, or the difference of densities, whichever is larger."""
    # ‖U‖□ ≥ ½ ∫ |∫ U dv| du, and among all relabellings sorting both degree functions makes the right side least.
    a, b = a.to(dtype=torch.float64).sort_by_degree(), b.to(dtype=torch.float64).sort_by_degree()
    rows = _l1(a.row_degree, a.row_measure, b.row_degree, b.row_measure)
    cols = _l1(a.col_degree, a.col_measure, b.col_degree, b.col_measure)
    return max(rows / 2, cols / 2, abs(a.density - b.density))


def _l1(f: Tensor, f_measure: Tensor, g: Tensor, g_measure: Tensor) -> float:
    measure, i, j = refine(f_measure, g_measure)
    return float((f.detach()[i] - g.detach()[j]).abs() @ measure)


def _warm_starts(a: StepGraphon, b: StepGraphon) -> list[dict[str, tuple[object, object] | object] | None]:
    """Couplings to start from: None (independent), the order by degree, the given order."""
    starts: list[dict[str, tuple[object, object] | object] | None] = [None]
    for by_degree in (True, False):
        plans = [
            _rank_coupling(getattr(a, m).double(), getattr(b, m).double(), getattr(a, d), getattr(b, d), by_degree)
            for m, d in (("row_measure", "row_degree"), ("col_measure", "col_degree"))
        ]
        # POT takes dual variables with a warm start; zeros stand for none.
        duals = [(p.sum(1).numpy() * 0, p.sum(0).numpy() * 0) for p in plans]
        starts.append(
            {
                "pi_sample": plans[0].numpy(),
                "pi_feature": plans[1].numpy(),
                "duals_sample": duals[0],
                "duals_feature": duals[1],
            }
        )
    return starts


def _rank_coupling(p: Tensor, q: Tensor, f: Tensor, g: Tensor, by_degree: bool) -> Tensor:
    """Coupling of two measures that joins equal ranks, by degree or in the given order."""
    p, q, f, g = (t.detach().cpu() for t in (p, q, f, g))
    i = f.argsort(descending=True, stable=True) if by_degree else torch.arange(len(p))
    j = g.argsort(descending=True, stable=True) if by_degree else torch.arange(len(q))
    measure, left, right = refine(p[i], q[j])
    plan = torch.zeros(len(p), len(q), dtype=torch.float64)
    return plan.index_put_((i[left], j[right]), measure, accumulate=True)
