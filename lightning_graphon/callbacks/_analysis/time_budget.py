"""What all monitors of one trainer may cost together, known before they begin and measured while they run."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import ClassVar
from weakref import WeakKeyDictionary

import lightning.pytorch as pl

_PASSES = 3  # forward passes that a training step costs
_STEPS = 5  # after which the measured time of a step replaces the estimated one


class TimeBudget:
    """Seconds that the monitors of a trainer share: a part of the time that its training is planned to take.

    A step's time is that of the clock between two looks, less what monitors took: nothing waits for a GPU at each step.

    Attributes:
        share: Part of the training time.
        reserved: Seconds put aside for a look at the end; they are not among those that are left.
    """

    floor: ClassVar[float] = 3.0  # seconds that every fit can spare
    _of: ClassVar["WeakKeyDictionary[pl.Trainer, TimeBudget]"] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.share, self.reserved = 0.0, 0.0
        self._spent, self._since = 0.0, math.inf
        self._estimate: float | None = None
        self._started: float | None = None
        self._planned, self._first_step, self._step = math.inf, 0, 0

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "TimeBudget":
        """The budget of a trainer's present fit."""
        return cls._of.setdefault(trainer, cls())

    @classmethod
    def join(cls, trainer: pl.Trainer, share: float) -> None:
        """Take part, before training starts; the largest share that a monitor asks for is that of all."""
        if cls.of(trainer)._started is not None:  # of an earlier fit
            del cls._of[trainer]
        budget = cls.of(trainer)
        budget.share = max(budget.share, share)

    def start(self, trainer: pl.Trainer) -> None:
        """Training starts now; called by every monitor."""
        if self._started is None:
            self._started, self._first_step = perf_counter(), trainer.global_step
            try:
                # Batches, of each of which every optimizer makes a step that the trainer counts.
                planned = float(trainer.estimated_stepping_batches) * max(1, len(trainer.optimizers))
            except Exception:  # whatever a dataset's length does; Lightning has asked for it before
                planned = math.inf
            self._planned = planned - self._first_step
        self._step = trainer.global_step

    @property
    def planned(self) -> float:
        """Optimizer steps of this fit from now on; infinity where nothing ends it."""
        return max(0.0, self._planned - (self._step - self._first_step))

    def estimate_step(self, forward: float) -> None:
        """Guess a step's time from the seconds of a forward pass of its samples, until it is measured."""
        self._estimate = _PASSES * forward

    @property
    def spent(self) -> float:
        """Seconds that monitors have taken in this fit."""
        return self._spent + max(0.0, perf_counter() - self._since)

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a training step without monitors: measured, or estimated before the first steps, or None."""
        steps = self._step - self._first_step
        if self._started is None or steps < _STEPS:
            return self._estimate
        return max(0.0, perf_counter() - self._started - self.spent) / steps

    @property
    def allowed(self) -> float:
        """Seconds that all monitors may take in this fit."""
        step, done = self.step_seconds, self._step - self._first_step
        planned = done if math.isinf(self._planned) else max(self._planned, done)
        return math.inf if math.isinf(self.share) else max(self.floor, self.share * planned * (step or 0.0))

    @property
    def left(self) -> float:
        """Seconds that are left of them."""
        return max(0.0, self.allowed - self.spent - self.reserved)

    def portion(self, fraction: float) -> float:
        """Seconds that one analysis may take: a fraction of all, and no more than are left."""
        return min(fraction * self.allowed, self.left)

    def spacing(self, seconds: float) -> float:
        """Steps to let pass after a measurement that took so long, for the rest of the training to afford them all."""
        left = self.left / 2  # the other half is for what comes at the end
        if math.isinf(self._planned):
            step = self.step_seconds
            return 0.0 if self.spent < self.floor or not step else seconds / (self.share * step)
        steps = max(0.0, self._planned - (self._step - self._first_step))
        return steps * seconds / left if left > 0 else math.inf

    @contextmanager
    def spending(self, trainer: pl.Trainer) -> Iterator[None]:
        """Count the time of the body."""
        self._step, self._since = trainer.global_step, perf_counter()
        try:
            yield
        finally:
            self._spent, self._since = self.spent, math.inf
