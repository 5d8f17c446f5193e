"""Bands, where curves part, batches of a pool, and the power law."""

import math

import pytest
import torch
from torch import nan, tensor

from lightning_graphon.dynamics import PoolBatches, PredictedLoss, first_outside, lazy_until, power_law


def predicted(*rows, steps=(0, 5, 10)):
    return PredictedLoss("rehearsal", tensor(steps), tensor(rows))


def test_band():
    lower, upper = predicted([2.0, 1.0, -1.0], [3.0, 1.0, -2.0]).band(0.1)
    torch.testing.assert_close(lower, tensor([1.8, 0.9, -2.2]).double())
    torch.testing.assert_close(upper, tensor([3.3, 1.1, -0.9]).double())


def test_losses_must_fit_the_steps():
    with pytest.raises(ValueError, match=r"losses must be \[orders, 3\]"):
        predicted([1.0, 2.0])


@pytest.mark.parametrize(
    ("losses", "step"),
    [([2.0, 1.0, 0.5], None), ([2.0, 1.2, 0.5], 5), ([2.0, nan, 0.5], 5), ([2.0, 1.0, math.inf], 10)],
)
def test_first_outside(losses, step):
    assert first_outside(predicted([2.0, 1.0, 0.5]), [0, 5, 10], tensor(losses)) == step


def test_lazy_until_compares_common_steps():
    band = predicted([2.0, 1.0, 0.5], [2.0, 1.2, 0.7])
    assert lazy_until(predicted([2.0, 1.3, 0.1], steps=(0, 5, 7)), band) is None
    assert lazy_until(predicted([2.0, 1.4, 0.1], steps=(0, 5, 7)), band) == 5
    assert lazy_until(predicted([2.0, 1.4, 0.1], steps=(0, 5, 7)), band, tolerance=0.3) is None


def test_pool_batches():
    pool = {"x": torch.arange(10)[:, None], "y": [torch.arange(10), "text", tensor(3.0), torch.zeros(4)]}
    batches = PoolBatches(pool, 4, orders=2, seed=1)
    streams = [batches.order(0), batches.order(0), batches.order(1)]
    drawn = [[next(stream) for _ in range(5)] for stream in streams]
    samples = [torch.cat([batch["x"][:, 0] for batch in order]) for order in drawn]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    for order in samples:
        assert order[:10].sort().values.tolist() == order[10:].sort().values.tolist() == [*range(10)]
    first = drawn[0][0]
    assert torch.equal(first["x"][:, 0], first["y"][0])
    assert first["y"][1:3] == ["text", tensor(3.0)]
    assert first["y"][3].shape == (4,)
    assert len(next(PoolBatches(pool, 64).order(0))["x"]) == 10


@pytest.mark.parametrize("arguments", [(torch.zeros(3), 0), (torch.zeros(3), 1, 0), (torch.zeros(0), 1), ("text", 1)])
def test_pool_batches_are_checked(arguments):
    with pytest.raises(ValueError, match="must be 1 or more|no sample"):
        PoolBatches(*arguments)


@pytest.mark.parametrize("exponent", [0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_a_power_law_is_found(exponent, floor):
    """Ten times as far as what was seen; the error there is some hundred times that of the fit."""
    law = lambda t: floor + 2 * (1 + t / 4) ** -exponent  # noqa: E731
    found = power_law(range(20), [law(t) for t in range(20)], [0, 19, 200])
    torch.testing.assert_close(found, tensor([law(0), law(19), law(200)]).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "losses",
    [
        [2.0],
        [2.0, 2.0],
        [1.0, 1.0, 1.0],
        [1.0, 2.0, 4.0],
        [0.0, 0.0],
        [3.0, nan, 1.0],
        [2.0, 0.1, 0.001],
        [1e-30, 1e-32],
    ],
)
def test_a_power_law_is_finite_and_not_negative(losses):
    found = power_law(range(len(losses)), losses, [0, 10, 10**6])
    assert bool(found.isfinite().all())
    assert bool((found >= 0).all())
    assert bool((found[1:] <= found[:-1]).all())


def test_negative_losses_may_fall_below_zero():
    assert power_law(range(4), [-1.0, -2.0, -2.5, -2.75], [50])[0] < -2.75


def test_a_power_law_needs_a_loss():
    with pytest.raises(ValueError, match="finite loss"):
        power_law([0, 1], [nan, math.inf], [2])
