"""Whole weights for the first process, at steps that every process knows beforehand."""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import nn

from lightning_graphon._shared.memory import is_out_of_memory
from lightning_graphon.dynamics import OptimizerView
from lightning_graphon.pruning import is_sharded, summon_full_params

log = logging.getLogger(__name__)
T = TypeVar("T")


class InsufficientMemoryError(MemoryError):
    """The whole weights do not fit into the memory of every process; raised on all of them."""


class ShardedAnalysis:
    """Steps at which the first process works on the whole network, and the others give it their shards.

    Only the first process knows when it wants to look next. So at the end of each meeting it says when the next one is,
    and no process ever waits for one that does not come. Where nothing is cut over processes, the first works alone.

    Args:
        trainer: Its strategy is used.
        pl_module: The network.

    Attributes:
        together: Whether weights are cut over processes.
        optimizer: What trains the network; None where there are several.
        next: Step of the next meeting; infinity for never.
        failure: The error of the last meeting.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._strategy, self._module, self._first = trainer.strategy, pl_module, trainer.is_global_zero
        self.together = any(map(is_sharded, (*pl_module.parameters(), *pl_module.buffers())))
        self.failure: Exception | None = None
        self.next: float = 0 if self._first or self.together else math.inf
        optimizers = trainer.optimizers
        self.optimizer = OptimizerView(optimizers[0], pl_module, self._first) if len(optimizers) == 1 else None

    @contextmanager
    def meeting(self) -> Iterator[bool]:
        """Every process must enter it, not within a forward or backward pass, and not in `summon_full_params`.

        The body runs with the optimizer read and the weights whole, sets `next` and must not need another process. Its
        errors end in `failure`, on the other processes as one that tells it, and then there is no next meeting.

        Yields:
            Whether this process works on the network: not where memory lacks, and only on the first process.
        """
        self.next, self.failure = math.inf, None
        try:
            check_memory_on_all_ranks(self._strategy, self._module, copies=2)  # the other one: a preconditioner
        except InsufficientMemoryError as error:
            if self._first:
                log.warning("LossDecayMonitor stops: %s", error)
            yield False
            return
        with ExitStack() as stack:
            if self.optimizer is not None:
                stack.enter_context(self.optimizer.read())
            stack.enter_context(summon_full_params(self._module))
            try:
                yield self._first
            except Exception as error:
                self.next, self.failure = math.inf, error
        self.next, said = self.agree((self.next, self.failure and repr(self.failure)))
        if said is not None and self.failure is None:
            self.failure = RuntimeError(f"the analysis failed on the first process: {said}")

    def agree(self, value: T) -> T:
        """What the first process says, and every process must call it; the value itself where nothing is cut."""
        return self._strategy.broadcast(value) if self.together else value


def check_memory_on_all_ranks(
    strategy: Strategy, module: nn.Module, copies: int = 1, dtype: torch.dtype | None = None, advice: str = ""
) -> None:
    """Return where every process can hold the whole weights at the same time; all must call it.

    Tried before the others depend on it: where memory ran out in the middle of gathering, they would wait forever.
    Where no weight is cut over processes nothing is tried.

    Args:
        strategy: Asks the other processes.
        module: Its parameters and buffers that are cut are tried.
        copies: Of each of them.
        dtype: Of the copies; None: their own.
        advice: What the error says to do.

    Raises:
        InsufficientMemoryError: They do not fit, here or elsewhere.
        Exception: Whatever else the trial failed by, here; the others raise InsufficientMemoryError.
    """
    shapes = [(t.shape, dtype or t.dtype) for t in (*module.parameters(), *module.buffers()) if is_sharded(t)]
    if not shapes:
        return
    failure = _failure_to_hold(shapes * copies, strategy.root_device)
    everywhere = strategy.reduce_boolean_decision(failure is None)
    if failure is not None and not is_out_of_memory(failure):
        raise failure
    if not everywhere:
        raise InsufficientMemoryError("the whole weights do not fit into the memory of every process" + advice)


def _failure_to_hold(shapes: list[tuple[torch.Size, torch.dtype]], device: torch.device) -> Exception | None:
    try:
        trial = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    except Exception as error:
        return error
    del trial  # which held them all at the same time
    return None
