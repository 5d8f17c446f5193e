"""Whether the conditions of [P2]'s theorem on convergence hold for the scores of a run, each for itself.

The theorem (Pham, Ta, Tran-Thanh, ICML 2026, arXiv:2602.06675) lets inputs and units grow together. It needs row
factors that stay bounded, factors whose distribution converges, noise that is independent from edge to edge given the
factors, and a threshold at which scores have no atom; and scores that are not negative. A finite run can speak against
a condition, never prove it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import svds
from scipy.special import ndtri
from scipy.stats import rankdata, wasserstein_distance
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.graphon.limits.factorised_saliency import FactorisedSaliency, fit_factorised_saliency
from lightning_graphon.graphon.limits.scaled_saliency import finite_float64

_GROWTH = 0.25  # exponent of the largest factor: tails lighter than the power 4 pass, a logarithm's slope is below it
_PART, _PARTS = 16, 64  # subsets of a sixteenth of the rows, and how many
_ATOM, _WIDTH = 1e-3, 1e-6  # share of scores that are equal but for this relative width
_MEDIAN = 1.17  # standard error of the median of log |normal| times √n
_EDGE = 2.02  # 99 % quantile of the Tracy-Widom law


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
        name: Which.
        holds: Whether the scores agree with it; None where they cannot tell.
        value: What was measured.
        bound: What it may be.
        measure: What `value` is.
    """

    name: str
    holds: bool | None
    value: float
    bound: float
    measure: str


@checked
def convergence_conditions(runs: Sequence[Tensor], density: float) -> list[Condition]:
    """Check each condition of the theorem on convergence from the scores of one layer.

    * bounded row profile: the largest row factor over the mean, how it grows from a sixteenth of the rows to all;
    * convergent factors: the Wasserstein distance of log factors between the last two runs, beside what chance gives;
    * independent noise: after the factors, one law in all cells of factors (`noise_ks`), and no singular value of the
      noise, by normal scores and centred, beyond the edge of independent entries;
    * stable threshold: the share of scores that equal the threshold, but for a millionth of it;
    * absolute scores: the share of negative ones (GraSP's are, unless `absolute`).

    Args:
        runs: Scores [out, in, *taps] of that layer in networks of growing size; with a single one nothing is said of
            the convergence of factors.
        density: Fraction that is kept, in (0, 1).

    Returns:
        Five conditions, in this order.

    Raises:
        ValueError: No run, a density out of range, or scores that cannot be fitted.

    >>> sizes = (64, 128)
    >>> uniform = [torch.rand(n, n, generator=torch.Generator().manual_seed(n)) for n in sizes]
    >>> [condition.name for condition in convergence_conditions(uniform, 0.1) if not condition.holds]
    []
    """
    if not len(runs):
        raise ValueError("runs is empty: give the scores of at least one network")
    if not 0 < density < 1:
        raise ValueError(f"density must lie in (0, 1), got {density!r}")
    scores = [finite_float64("scores", run, dims=2).flatten(1) for run in runs]
    fits = [fit_factorised_saliency(score) for score in scores[-2:]]
    return [
        _bounded_profile(fits[-1].row_factors),
        _convergent_factors(fits),
        _independent_noise(scores[-1], fits[-1]),
        _stable_threshold(scores[-1], density),
        _absolute(scores[-1]),
    ]


def _bounded_profile(factors: Tensor) -> Condition:
    values = factors.cpu().numpy()
    part = len(values) // _PART
    measure = "exponent with which max / mean of the row factors grows"
    if part < 4 or not values.any():
        return Condition("bounded row profile", None, math.nan, _GROWTH, measure)
    rng = np.random.default_rng(0)
    subsets = [rng.choice(values, part, replace=False) for _ in range(_PARTS)]
    small = np.mean([math.log(s.max()) for s in subsets if s.any()])
    slope = float((math.log(values.max()) - small) / math.log(len(values) / part))
    return Condition("bounded row profile", slope <= _GROWTH, slope, _GROWTH, measure)


