"""The certificate for a named set of inputs, against loops over all floors and on cases with known answers."""

from itertools import combinations

import pytest
import torch

from lightning_graphon.graphon import StepGraphon, common_neighbour_count, covered_order, rectangle_certificate


def by_loops(graphon: StepGraphon, inputs: list[int], units: int, size: int) -> float:
    best = 0.0
    for p in graphon.values.flatten().tolist():
        measure = sum(
            float(graphon.row_measure[u])
            for u in range(graphon.shape[0])
            if all(float(graphon.values[u, j]) >= p for j in inputs)
        )
        best = max(best, measure * units * p**size)
    return best


@pytest.mark.parametrize("seed", range(5))
def test_against_loops(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    values = torch.rand(6, 5, generator=source, dtype=torch.float64)
    graphon = StepGraphon(values, torch.rand(6, generator=source, dtype=torch.float64).softmax(0))
    for inputs in ([0], [1, 3], [0, 2, 4], [0, 1, 2, 3, 4]):
        found = rectangle_certificate(graphon, inputs, units=40, needed=3.0)
        assert found.units == pytest.approx(by_loops(graphon, inputs, 40, len(inputs)))
        assert found.units == pytest.approx(found.measure * 40 * found.floor ** len(inputs))
        orders = [k for k in range(1, len(inputs) + 1) if by_loops(graphon, inputs, 40, k) >= 3.0]
        assert found.order == max(orders, default=0)


def test_it_is_a_lower_bound_of_the_expected_number() -> None:
    graphon = StepGraphon(torch.rand(8, 8, generator=torch.Generator().manual_seed(1)))
    for inputs in combinations(range(8), 3):
        assert rectangle_certificate(graphon, inputs, units=50).units <= common_neighbour_count(graphon, inputs, 50)


def test_a_constant_graphon() -> None:
    """n pᵏ: 1000 · 0.1³ = 1 certifies three inputs of five."""
    found = rectangle_certificate(StepGraphon([[0.1] * 5]), range(5), units=1000)
    assert found.units == pytest.approx(0.01)
    assert (found.floor, found.measure, found.order) == (0.1, 1.0, 3)


def test_one_set_may_be_certified_though_not_all_are_covered() -> None:
    """Two groups of inputs, each with units of its own: no unit joins the groups."""
    graphon = StepGraphon([[0.9, 0.9, 0.9, 0.0], [0.0, 0.0, 0.0, 0.9]])
    assert rectangle_certificate(graphon, [0, 1, 2], units=100).order == 3
    assert covered_order(graphon, units=100).upper == 1
    assert rectangle_certificate(graphon, [2, 3], units=100) == rectangle_certificate(graphon, [0, 3], units=100)
    assert rectangle_certificate(graphon, [2, 3], units=100).order == 0


def test_a_mask_counts_units() -> None:
    mask = (torch.rand(60, 10, generator=torch.Generator().manual_seed(2)) < 0.5).int()
    found = rectangle_certificate(mask, [1, 4, 7])
    assert found.units == pytest.approx(common_neighbour_count(mask, [1, 4, 7]))
    assert found.floor == 1.0
    assert found.order == 3
    mask[:, 4] = 0
    assert rectangle_certificate(mask, [1, 4, 7]).order == 0


def test_it_grows_with_the_width_or_not() -> None:
    """At the same graphon it is proportional to n; at densities like 1 / n it vanishes for two inputs."""
    same = [rectangle_certificate(StepGraphon([[0.2, 0.3]]), [0, 1], units=n).units for n in (100, 400)]
    assert same[1] == pytest.approx(4 * same[0])
    sparse = [rectangle_certificate(StepGraphon([[10 / n] * 2]), [0, 1], units=n).units for n in (100, 400)]
    assert sparse[1] == pytest.approx(sparse[0] / 4)


def test_arguments() -> None:
    graphon = StepGraphon([[0.5, 0.5]])
    with pytest.raises(ValueError, match="inputs is empty"):
        rectangle_certificate(graphon, [], units=3)
    with pytest.raises(ValueError, match="different"):
        rectangle_certificate(graphon, [0, 0], units=3)
    with pytest.raises(IndexError):
        rectangle_certificate(graphon, [2], units=3)
    with pytest.raises(ValueError, match="units"):
        rectangle_certificate(graphon, [0])
