"""What the monitors have in common: training is not lost because of an analysis."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._distributed.first_process import OtherProcessesNeededError
from lightning_graphon.callbacks._distributed.sharded_analysis import InsufficientMemoryError
from lightning_graphon.callbacks._logging.progress import progress_shown
from lightning_graphon.callbacks._module.pickling import state_without_module
from lightning_graphon.dynamics import UnsupportedTrainingError

_REFUSED = (UnsupportedTrainingError, InsufficientMemoryError, OtherProcessesNeededError)


class Monitor(Callback):
    """A callback that looks at a training and never ends it, unless asked to.

    Args:
        figure: Draw pictures.
        verbose: Print what was found.
        raise_errors: Let an error in the analysis end the fit; by default it is reported and training goes on.
        time_budget: Share of the training time that all monitors together may take; None for no limit.

    Raises:
        ValueError: `time_budget` is not positive.
    """

    transient: tuple[str, ...] = ()  # attributes that are not taken along by pickling and copying

    def __init__(self, *, figure: bool, verbose: bool, raise_errors: bool, time_budget: float | None) -> None:
        self.figure, self.verbose, self.raise_errors = figure, verbose, raise_errors
        if time_budget is None:
            time_budget = math.inf
        if not time_budget > 0:
            raise ValueError(
                f"time_budget must be positive, a share of the training time such as 0.05, got {time_budget!r}"
            )
        self.time_budget = float(time_budget)
        self._told: set[str] = set()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            TimeBudget.join(trainer, self.time_budget)

    @contextmanager
    def analysing(self, trainer: pl.Trainer, what: str) -> Iterator[None]:
        """Count the time of the body, and show that it is at work where that is long."""
        title = f"{type(self).__name__}: {what}"
        with TimeBudget.of(trainer).spending(trainer), progress_shown(trainer, title, verbose=self.verbose):
            yield

    def report_failure(self, trainer: pl.Trainer, error: Exception, shown: str = "") -> None:
        """Tell an error of the analysis, once in a fit and not at every look; raise it where that is wanted.

        Args:
            trainer: Says at which step.
            error: Of the analysis.
            shown: What there will not be to see, where the training is one that has none.

        Raises:
            Exception: The error itself, with `raise_errors`.
        """
        if self.raise_errors:
            raise error
        name, step = type(self).__name__, trainer.global_step
        known, self._told = f"{shown}: {error}" in self._told, self._told | {f"{shown}: {error}"}
        if known:
            return
        log = logging.getLogger(type(self).__module__)
        if shown and isinstance(error, _REFUSED):
            if trainer.is_global_zero:
                log.warning("%s shows no %s at step %d: %s", name, shown, step, error)
        else:
            log.error("%s failed at step %d; training goes on without it", name, step, exc_info=error)

    def draws(self, trainer: pl.Trainer) -> bool:
        """Whether pictures are wanted."""
        return self.figure and not getattr(trainer, "fast_dev_run", False)

    def __getstate__(self) -> dict[str, Any]:
        return state_without_module(self, *self.transient)
