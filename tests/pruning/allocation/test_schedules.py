"""The kept number over the rounds, against the closed forms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_graphon.pruning.allocation.schedules import SCHEDULES, exponential, kept_after, linear


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("density", [0.5, 0.02, 1.0])
def test_closed_forms(steps: int, density: float) -> None:
    for step in range(1, steps + 1):
        # to the last digits of float64: one power, one product
        assert exponential(density, step, steps) == pytest.approx(density ** (step / steps), rel=1e-14)
        assert linear(density, step, steps) == pytest.approx(1 - (1 - density) * step / steps, rel=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_counts_follow_the_schedule_within_one_weight(schedule: str, steps: int) -> None:
    total, kept = 27_400, 548
    for step in range(1, steps):
        ideal = SCHEDULES[schedule](0.02, step, steps) * total
        assert abs(kept_after(total, 0.02, kept, step, steps, schedule) - ideal) <= 1
    assert kept_after(total, 0.02, kept, steps, steps, schedule) == kept


def test_linear_rounds_are_truncated_like_those_of_the_reference() -> None:
    """It removes int((1 − d_t) n) with d_t = 1 − (1 − d)(t + 1)/N: 107 here, and 108 with (1 − d) · (1/5)."""
    assert kept_after(600, 0.1, 60, 1, 5, "linear") == 600 - 107


@given(
    total=st.integers(1, 10_000),
    sparsity=st.floats(0, 1, exclude_max=True),
    steps=st.integers(1, 40),
    schedule=st.sampled_from(sorted(SCHEDULES)),
)
def test_counts_fall_and_end_exactly(total: int, sparsity: float, steps: int, schedule: str) -> None:
    kept = round((1 - sparsity) * total)
    counts = [kept_after(total, 1 - sparsity, kept, step, steps, schedule) for step in range(1, steps + 1)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] <= total
    assert counts[-1] == kept


def test_an_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown schedule 'linaer'\. Did you mean 'linear'"):
        kept_after(10, 0.5, 5, 1, 2, "linaer")
