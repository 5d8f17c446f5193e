"""Scales times noise: thresholds and probabilities against enumeration and against draws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_graphon.graphon import ScaledSaliency, estimate_graphon, l2_distance
from lightning_graphon.graphon.limits.scaled_saliency import RESOLUTION, common_threshold, quantiles


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_enumeration(scales, noise, threshold):
    """Share of the noise that passes, entry by entry."""
    shares = [[sum(float(s * x) > threshold for x in noise) / len(noise) for s in row] for row in scales]
    return torch.tensor(shares, dtype=torch.float64)


@pytest.mark.parametrize("threshold", [-0.7, 0.0, 0.3, 5.0])
def test_probabilities_are_those_of_enumeration_for_any_sign(threshold):
    scales, noise = draw(0, 5, 4).abs(), draw(1, 37)
    scales[2, 1] = 0.0  # a score that is zero whatever the noise
    expected = by_enumeration(scales, noise, threshold)
    assert torch.equal(ScaledSaliency(scales, noise).probabilities(threshold), expected)


@settings(max_examples=60)
@given(density=st.floats(0, 1), seed=st.integers(0, 10_000), exponent=st.integers(-250, 250), signed=st.booleans())
def test_any_density_is_met_at_any_scale_and_sign(density, seed, exponent, signed):
    noise = draw(seed, 50)
    S = ScaledSaliency(draw(seed + 1, 7, 6).abs() * 10.0**exponent, noise if signed else noise.abs())
    # At a threshold that separates all scores the jump is one of 50 · 42 scores, far above the resolution.
    assert float(S.probabilities(S.threshold(density)).mean()) == pytest.approx(density, abs=1e-9)


def test_equal_scores_are_kept_evenly():
    everything_equal = ScaledSaliency(torch.ones(4, 5), torch.ones(1))
    assert torch.allclose(everything_equal.graphon(density=0.3).values, torch.tensor(0.3).double())
    half_dead = ScaledSaliency(torch.tensor([[1.0], [0.0]]), torch.ones(1))
    # The live half stays; of the scores that are zero one in two.
    assert half_dead.graphon(density=0.75, order="none").values.flatten().tolist() == pytest.approx([1.0, 0.5])


def test_all_scores_zero_is_no_nan():
    W = ScaledSaliency(torch.zeros(3, 3), torch.zeros(1)).graphon(density=0.2)
    assert torch.allclose(W.values, torch.tensor(0.2).double())


def test_graphon_is_the_limit_of_masks_that_are_really_drawn():
    a, b = torch.linspace(0.2, 3, 400).double(), torch.linspace(2, 0.1, 300).double()
    S = ScaledSaliency(a[:, None] * b, draw(2, 100_000).abs())
    scores = S.scales * draw(3, 400, 300).abs()
    keep = round(0.15 * scores.numel())
    mask = scores >= scores.flatten().topk(keep).values[-1]
    # 8 by 8 bins of 1875 entries: standard errors of at most 0.0115.
    assert l2_distance(S.graphon(density=0.15, bins=8), estimate_graphon(mask, 8)) < 0.0115


def test_one_threshold_for_several_layers_is_that_of_all_scores_together():
    layers = [
        ScaledSaliency(torch.ones(30, 20), draw(4, 600).abs()),
        ScaledSaliency(torch.ones(10, 10), draw(5, 99).abs() * 3),
    ]
    cut = common_threshold(layers, 0.25)
    kept = sum(float(layer.probabilities(cut).sum()) for layer in layers)
    assert kept / 700 == pytest.approx(0.25, abs=1 / RESOLUTION)
    assert float(layers[1].probabilities(cut).mean()) > 2 * float(layers[0].probabilities(cut).mean())


def test_the_two_sides_are_snips_gradient():
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5, bias=False)
    x, direction = draw(6, 9, 6), draw(7, 9, 5)
    (layer.double()(x) * direction).sum().backward()
    S = ScaledSaliency.from_gradient_factors(direction, x, layer.weight)
    torch.testing.assert_close(S.scales, layer.weight.grad.abs())
    one = ScaledSaliency.from_gradient_factors(direction[:1], x[:1], layer.weight)
    assert torch.linalg.matrix_rank(one.scales) == 1


def test_taps_are_averaged_and_order_none_keeps_units():
    S = ScaledSaliency(draw(8, 4, 3, 2, 2).abs(), draw(9, 500).abs())
    p = S.probabilities(0.8)
    assert p.shape == S.shape
    W = S.graphon(threshold=0.8, bins=(4, 3), order="none")
    torch.testing.assert_close(W.values, p.mean((2, 3)))
    assert W.std_error is None


def test_quantiles_keep_small_samples_and_thin_large_ones():
    assert torch.equal(quantiles(torch.tensor([3.0, 1.0, 2.0])), torch.tensor([1.0, 2.0, 3.0]))
    large = quantiles(torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert len(large) == RESOLUTION
    # Of 100,000 uniform numbers the distribution function is certain to 1.63 / sqrt(100,000) at the 1 % level.
    assert float((large - (torch.arange(RESOLUTION) + 0.5) / RESOLUTION).abs().max()) < 1.63 / math.sqrt(100_000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScaledSaliency(-torch.ones(2, 2), torch.ones(1)), "scales must not be negative, got -1.0"),
        (lambda: ScaledSaliency(torch.ones(2), torch.ones(1)), "scales must have at least 2 axes"),
        (lambda: ScaledSaliency(torch.full((2, 2), torch.nan), torch.ones(1)), "4 of 4 that are not"),
        (lambda: ScaledSaliency(torch.ones(2, 2), torch.ones(0)), "noise must have at least 1 axes"),
        (lambda: ScaledSaliency(torch.ones(2, 2), torch.ones(1)).graphon(), "one of density and threshold"),
        (lambda: ScaledSaliency(torch.ones(2, 2), torch.ones(1)).graphon(density=1.2), "must lie in"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_score_at_the_threshold_is_not_above_it():
    assert ScaledSaliency(torch.ones(1, 1), torch.arange(1.0, 5.0)).probabilities(2.0).item() == 0.5
