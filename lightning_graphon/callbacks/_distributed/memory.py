"""Room for whole weights, found on every process before any of them begins to gather."""

import torch
from lightning.pytorch.strategies import Strategy
from torch import nn

from lightning_graphon._shared.memory import is_out_of_memory
from lightning_graphon.pruning.sharding import is_sharded


class InsufficientMemoryError(MemoryError):
    """The whole weights do not fit into the memory of every process; raised on all of them."""


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
