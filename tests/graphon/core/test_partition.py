"""Intervals of [0, 1]."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_graphon.graphon.core.partition import edges, locate, overlap, refine, same_partition
from lightning_graphon.graphon.estimation.binning import bin_sizes


def measures(max_size=8):
    lengths = st.lists(st.integers(1, 50), min_size=1, max_size=max_size)
    return lengths.map(lambda n: torch.tensor(n, dtype=torch.float64) / sum(n))


@given(measures())
def test_edges_run_from_0_to_1(measure):
    found = edges(measure)
    assert found[0] == 0
    assert found[-1] == 1
    assert bool((found.diff() > 0).all())


def test_points_at_an_edge_lie_to_its_right_and_1_in_the_last_interval():
    assert locate(torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([0.25, 0.25, 0.5])).tolist() == [0, 1, 2, 2]


@given(measures(), measures())
def test_a_refinement_knows_both_partitions(a, b):
    measure, in_a, in_b = refine(a, b)
    assert float(measure.sum()) == pytest.approx(1, abs=1e-12)
    for whole, index in ((a, in_a), (b, in_b)):
        torch.testing.assert_close(torch.zeros_like(whole).index_add(0, index, measure), whole, rtol=0, atol=1e-9)
    assert len(measure) == len(torch.cat([edges(a), edges(b)]).round(decimals=9).unique()) - 1  # and is the coarsest


@given(measures(), measures())
def test_shares_of_new_intervals_in_old_ones(new, old):
    share = overlap(new, old)
    torch.testing.assert_close(share.sum(1), torch.ones_like(new))
    torch.testing.assert_close(new @ share, old, rtol=0, atol=1e-9)


def test_rounding_does_not_make_another_partition():
    single, double = (torch.full((3,), 1 / 3, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert same_partition(single, double)
    assert not same_partition(single, torch.tensor([0.3, 0.4, 0.3]))
    assert len(refine(single, double)[0]) == 3


def test_points_are_spread_evenly():
    assert bin_sizes(7, 3, torch.device("cpu")).tolist() == pytest.approx([3, 2, 2])
