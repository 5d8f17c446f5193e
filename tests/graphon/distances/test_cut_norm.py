import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_graphon.graphon.distances.cut_norm import _border, _dual, _low_rank, _spectral, cut_norm


def enumerate_both(values, rows, cols):
    """Cut norm by all pairs of subsets: no trick at all."""
    mass = rows[:, None] * values * cols
    sets = [np.array(list(itertools.product([0, 1], repeat=n))) for n in mass.shape]
    return np.abs(sets[0] @ mass @ sets[1].T).max()


def enumerate_rows(values):
    """Cut norm by all row subsets; the best columns of each are those of one sign."""
    mass = values / values.size
    sets = np.array(list(itertools.product([0, 1], repeat=mass.shape[0])))
    sums = sets @ mass
    return max(np.maximum(sums, 0).sum(1).max(), np.maximum(-sums, 0).sum(1).max())


def draw(rows, cols, seed, kind):
    rng = np.random.default_rng(seed)
    values = {
        "gauss": lambda: rng.standard_normal((rows, cols)),
        "signs": lambda: rng.choice([-1.0, 1.0], (rows, cols)),
        "positive": lambda: rng.random((rows, cols)),
        "sparse": lambda: rng.standard_normal((rows, cols)) * (rng.random((rows, cols)) < 0.2),
        "rank one": lambda: np.outer(rng.standard_normal(rows), rng.standard_normal(cols)),
    }[kind]()
    measures = [rng.random(n) + 0.01 for n in (rows, cols)]
    return values, *[m / m.sum() for m in measures]


KINDS = ["gauss", "signs", "positive", "sparse", "rank one"]


@settings(max_examples=150)
@given(rows=st.integers(1, 6), cols=st.integers(1, 6), seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS))
def test_the_bracket_holds_the_enumerated_norm(rows, cols, seed, kind):
    values, r, c = draw(rows, cols, seed, kind)
    truth = enumerate_both(values, r, c)
    tensors = [torch.from_numpy(x) for x in (values, r, c)]
    exact, bracket = cut_norm(*tensors), cut_norm(*tensors, exact_side=0)
    assert exact.exact
    assert exact.lower == pytest.approx(truth, rel=1e-12, abs=1e-15)  # the same sums in another order
    assert not bracket.exact
    assert bracket.lower <= truth * (1 + 1e-12) + 1e-15
    assert bracket.upper >= truth * (1 - 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_upper_bound_holds_even_when_the_solver_has_hardly_begun(kind):
    for seed in range(10):
        values, r, c = draw(8, 9, seed, kind)
        tensors = [torch.from_numpy(x) for x in (values, r, c)]
        bracket = cut_norm(*tensors, exact_side=0, iterations=1, restarts=1)
        assert bracket.lower <= enumerate_both(values, r, c) + 1e-15
        assert bracket.upper >= enumerate_both(values, r, c) * (1 - 1e-12)


@pytest.mark.parametrize(("rows", "cols"), [(14, 40), (40, 14)])
def test_search_finds_the_optimum_of_middling_matrices(rows, cols):
    missed = 0
    for seed in range(10):
        values = np.random.default_rng(seed).standard_normal((rows, cols))
        truth = enumerate_rows(values if rows < cols else values.T)
        found = cut_norm(torch.from_numpy(values), exact_side=0)
        assert found.lower <= truth + 1e-12
        assert truth <= found.upper
        missed += found.lower < truth * (1 - 1e-9)
    assert missed == 0  # measured: none of 100 random 10 x 14 with unequal measures


@pytest.mark.parametrize("kind", KINDS)
def test_each_upper_bound_holds_by_itself(kind):
    for seed in range(10):
        values, r, c = draw(5, 6, seed, kind)
        truth = enumerate_both(values, r, c)
        values, r, c = (torch.from_numpy(x) for x in (values, r, c))
        mass = r[:, None] * values * c
        bordered = _border(mass)
        solution = _low_rank(bordered, 20, torch.Generator().manual_seed(0))
        assert _spectral(mass, r, c) >= truth * (1 - 1e-12)
        assert _dual(bordered, *solution) >= truth * (1 - 1e-12)


def test_the_spectral_bound_is_tight_for_a_constant_with_unequal_measures():
    _, r, c = (torch.from_numpy(x) for x in draw(5, 6, 0, "gauss"))
    assert _spectral(r[:, None] * 0.3 * c, r, c) == pytest.approx(0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_tightness_at_64(kind):
    # largest ratio measured over 20 seeds with these unequal measures: 1.16; Krivine's constant is 1.783
    for seed in range(3):
        values, r, c = draw(64, 64, seed, kind)
        bracket = cut_norm(*[torch.from_numpy(x) for x in (values, r, c)])
        assert not bracket.exact
        assert bracket.upper / bracket.lower < 1.2


@pytest.mark.parametrize("side", [4, 40])
def test_the_witness_attains_the_lower_bound(side):
    values, r, c = draw(side, side + 1, 0, "gauss")
    found = cut_norm(*[torch.from_numpy(x) for x in (values, r, c)])
    attained = abs(((r * found.rows.numpy())[:, None] * values * c * found.cols.numpy()).sum())
    assert attained == pytest.approx(found.lower, rel=1e-12)


def test_known_norms():
    assert cut_norm(torch.full((3, 70), -0.2)).lower == pytest.approx(0.2)  # a constant: everything
    assert cut_norm(torch.zeros(70, 70)).upper == 0
    # u(x) v(y) of mean zero: half of ∫|u| times half of ∫|v|
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    found = cut_norm(signs[:, None] * signs)
    assert found.lower == pytest.approx(0.25)
    assert found.upper == pytest.approx(0.25)


def test_scaling_signs_and_transposition():
    values, r, c = [torch.from_numpy(x) for x in draw(20, 30, 1, "gauss")]
    base = cut_norm(values, r, c)
    for other in (cut_norm(-values, r, c), cut_norm(values.T, c, r)):
        assert other.lower == pytest.approx(base.lower, rel=1e-9)
    assert cut_norm(100 * values, r, c).lower == pytest.approx(100 * base.lower, rel=1e-9)


def test_repeatable_and_the_global_random_state_is_untouched():
    values, state = torch.randn(30, 30, generator=torch.Generator().manual_seed(0)), torch.get_rng_state()
    first, second = cut_norm(values, seed=5), cut_norm(values, seed=5)
    assert (first.lower, first.upper) == (second.lower, second.upper)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("values", [torch.ones(3), torch.ones(0, 3), torch.full((2, 2), float("nan"))])
def test_refuses_what_is_no_finite_matrix(values):
    with pytest.raises(ValueError, match="finite matrix"):
        cut_norm(values)
