"""Test whether a mask is homogeneous, against the Erdős–Rényi graph with the same number of edges.

Null hypothesis: all masks of this shape with this number of edges are equally likely. This is the distribution of a
random mask with an exact budget, and of a Bernoulli mask given its number of edges, so no parameter has to be
estimated. With density p and centred entries X = M − p, three statistics are standardised by their null moments:

* rows: Σ_i d_i² of the row degrees;
* columns: the same with the column degrees;
* cycles: Σ X_ij X_i'j X_ij' X_i'j' over i ≠ i', j ≠ j', the signed quadrilateral of Gao and Lafferty (Testing
  Network Structure Using Relations Between Small Subgraph Probabilities, 2017), which is t(C4) − t(K2)⁴ with
  the part that degrees explain taken out of its fluctuation; variance 4 m (m−1) n (n−1) (p (1−p))⁴.

Mean and variance of the first two are exact, given the number of edges; the three are uncorrelated. Each gives a
one-sided p-value (too uneven); Fisher's sum of their logarithms is the statistic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon._shared.choices import NullDistribution
from lightning_graphon.graphon.motifs.counts import Counts, as_biadjacency
from lightning_graphon.graphon.motifs.motifs import from_counts

_SMALL_MASK = 20_000  # entries of a mask up to which several simulated ones are counted together
_SHORT_SIDE = 32  # below it the chi-squared distributions of degrees are one or two percent off
_CLEAR_P_VALUE = 1e-6  # smaller asymptotic p-values are significant in spite of that error
_DRAWS_AT_ONCE = 25  # small masks: 2 MB at most


@dataclass(frozen=True)
class HomogeneityTest:
    """Outcome of a homogeneity test.

    Attributes:
        statistic: Fisher's −2 Σ log p of the three components.
        p_value: Probability of such a statistic under the null hypothesis.
        verdict: "heterogeneous" if the p-value is at most `alpha`, else "homogeneous".
        alpha: Level of the verdict.
        row_score: Standardised excess of the row degrees' variance.
        col_score: Standardised excess of the column degrees' variance.
        c4_score: Standardised signed quadrilateral.
        row_degree_cv: Effect size: coefficient of variation of the row degrees beyond that of the null.
        col_degree_cv: The same for columns.
        c4_ratio: Effect size: t(C4) / t(K2)⁴ over distinct vertices, 1 for the null.
        method: "monte-carlo", "asymptotic", or "degenerate" for a mask that has only one arrangement.
    """

    statistic: float
    p_value: float
    verdict: str
    alpha: float
    row_score: float
    col_score: float
    c4_score: float
    row_degree_cv: float
    col_degree_cv: float
    c4_ratio: float
    method: str


@checked
def homogeneity_test(
    mask: Tensor, *, alpha: float = 0.01, method: NullDistribution = "auto", draws: int = 199, seed: int = 0
) -> HomogeneityTest:
    """Classify a mask as homogeneous (constant graphon) or heterogeneous, the taxonomy of [P2].

    [P2] is Pham, Ta, Tran-Thanh, ICML 2026, arXiv:2602.06675. A p-value says whether unevenness can be chance, not how
    large it is: in masks with millions of entries tiny differences are significant. Read it together with the effect
    sizes `c4_ratio`, `row_degree_cv` and `col_degree_cv`.

    Args:
        mask: 0/1 mask [out, in]; [out, in, *taps] is read as [out, in · taps].
        alpha: Level of the verdict.
        method: "monte-carlo" draws masks of the null and ranks the statistic among them; its level is exact for
            every size and density, and its smallest p-value is 1 / (draws + 1). "asymptotic" uses chi-squared
            distributions of the degree statistics and a normal one of the cycle statistic. "auto" takes Monte Carlo
            where fewer than 1000 cycles are expected in the mask or in its complement, too few for the normal
            distribution, and for small masks with a side below 32 unless the asymptotic p-value is below 1e-6.
        draws: Number of Monte-Carlo masks.
        seed: Seed of those masks; the global random state is not changed.

    Raises:
        ValueError: Unknown `method`, `alpha` not in (0, 1), `draws` below 1, entries other than 0 and 1.

    Example:
        >>> import torch
        >>> from lightning_graphon.graphon import StepGraphon
        >>> homogeneity_test(StepGraphon([[0.3]]).sample((64, 64))).verdict
        'homogeneous'
        >>> homogeneity_test(StepGraphon([[0.5, 0.1]]).sample((64, 64))).verdict
        'heterogeneous'
    """
    check_choice("method", method, get_args(NullDistribution))
    if not 0 < alpha < 1 or draws < 1:
        raise ValueError(f"alpha must lie in (0, 1) and draws be at least 1, got {alpha!r} and {draws!r}")
    mask = as_biadjacency(mask)
    edges = int(mask.count_nonzero())
    if edges in (0, mask.numel()) or min(mask.shape) < 2:
        return HomogeneityTest(0.0, 1.0, "homogeneous", alpha, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, "degenerate")
    count = Counts.from_mask(mask)
    # A mask and its complement are equally uneven; the sparser one has fewer edges to draw.
    sparser = count if 2 * edges <= mask.numel() else count.complement()
    null = _ErdosRenyi(sparser.m, sparser.n, int(sparser.edges))
    scores = null.scores([sparser])
    statistic = float(null.fisher(scores)[0])
    p_value = float(stats.chi2.sf(statistic, 6))
    if method == "auto":
        method = "monte-carlo" if null.monte_carlo_is_better(p_value) else "asymptotic"
    if method == "monte-carlo":
        simulated = null.fisher(null.scores(null.simulate(draws, seed)))
        # The mask itself counts as one of the draws, which makes the level exact (Davison and Hinkley 1997).
        p_value = (1 + int((simulated >= statistic * (1 - 1e-12)).sum())) / (draws + 1)
    motifs, (row, col, c4) = from_counts(count), scores[0].tolist()
    return HomogeneityTest(
        statistic=statistic, p_value=p_value, verdict="heterogeneous" if p_value <= alpha else "homogeneous",
        alpha=alpha, row_score=row, col_score=col, c4_score=c4, row_degree_cv=motifs.row_degree_cv,
        col_degree_cv=motifs.col_degree_cv, c4_ratio=motifs.c4_ratio, method=method,
    )  # fmt: skip


@dataclass(frozen=True)
class _ErdosRenyi:
    """All 0/1 matrices [m, n] with a given number of edges, at most half of the entries, equally likely."""

    m: int
    n: int
    edges: int

    @property
    def size(self) -> int:
        return self.m * self.n

    @property
    def p(self) -> float:
        return self.edges / self.size

    def monte_carlo_is_better(self, asymptotic: float) -> bool:
        """Whether cycles are too few for the normal law, or sides too short for a p-value that is not clear."""
        cycles = self.size * (self.m - 1) * (self.n - 1) / 4 * self.p**4
        short = min(self.m, self.n) < _SHORT_SIDE and self.size <= _SMALL_MASK
        return cycles < 1000 or (short and asymptotic > _CLEAR_P_VALUE)

    def scores(self, counts: Sequence[Counts]) -> np.ndarray:
        """Standardised statistics [k, 3]: row degrees, column degrees, signed cycles."""
        raw = np.concatenate([np.column_stack([c.row_square, c.col_square, c.signed_cycles()]) for c in counts])
        places = self.size * (self.m - 1.0) * (self.n - 1.0)
        mean, deviation = np.zeros(3), np.ones(3)
        for axis, groups in enumerate((self.m, self.n)):
            mean[axis], deviation[axis] = square_moments(groups, self.size // groups, self.edges)
        deviation[2] = 2 * places**0.5 * (self.p * (1 - self.p)) ** 2
        return (raw - mean) / deviation

    def fisher(self, scores: np.ndarray) -> np.ndarray:
        """Fisher's statistic [k]: chi-squared distributions for the degrees, the normal one for cycles."""
        log_p = stats.norm.logsf(scores)
        for axis, groups in enumerate((self.m, self.n)):
            shape = (groups - 1) / 2  # chi-squared with groups - 1 degrees of freedom, standardised, is a gamma law
            log_p[:, axis] = stats.gamma.logsf(shape + scores[:, axis] * shape**0.5, shape)
        # A floor for p-values that underflow: infinities could not be compared with those of draws.
        return -2 * np.maximum(log_p, -1e6).sum(1)

    def simulate(self, draws: int, seed: int) -> list[Counts]:
        """Counts in masks drawn from the null."""
        rng = np.random.default_rng(seed)
        if self.size > _SMALL_MASK:
            return [self._count(self._draw(rng)) for _ in range(draws)]
        parts = [range(draws)[start : start + _DRAWS_AT_ONCE] for start in range(0, draws, _DRAWS_AT_ONCE)]
        return [Counts.from_many(np.stack([self._draw(rng) for _ in part]), self.m, self.n) for part in parts]

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.choice(self.size, self.edges, replace=False, shuffle=False)

    def _count(self, edges: np.ndarray) -> Counts:
        if self.p < 0.1:
            return Counts.from_edges(edges, self.m, self.n)
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[torch.from_numpy(edges)] = True
        return Counts.from_mask(mask.view(self.m, self.n))


def square_moments(groups: int, size: int, edges: int) -> tuple[float, float]:
    """Mean and standard deviation of Σ d² under the null, exact, for `groups` rows (or columns) of `size` entries."""
    # Σ d² is `edges` plus twice the number of pairs of edges in one group. The variance needs pairs of such pairs: the
    # same pair, two that share an edge (a triple), or two disjoint ones. Rational numbers, as the terms nearly cancel.
    total = groups * size
    pair = Fraction(size - 1, total - 1)
    triple = pair * Fraction(size - 2, max(total - 2, 1))
    disjoint = pair * Fraction(
        (size - 2) * (size - 3) + (groups - 1) * size * (size - 1), max((total - 2) * (total - 3), 1)
    )
    pairs = Fraction(edges * (edges - 1), 2)
    square = pairs * (pair + 2 * (edges - 2) * triple + Fraction(max((edges - 2) * (edges - 3), 0), 2) * disjoint)
    variance = 4 * (square - (pairs * pair) ** 2)
    return float(edges + 2 * pairs * pair), max(float(variance), 1e-12) ** 0.5
