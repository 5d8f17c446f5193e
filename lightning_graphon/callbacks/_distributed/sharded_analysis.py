"""Whole weights for the first process, at steps that every process knows beforehand."""

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

import lightning.pytorch as pl

from lightning_graphon.callbacks._distributed.memory import InsufficientMemoryError, check_memory_on_all_ranks
from lightning_graphon.callbacks._distributed.optimizer_view import OptimizerView
from lightning_graphon.pruning.sharding import is_sharded, summon_full_params

log = logging.getLogger(__name__)
T = TypeVar("T")


class ShardedAnalysis:
    """Steps at which the first process works on the whole network, and the others give it their shards.

    Only the first process knows when it wants to look next. So at the end of each meeting it says when the next one is,
    and no process ever waits for one that does not come. Where nothing is cut over processes, the first works alone.

    Args:
        trainer: Its strategy is used.
        pl_module: The network.

    Attributes:
        optimizer: What trains the network; None where there are several.
        next: Step of the next meeting; infinity for never.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._strategy, self._module, self._first = trainer.strategy, pl_module, trainer.is_global_zero
        self._together = any(map(is_sharded, (*pl_module.parameters(), *pl_module.buffers())))
        self.next: float = 0 if self._first or self._together else math.inf
        optimizers = trainer.optimizers
        self.optimizer = OptimizerView(optimizers[0], pl_module, self._first) if len(optimizers) == 1 else None

    def hold(self, work: Callable[[], float]) -> None:
        """Every process must call it, not within a forward or backward pass, and not in `summon_full_params`.

        Args:
            work: Run by the first process, with the optimizer read and the weights whole; must not need another
                process. Returns the step of the next meeting.

        Raises:
            RuntimeError: On the others, where `work` raised on the first, which raises its error.
        """
        try:
            check_memory_on_all_ranks(self._strategy, self._module, copies=2)  # the other one: a preconditioner
        except InsufficientMemoryError as error:
            self.next = math.inf
            if self._first:
                log.warning("LossDecayMonitor stops: %s", error)
            return
        failure = self._gathered(work)
        self.next, said = self.agree((self.next, failure and repr(failure)))
        if failure is not None:
            raise failure
        if said is not None:
            raise RuntimeError(f"the analysis failed on the first process: {said}")

    def _gathered(self, work: Callable[[], float]) -> Exception | None:
        """Let the first process work; its error, which it may raise when the others know."""
        with ExitStack() as stack:
            if self.optimizer is not None:
                stack.enter_context(self.optimizer.read())
            stack.enter_context(summon_full_params(self._module))
            try:
                self.next = work() if self._first else math.inf
            except Exception as error:
                self.next = math.inf
                return error
        return None

    def agree(self, value: T) -> T:
        """What the first process says, and every process must call it; the value itself where nothing is cut."""
        return self._strategy.broadcast(value) if self._together else value
