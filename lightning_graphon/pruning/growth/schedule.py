"""When masks are updated, and which share of the weights is exchanged then."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GrowthSchedule:
    """Updates after every so many steps, before the last of them; the share falls by a cosine (Evci et al. 2020).

    Attributes:
        every_n_steps: Steps between two updates.
        fraction: Share of the kept weights that the first updates exchange.
        last: Step from which on masks stay.

    >>> schedule = GrowthSchedule(every_n_steps=100, fraction=0.3, last=750)
    >>> [step for step in (50, 100, 700, 800) if schedule.is_due(step)]
    [100, 700]
    >>> schedule.updates, schedule.fraction_at(375)
    (7, 0.15)
    """

    every_n_steps: int
    fraction: float
    last: int

    def is_due(self, step: int) -> bool:
        """Whether masks are updated after that many steps."""
        return 0 < step < self.last and step % self.every_n_steps == 0

    @property
    def updates(self) -> int:
        """Number of updates."""
        return max(0, (self.last - 1) // self.every_n_steps)

    def fraction_at(self, step: int) -> float:
        """Share to exchange: fraction / 2 · (1 + cos(π · step / last)), to twelve digits, which libraries agree on."""
        return round(self.fraction / 2 * (1 + math.cos(math.pi * step / self.last)), 12)

    def progress_at(self, step: int) -> float:
        """Share of the updates that are done after that many steps."""
        return min(1.0, step // self.every_n_steps / max(1, self.updates))


def count_of(share: float, total: int) -> int:
    """Whole weights in a share of them, rounded down; 0.3 of 10 are 3, whatever the last digit of 0.3 · 10.

    >>> count_of(0.29, 100)
    29
    """
    return min(total, math.floor(share * total + 1e-9))
