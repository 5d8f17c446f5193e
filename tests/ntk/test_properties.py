"""Properties of predictors and spectra over kernels of any rank and any optimizer, drawn by hypothesis."""

import warnings

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_graphon.dynamics import LossDecayPredictor
from lightning_graphon.ntk import spectral_summary

SEEDS = st.integers(0, 10**6)


def problem(seed, samples, outputs, rank):
    """A model linear in its parameters, f = θ Jᵀ, with its kernel J Jᵀ of the given rank; all float64."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, rank, generator=g, dtype=torch.float64)
    theta = torch.randn(outputs, rank, generator=g, dtype=torch.float64)
    targets = torch.randn(samples, outputs, generator=g, dtype=torch.float64)
    return features, theta, targets


@settings(max_examples=40)
@given(
    seed=SEEDS,
    samples=st.integers(1, 6),
    outputs=st.integers(1, 3),
    rank=st.integers(0, 8),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    nesterov=st.booleans(),
    rates=st.lists(st.floats(0.0, 0.02), min_size=1, max_size=8),
    loss=st.sampled_from([F.mse_loss, F.smooth_l1_loss]),
)
def test_the_prediction_is_what_sgd_does_to_a_linear_model(
    seed, samples, outputs, rank, momentum, nesterov, rates, loss
):
    features, theta, targets = problem(seed, samples, outputs, rank)
    nesterov = nesterov and momentum > 0
    predictor = LossDecayPredictor(
        features @ features.T, features @ theta.T, targets, loss, momentum=momentum, nesterov=nesterov
    )
    weight = theta.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum, nesterov=nesterov)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss(features @ weight.T, targets).backward()
        optimizer.step()
        predictor.step(rate)
    trained = (features @ weight.T).detach()
    # Rounding of at most eight steps in float64, of numbers of order one to ten.
    torch.testing.assert_close(predictor.outputs, trained, rtol=1e-9, atol=1e-9)
    assert predictor.loss == float(loss(predictor.outputs, targets))


@settings(max_examples=40)
@given(seed=SEEDS, samples=st.integers(1, 6), rank=st.integers(1, 8), share=st.floats(0.01, 0.99))
def test_below_the_largest_stable_rate_the_squared_error_never_rises(seed, samples, rank, share):
    features, theta, targets = problem(seed, samples, 2, rank)
    predictor = LossDecayPredictor(features @ features.T, features @ theta.T, targets, F.mse_loss)
    rate = share * predictor.max_learning_rate()
    losses = predictor.run([rate] * 20)
    # A loss that has settled moves by its rounding.
    assert bool((losses[1:] <= losses[:-1] * (1 + 1e-12) + 1e-15).all())


@settings(max_examples=20)
@given(seed=SEEDS, before=st.integers(0, 4), momentum=st.sampled_from([0.0, 0.9]))
def test_a_restored_predictor_goes_on_as_if_nothing_had_happened(seed, before, momentum):
    features, theta, targets = problem(seed, 4, 2, 3)

    def fresh():
        kernel, outputs = features @ features.T, features @ theta.T
        return LossDecayPredictor(kernel, outputs, targets, F.mse_loss, momentum=momentum)

    first, second = fresh(), fresh()
    first.run([0.01] * before)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.run([0.02] * 3), second.run([0.02] * 3))


@settings(max_examples=40)
@given(seed=SEEDS, size=st.integers(2, 9), rank=st.integers(1, 9), scale=st.floats(1e-6, 1e6))
def test_a_spectrum_is_ordered_complete_and_knows_its_scale(seed, size, rank, scale):
    features = problem(seed, size, 1, rank)[0]
    kernel = features @ features.T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel of rank one has few eigenvalues to fit a power law to
        one, other = spectral_summary(kernel), spectral_summary(scale * kernel)
    values = one.eigenvalues
    assert bool((values[:-1] >= values[1:]).all())
    assert one.trace == torch.trace(kernel).item() or abs(one.trace / torch.trace(kernel).item() - 1) < 1e-12
    assert 1 - 1e-12 <= one.effective_rank <= min(size, rank) * (1 + 1e-9)
    assert 0 < one.energy_concentration <= 1 + 1e-12
    torch.testing.assert_close(other.eigenvalues, scale * values, rtol=1e-9, atol=1e-12 * scale * float(values[0]))
    assert abs(other.effective_rank / one.effective_rank - 1) < 1e-9
