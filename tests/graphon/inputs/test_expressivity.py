"""Expressivity of a first layer against enumeration of all sets of inputs."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_graphon.graphon import (
    StepGraphon,
    active_inputs,
    common_neighbour_count,
    covered_order,
    dead_units,
    effective_inputs,
    expressivity_table,
    mean_common_neighbour_count,
)


def mask_of(seed: int, rows: int, cols: int, density: float) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density


def sets(mask: torch.Tensor, size: int) -> list[tuple[int, ...]]:
    return list(combinations(mask.any(0).nonzero().squeeze(1).tolist(), size))


def count(mask: torch.Tensor, inputs: tuple[int, ...]) -> int:
    return sum(all(bool(row[j]) for j in inputs) for row in mask)


def largest_covered(number_of, active: list[int]) -> int:
    covered = [k for k in range(1, len(active) + 1) if all(number_of(s) >= 1 - 1e-9 for s in combinations(active, k))]
    return max(covered, default=0)


masks = st.builds(mask_of, st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 7), st.floats(0.05, 1.0))


@settings(max_examples=80)
@given(mask=masks, size=st.integers(1, 4))
def test_counts_are_those_of_enumeration(mask, size):
    chosen = sets(mask, size)
    found = [common_neighbour_count(mask, s) for s in chosen]
    assert found == pytest.approx([count(mask, s) for s in chosen], abs=1e-9)
    assert mean_common_neighbour_count(mask, size) == pytest.approx(np.mean(found) if found else 0.0, abs=1e-9)


@settings(max_examples=80)
@given(mask=masks)
def test_the_covered_order_is_bracketed_and_its_witness_is_not_covered(mask):
    order = covered_order(mask)
    active = mask.any(0).nonzero().squeeze(1).tolist()
    exact = largest_covered(lambda s: count(mask, s), active)
    assert order.lower <= exact <= order.upper
    if order.upper < len(active):
        assert len(order.witness) == order.upper + 1
        assert set(order.witness) <= set(active)
        assert count(mask, order.witness) == 0
    else:
        assert order.witness == ()


def test_the_bracket_is_exact_for_most_small_masks():
    orders = [covered_order(mask_of(seed, 12, 6, density)) for seed in range(20) for density in (0.3, 0.6, 0.9)]
    assert sum(o.lower == o.upper for o in orders) >= 50  # measured 56 of 60


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), units=st.integers(1, 200), size=st.integers(1, 3))
def test_a_graphon_gives_expectations(seed, units, size):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    values[:, 2] = 0.0
    measure = torch.rand(4, generator=generator, dtype=torch.float64) + 0.1
    W = StepGraphon(values, measure / measure.sum())
    expected = {
        s: units * float((W.row_measure * values[:, list(s)].prod(1)).sum()) for s in combinations((0, 1, 3, 4), size)
    }
    for s, number in expected.items():
        assert common_neighbour_count(W, s, units) == pytest.approx(number, rel=1e-12)
    assert mean_common_neighbour_count(W, size, units) == pytest.approx(np.mean(list(expected.values())), rel=1e-9)
    assert active_inputs(W).tolist() == [True, True, False, True, True]
    order = covered_order(W, units)
    exact = largest_covered(lambda s: common_neighbour_count(W, s, units), [0, 1, 3, 4])
    assert order.lower <= exact <= order.upper
    assert not order.witness or common_neighbour_count(W, order.witness, units) < 1


def test_the_expectation_is_the_mean_over_masks_that_are_drawn():
    W = StepGraphon([[0.9, 0.4, 0.2], [0.3, 0.6, 0.1]])
    drawn = [common_neighbour_count(W.sample((500, 3), seed=seed), [0, 1]) for seed in range(50)]
    # A sum of 500 Bernoulli draws, 50 times: standard error of the mean at most sqrt(500 / 4 / 50) = 1.6.
    assert np.mean(drawn) == pytest.approx(common_neighbour_count(W, [0, 1], 500), abs=3 * 1.6)


def test_a_factorised_graphon_is_covered_as_its_least_connected_inputs_are():
    rows, cols = torch.linspace(0.2, 1, 40).double(), torch.linspace(0.5, 1, 30).double()
    W = StepGraphon(torch.outer(rows, cols))
    order = covered_order(W, 1000)
    # W(u, ·) rises with the input for every u, so the k smallest values are those of the same k inputs: exact.
    assert order.lower == order.upper
    assert order.witness == tuple(range(order.upper + 1))
    assert common_neighbour_count(W, order.witness, 1000) < 1 <= common_neighbour_count(W, order.witness[:-1], 1000)


def test_full_and_empty_layers():
    full, empty = torch.ones(3, 4).bool(), torch.zeros(3, 4).bool()
    assert (covered_order(full).lower, covered_order(full).upper, covered_order(full).witness) == (4, 4, ())
    assert (covered_order(empty).upper, effective_inputs(empty), mean_common_neighbour_count(empty, 1)) == (0, 0.0, 0.0)
    assert bool(dead_units(empty).all())
    assert dead_units(mask_of(3, 6, 2, 0.4)).tolist() == [not row.any() for row in mask_of(3, 6, 2, 0.4)]
    assert common_neighbour_count(empty, []) == 3  # of no input at all every unit is joined to everything
    assert mean_common_neighbour_count(full, 5) == 0.0


def test_large_sets_do_not_overflow():
    mask = mask_of(0, 20, 2000, 0.9)
    assert 0 < mean_common_neighbour_count(mask, 500) < 1e-15
    assert mean_common_neighbour_count(torch.ones(7, 2000), 1000) == pytest.approx(7, rel=1e-9)
    assert mean_common_neighbour_count(StepGraphon([[1.0] * 300]), 150, units=7) == pytest.approx(7, rel=1e-9)


def test_the_table_has_a_row_for_each_mask_and_taps_are_inputs():
    rows = expressivity_table({"a": mask_of(1, 8, 6, 0.3), "conv": torch.ones(4, 1, 3, 3).bool()}, sizes=(1, 2))
    assert [row["layer"] for row in rows] == ["a", "conv"]
    assert rows[1] == {
        "layer": "conv",
        "density": 1.0,
        "active_inputs": 9,
        "cut_off_inputs": 0,
        "effective_inputs": pytest.approx(9),
        "dead_units": 0,
        "covered_lower": 9,
        "covered_upper": 9,
        "joined_1": pytest.approx(4),
        "joined_2": pytest.approx(4),
    }
    assert rows[0]["active_inputs"] + rows[0]["cut_off_inputs"] == 6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: common_neighbour_count(torch.ones(2, 3), [0, 3]), IndexError, "input 3 is not one of the 3 inputs"),
        (lambda: common_neighbour_count(torch.ones(2, 3), [1, 1]), ValueError, "different columns"),
        (
            lambda: common_neighbour_count(torch.ones(2, 3), [1], units=5),
            ValueError,
            "the mask has 2 hidden units, got units=5",
        ),
        (lambda: common_neighbour_count(StepGraphon([[0.5]]), [0]), ValueError, "needs the number of hidden units"),
        (lambda: mean_common_neighbour_count(torch.ones(2, 3), 0), ValueError, "must be at least 1, got 0"),
        (lambda: active_inputs(torch.ones(3)), ValueError, r"\[out, in\] with no empty axis"),
        (lambda: covered_order(torch.full((2, 2), 0.5)), ValueError, "entries 0 and 1 only"),
    ],
)
def test_what_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
