"""Properties that every graphon of every mask has, drawn by hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_graphon.graphon import StepGraphon, l2_distance, layer_graphons, motif_densities

SHAPES = st.sampled_from([(1, 1), (1, 9), (7, 1), (5, 3), (16, 12), (4, 3, 3), (6, 2, 3, 3), (9, 4, 2, 2, 2)])


def mask_of(shape, density, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@settings(max_examples=60)
@given(shape=SHAPES, density=st.floats(0.0, 1.0), seed=st.integers(0, 10**6), bins=st.integers(1, 20))
@pytest.mark.parametrize("order", ["degree", "none"])
def test_measure_density_and_shape(order, shape, density, seed, bins):
    mask = mask_of(shape, density, seed)
    graphon = layer_graphons({"w": mask}, bins=bins, order=order)["w"]
    assert graphon.shape == (min(bins, shape[0]), min(bins, shape[1] if len(shape) > 1 else 1))
    assert bool(((graphon.values >= 0) & (graphon.values <= 1)).all())
    assert float(graphon.row_measure.sum()) == pytest.approx(1, abs=1e-12)
    assert graphon.density == pytest.approx(float(mask.double().mean()), abs=1e-12)


@settings(max_examples=40)
@given(density=st.floats(0.0, 1.0), seed=st.integers(0, 10**6), bins=st.integers(1, 12))
def test_relabelling_units_changes_no_graphon_of_sorted_degrees(density, seed, bins):
    mask = mask_of((11, 7), density, seed)
    g = torch.Generator().manual_seed(seed + 1)
    relabelled = mask[torch.randperm(11, generator=g)][:, torch.randperm(7, generator=g)]
    one, other = (layer_graphons({"w": m}, bins=bins)["w"] for m in (mask, relabelled))
    torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 5), min_size=6, max_size=6))
def test_l2_is_a_distance(seed, sizes):
    g = torch.Generator().manual_seed(seed)
    pairs = zip(sizes[::2], sizes[1::2], strict=True)
    a, b, c = (StepGraphon(torch.rand(m, n, generator=g, dtype=torch.float64)) for m, n in pairs)

    def d(x, y):
        return l2_distance(x, y, align=False)

    assert d(a, a) == 0
    assert d(a, b) == pytest.approx(d(b, a), abs=1e-12)
    assert d(a, c) <= d(a, b) + d(b, c) + 1e-12
    assert abs(a.density - b.density) <= d(a, b) + 1e-12  # Cauchy-Schwarz


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), cols=st.integers(1, 6))
def test_cycles_and_cherries_are_at_least_those_of_a_constant(seed, rows, cols):
    """Sidorenko: t(C4) >= t(K2)^4 and t(cherry) >= t(K2)^2 for every graphon, with equality for constant ones."""
    values = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for graphon, equal in ((StepGraphon(values), False), (StepGraphon(torch.full_like(values, 0.3)), True)):
        m = motif_densities(graphon)
        assert m.c4 >= m.edge**4 - 1e-12
        if equal:
            assert m.c4 == pytest.approx(m.edge**4, abs=1e-12)
            assert m.row_degree_cv == pytest.approx(0, abs=1e-7)  # the root of a rounding error
