"""Values at a density: exact for any parameters, with the gradient of the implicit function."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from lightning_graphon.graphon import StepGraphon, values_at_density


def draw(rows, cols, scale=1.0, seed=0):
    return scale * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60)
@given(density=st.floats(0.001, 0.999), scale=st.sampled_from([0.0, 0.1, 3.0, 30.0, 300.0]), seed=st.integers(0, 99))
def test_the_density_is_exact_and_values_are_probabilities(density, scale, seed):
    values = values_at_density(draw(5, 7, scale, seed), density)
    assert bool(((values >= 0) & (values <= 1)).all())
    # What is left after the Newton step is the rounding of 35 terms.
    assert StepGraphon(values).density == pytest.approx(density, abs=1e-13)


def test_measures_weigh_the_cells():
    rows, cols = torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    values = values_at_density(draw(2, 3), 0.3, rows, cols)
    assert StepGraphon(values, rows, cols).density == pytest.approx(0.3, abs=1e-14)
    assert float(values.mean()) != pytest.approx(0.3, abs=1e-3)


def test_the_shift_is_that_of_a_root_finder():
    a = draw(4, 6, 2.0).numpy()
    tau = brentq(lambda t: (1 / (1 + torch.exp(-torch.tensor(a + t)))).mean().item() - 0.2, -20, 20, xtol=1e-14)
    torch.testing.assert_close(values_at_density(torch.tensor(a), 0.2), torch.sigmoid(torch.tensor(a + tau)))


def test_the_gradient_is_that_of_finite_differences():
    a = draw(3, 4).requires_grad_()
    rows = torch.tensor([0.5, 0.3, 0.2])
    assert torch.autograd.gradcheck(lambda t: values_at_density(t, 0.15, rows), (a,))


def test_the_order_of_the_parameters_is_that_of_the_values_and_a_dense_layer_stays_dense():
    a = draw(3, 4)
    assert torch.equal(values_at_density(a, 0.4).flatten().argsort(), a.flatten().argsort())
    assert torch.equal(values_at_density(a, 1.0), torch.ones(3, 4).double())


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_densities(density):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        values_at_density(draw(2, 2), density)


def test_parameters_that_are_not_finite():
    with pytest.raises(ValueError, match="log_odds must be finite"):
        values_at_density(torch.tensor([[0.0, float("nan")]]), 0.5)
