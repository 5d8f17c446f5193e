import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_graphon.graphon import StepGraphon, as_graphon, block, constant, power_law, product


@settings(max_examples=100)
@given(density=st.floats(0, 1), shape=st.floats(0, 0.95), bins=st.integers(1, 40))
def test_density_is_exact(density, shape, bins):
    for graphon in (power_law(density, shape, bins), product(density, 4 * shape, bins), constant(density)):
        assert graphon.density == pytest.approx(density, abs=1e-12)
        assert graphon.values.min() >= 0
        assert graphon.values.max() <= 1


@settings(max_examples=50)
@given(density=st.floats(0, 1), seed=st.integers(0, 1000))
def test_block_scales_any_positive_shape(density, seed):
    rng = np.random.default_rng(seed)
    shape, rows = rng.random((3, 4)) + 1e-3, rng.random(3) + 0.1
    graphon = block(shape, density, rows / rows.sum())
    assert graphon.density == pytest.approx(density, abs=1e-12)
    free = graphon.values < 1 - 1e-9  # cells that are not capped keep the shape
    ratio = graphon.values[free] / torch.from_numpy(shape)[free]
    assert ratio.numel() == 0 or ratio.max() - ratio.min() < 1e-9


def test_cells_are_exact_averages_of_the_shape():
    x = (np.arange(300_000) + 0.5) / 300_000
    profile = (1 - x).reshape(3, -1) ** 2
    expected = profile.mean(1)
    graphon = product(0.05, power=2.0, bins=3)  # low enough that nothing is capped
    shape = np.outer(expected, expected)
    np.testing.assert_allclose(graphon.values, 0.05 * shape / shape.mean(), rtol=1e-6)


def test_families_descend_and_are_uneven():
    for graphon in (product(0.1), power_law(0.1)):
        assert (graphon.row_degree.diff() <= 0).all()
        assert graphon.row_degree[0] > 2 * graphon.row_degree[-1]


def test_a_shape_with_holes_has_a_largest_density():
    assert block([[1.0, 0.0]], 0.5).values.tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match=r"density 0.6 does not fit.*area of 0.5"):
        block([[1.0, 0.0]], 0.6)


def test_as_graphon_reads_everything_a_user_may_write():
    graphon = StepGraphon([[0.1, 0.2]])
    assert as_graphon(graphon) is graphon
    assert as_graphon([[0.1, 0.2]]) == graphon
    assert as_graphon(np.array([[0.1, 0.2]])) == graphon
    assert as_graphon(torch.tensor([[0.1, 0.2]], dtype=torch.float64)) == graphon
    assert as_graphon(0.25) == constant(0.25)
    spec = {"family": "power-law", "exponent": 0.4, "density": 0.1}
    assert as_graphon(spec) == power_law(0.1, 0.4)
    assert spec["family"] == "power-law"  # not changed
    assert as_graphon("power-law(exponent=0.4, density=0.1, bins=64)") == power_law(0.1, 0.4)
    assert as_graphon({"family": "block", "values": [[0.1, 0.2]]}) == graphon


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("powerlaw(density=0.1)", ValueError, "Did you mean 'power-law'"),
        ({"family": "product", "density": 0.1, "pwer": 2}, ValueError, "Did you mean 'power'"),
        ({"family": "product"}, ValueError, "needs density"),
        ({"density": 0.1}, ValueError, "needs the key 'family'"),
        ("constant(density=much)", ValueError, "cannot read 'density=much'"),
        ("constant(density=1.5)", ValueError, r"\[0, 1\], got 1.5"),
        ("product(density=0.1, power=-1)", ValueError, "power must be"),
        ("power-law(density=0.1, exponent=1)", ValueError, r"exponent must lie in \[0, 1\)"),
        ("product(density=0.1, bins=0)", ValueError, "bins must be at least 1"),
        (object(), TypeError, "cannot read a graphon from object"),
        (True, TypeError, "cannot read a graphon from bool"),
    ],
)
def test_refuses_with_the_nearest_word(spec, error, message):
    with pytest.raises(error, match=message):
        as_graphon(spec)
