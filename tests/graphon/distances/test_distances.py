import builtins

import numpy as np
import pytest
import torch

from lightning_graphon.graphon import (
    StepGraphon,
    block,
    constant,
    cut_distance,
    estimate_graphon,
    l1_distance,
    l2_distance,
    power_law,
    product,
    transport_distance,
)
from lightning_graphon.graphon.distances.distances import _relabelling_lower


def random_graphon(rows, cols, seed):
    g = torch.Generator().manual_seed(seed)
    r, c = (torch.rand(n, generator=g, dtype=torch.float64) + 0.1 for n in (rows, cols))
    return StepGraphon(torch.rand(rows, cols, generator=g, dtype=torch.float64), r / r.sum(), c / c.sum())


def shuffled(graphon, seed=0):
    g = torch.Generator().manual_seed(seed)
    return graphon.reorder(torch.randperm(graphon.shape[0], generator=g), torch.randperm(graphon.shape[1], generator=g))


def test_known_distances_on_different_grids():
    a, b = StepGraphon([[0.5]]), StepGraphon([[0.9, 0.1], [0.1, 0.9]])
    assert l1_distance(a, b) == pytest.approx(0.4)
    assert l2_distance(a, b) == pytest.approx(0.4)
    found = cut_distance(a, b)
    assert found.exact
    assert found.lower == pytest.approx(0.1)  # one of the four blocks: 0.4 on a quarter
    thirds = StepGraphon([[0.2, 0.2, 0.5]])
    halves = StepGraphon([[0.2, 0.4]])
    # differences 0, 0.2 and 0.1 on lengths 1/2, 1/6 and 1/3
    assert l1_distance(thirds, halves, align=False) == pytest.approx(0.2 / 6 + 0.1 / 3)
    assert l2_distance(thirds, halves, align=False) == pytest.approx((0.04 / 6 + 0.01 / 3) ** 0.5)


@pytest.mark.parametrize("distance", [l1_distance, l2_distance, lambda a, b, **k: cut_distance(a, b, **k).upper])
def test_alignment_undoes_a_relabelling(distance):
    graphon = random_graphon(12, 9, 0)
    other = shuffled(graphon)
    assert distance(graphon, graphon) == 0
    assert distance(graphon, other, align=False) > 0.01
    assert distance(graphon, other) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_order_of_the_norms_and_the_floor(seed):
    a, b = random_graphon(7, 20, seed), random_graphon(19, 18, seed + 100)
    for align in (True, False):
        cut = cut_distance(a, b, align=align)
        assert cut.relabelling_lower <= cut.upper
        assert cut.lower <= cut.upper <= l1_distance(a, b, align=cut.alignment == "degree") + 1e-12
    l1, l2 = (d(a, b, align=False) for d in (l1_distance, l2_distance))
    assert cut.upper <= l1 + 1e-12 <= l2 + 2e-12


def test_no_relabelling_goes_below_the_floor():
    a, b = random_graphon(4, 4, 1), random_graphon(4, 4, 2)
    floor = _relabelling_lower(a, b)
    assert floor > 0.01
    for seed in range(50):
        assert cut_distance(a, shuffled(b, seed), align=False).upper >= floor


def test_the_floor_is_reached_where_only_one_side_is_uneven():
    # degrees 0.6 and 0.2 against 0.4: half the mean difference of 0.2, and the cut of the upper half
    for uneven in (StepGraphon([[0.6], [0.2]]), StepGraphon([[0.6, 0.2]])):
        found = cut_distance(uneven, constant(0.4))
        assert _relabelling_lower(uneven, constant(0.4)) == pytest.approx(0.1)
        assert found.relabelling_lower == pytest.approx(0.1)
        assert found.lower == pytest.approx(0.1)
    assert cut_distance(constant(0.3), constant(0.4)).relabelling_lower == pytest.approx(0.1)


def test_triangle_inequality_and_symmetry():
    a, b, c = (random_graphon(5, 6, seed) for seed in range(3))
    for distance in (l1_distance, l2_distance, lambda x, y, align: cut_distance(x, y, align=align).lower):
        ab, bc, ac = (distance(*pair, align=False) for pair in ((a, b), (b, c), (a, c)))
        assert ac <= ab + bc + 1e-12
        assert distance(b, a, align=False) == pytest.approx(ab)


def test_alignment_keeps_the_better_of_both():
    # equal degrees, so sorting does nothing; as given they are the same
    graphon = block([[0.8, 0.2], [0.2, 0.8]])
    assert cut_distance(graphon, graphon).upper == 0
    assert cut_distance(graphon, graphon).alignment == "given"
    a = product(0.2, bins=20)
    assert cut_distance(a, shuffled(a)).alignment == "degree"


def test_estimates_of_one_graphon_come_closer_with_size():
    truth = product(0.2)
    gaps = [
        cut_distance(estimate_graphon(truth.sample((side, side), seed=side)), truth).upper for side in (64, 256, 1024)
    ]
    assert gaps[0] > 1.5 * gaps[1] > 2.25 * gaps[2]  # expected factor 2 and more a step


# ---- co-optimal transport


def test_transport_sees_through_any_relabelling():
    pytest.importorskip("ot")
    graphon = power_law(0.2, 0.5, bins=12)
    assert transport_distance(graphon, shuffled(graphon)) == pytest.approx(0, abs=1e-6)
    # equal degrees: sorting cannot align these blocks, transport can
    a = block([[0.8, 0.2], [0.2, 0.8]]).coarsen(8, 8)
    assert transport_distance(a, shuffled(a, 3)) == pytest.approx(0, abs=1e-6)


def test_transport_is_between_zero_and_the_l2_distance():
    pytest.importorskip("ot")
    for seed in range(5):
        a, b = random_graphon(6, 7, seed), random_graphon(5, 9, seed + 50)
        assert 0 < transport_distance(a, b) <= l2_distance(a, b) + 1e-9


def test_transport_to_a_constant_is_the_l2_distance():
    pytest.importorskip("ot")  # every coupling with one cell is the independent one
    a, b = random_graphon(5, 6, 0), constant(0.4)
    values, weight = a.values.numpy(), np.outer(a.row_measure, a.col_measure)
    expected = np.sqrt((weight * (values - 0.4) ** 2).sum())
    assert transport_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_transport_names_the_extra_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "ot":
            raise ImportError("No module named 'ot'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"lightning-graphon\[transport\]"):
        transport_distance(constant(0.1), constant(0.2))
