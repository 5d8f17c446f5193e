"""Rank correlation of two numbers over networks that come in points: the same method and sparsity, several seeds."""

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 2000


class Correlation(NamedTuple):
    """Spearman's ρ over all networks, its 95 % confidence interval, and ρ inside groups."""

    rho: float
    low: float
    high: float
    inside: float
    inside_low: float
    inside_high: float


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's ρ over the last axis; ties share their rank; NaN where one side is constant."""
    # Of all resamples at once in 0.01 s; 2000 calls of scipy's spearmanr give the same numbers in 0.25 s.
    a, b = (rankdata(v, axis=-1) for v in (x, y))
    a, b = (v - v.mean(-1, keepdims=True) for v in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def correlate(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Correlation:
    """Spearman's ρ with a percentile bootstrap interval, and ρ inside each group.

    Networks of one point differ in their seed only and count as one observation: whole points are drawn, with all their
    seeds. Points that were drawn alone leave ρ undefined and are left out of the percentiles.

    Args:
        x: [points, seeds].
        y: [points, seeds].
        groups: Label of each point, such as its sparsity; those with one point only have no ρ inside.

    Returns:
        ρ; mean, least and largest ρ inside a group. NaN where undefined.
    """
    drawn = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    found = spearman(x[drawn].reshape(RESAMPLES, -1), y[drawn].reshape(RESAMPLES, -1))
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, (0.025, 0.975)) if len(found) else (np.nan, np.nan)
    parts = [(groups == label) for label in dict.fromkeys(groups.tolist())]
    inside = np.array([spearman(x[p].ravel(), y[p].ravel()) for p in parts if p.sum() > 1])
    inside = inside[np.isfinite(inside)]
    summary = (inside.mean(), inside.min(), inside.max()) if len(inside) else (np.nan,) * 3
    return Correlation(*(float(v) for v in (spearman(x.ravel(), y.ravel()), low, high, *summary)))
