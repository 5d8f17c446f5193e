"""How the number of kept weights decreases over the rounds of an iterative method."""

from collections.abc import Callable

from lightning_graphon._shared.checks import check_choice
from lightning_graphon._shared.choices import Schedule


def exponential(density: float, step: int, steps: int) -> float:
    """Density after round `step` of `steps`: density^(step/steps) (Tanaka et al. 2020)."""
    return density ** (step / steps)


def linear(density: float, step: int, steps: int) -> float:
    """Density after round `step` of `steps`: the same number of weights removed in every round."""
    # Multiply before dividing, as the reference does: the last digit matters where the result is a whole number.
    return 1 - (1 - density) * step / steps


SCHEDULES: dict[Schedule, Callable[[float, int, int], float]] = {"exponential": exponential, "linear": linear}


def kept_after(total: int, density: float, kept: int, step: int, steps: int, schedule: Schedule = "exponential") -> int:
    """Number of weights kept after round `step` of `steps`; exactly `kept` after the last one.

    Args:
        total: Number of weights.
        density: Fraction to keep in the end.
        kept: Number to keep in the end, total · density rounded.
        step: Number of rounds done, 1 <= step <= steps.
        steps: Number of rounds; 1 is one-shot.
        schedule: "exponential" or "linear".

    >>> [kept_after(1000, 0.01, 10, step, 2) for step in (1, 2)]
    [100, 10]
    """
    check_choice("schedule", schedule, SCHEDULES)
    if step >= steps:
        return kept
    # The rounds on the way truncate the number removed, as the reference implementation does: one weight more or
    # less in an early round changes a hundred later ones.
    removed = int((1 - SCHEDULES[schedule](density, step, steps)) * total)
    return max(kept, total - removed)