def _convergent_factors(fits: Sequence[FactorisedSaliency]) -> Condition:
    name, measure = "convergent factors", "distance of log factors between the last two runs"
    if len(fits) < 2:
        return Condition(name, None, math.nan, math.nan, measure)
    sides = [
        _factor_distance([fit.row_factors for fit in fits], [fit.shape[1] for fit in fits]),
        _factor_distance([fit.col_factors for fit in fits], [fit.shape[0] for fit in fits]),
    ]
    value, bound = max(sides, key=lambda side: side[0] / side[1])
    return Condition(name, value <= bound, value, bound, measure)


def _factor_distance(factors: Sequence[Tensor], across: Sequence[int]) -> tuple[float, float]:
    """Distance of two laws of factors, dead ones as a share of their own, and what chance and fitting may give."""
    live = [f[f > 0].log().cpu().numpy() for f in factors]
    dead = [1 - len(one) / len(f) for one, f in zip(live, factors, strict=True)]
    scatter = 2 * math.sqrt(sum(1 / len(f) for f in factors))
    if not all(len(one) for one in live):
        return abs(dead[0] - dead[1]), scatter
    spread = max(float(one.std()) for one in live)
    value = float(wasserstein_distance(*live)) + abs(dead[0] - dead[1])
    share = sum(dead) / 2
    return value, scatter * (spread + math.sqrt(share * (1 - share))) + _MEDIAN / math.sqrt(min(across))


def _independent_noise(scores: Tensor, fit: FactorisedSaliency) -> Condition:
    rows, cols = fit.row_factors > 0, fit.col_factors.flatten() > 0
    name = "independent noise"
    if int(rows.sum()) < 2 or int(cols.sum()) < 2:
        return Condition(name, None, math.nan, math.nan, "largest singular value of the noise")
    noise = scores[rows][:, cols] / torch.outer(fit.row_factors[rows], fit.col_factors.flatten()[cols])
    m, n = noise.shape
    by_chance = 1.9 / math.sqrt(min(m * n / 16, 65_536)) + 0.6 / math.sqrt(m) + 0.6 / math.sqrt(n)
    both = [
        Condition(name, fit.noise_ks <= by_chance, fit.noise_ks, by_chance, "misfit of one law in all cells"),
        _spectral(name, noise),
    ]
    return max(both, key=lambda condition: condition.value / condition.bound)


def _spectral(name: str, noise: Tensor) -> Condition:
    m, n = noise.shape
    ranks = rankdata(noise.cpu().numpy(), axis=None).reshape(m, n)
    normal = ndtri((ranks - 0.5) / ranks.size)
    # The errors of the factors are shifts of whole rows and columns.
    normal = normal - normal.mean(0) - normal.mean(1, keepdims=True) + normal.mean()
    spread = float(normal.std())
    first = np.random.default_rng(0).standard_normal(min(m, n))
    largest = (
        float(svds(normal / spread, k=1, v0=first, tol=1e-4, return_singular_vectors=False)[0])
        if spread > 0 and min(m, n) > 2
        else 0.0
    )
    edge = math.sqrt(m) + math.sqrt(n)
    bound = math.sqrt(edge**2 + _EDGE * edge * (1 / math.sqrt(m) + 1 / math.sqrt(n)) ** (1 / 3))
    return Condition(name, largest <= bound, largest, bound, "largest singular value of the noise")


def _stable_threshold(scores: Tensor, density: float) -> Condition:
    flat = scores.flatten()
    keep = min(max(round(density * len(flat)), 1), len(flat))
    threshold = flat.kthvalue(len(flat) - keep + 1).values
    equal = int(((flat - threshold).abs() <= _WIDTH * threshold.abs()).sum())
    bound = max(_ATOM, 2 / len(flat))
    share = equal / len(flat)
    return Condition("stable threshold", share <= bound, share, bound, "share of scores at the threshold")


def _absolute(scores: Tensor) -> Condition:
    share = float((scores < 0).double().mean())
    return Condition("absolute scores", share == 0, share, 0.0, "share of negative scores")
