"""What the first process does alone: user code that would wait for the others is refused in place of hanging."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_graphon._shared.module_state import shadow_attributes


class OtherProcessesNeededError(RuntimeError):
    """The user's code needs the other processes, and they are not there."""


@contextmanager
def first_process_alone(trainer: pl.Trainer, what: str) -> Iterator[None]:
    """Run user code in the first of several processes: what needs the others raises instead of waiting forever.

    What the first process tells the others, as in `trainer.log_dir`, and waiting for each other are done at once.

    Args:
        trainer: Its strategy is asked by the user's code.
        what: The user's code, as the error names it.

    Raises:
        OtherProcessesNeededError: The body calls a collective, of Lightning, torchmetrics or `torch.distributed`.
    """
    if trainer.world_size == 1:
        yield
        return
    strategy: Any = trainer.strategy
    broadcast = strategy.broadcast

    def tell(obj: Any, src: int = 0) -> Any:
        return obj if src == 0 else broadcast(obj, src)

    with shadow_attributes(strategy, broadcast=tell, barrier=lambda *args, **kwargs: None), _RefuseCollectives(what):
        yield


class _RefuseCollectives(TorchDispatchMode):
    """Sees every collective, however it is called: all of them are operations of torch's dispatcher."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run: Callable[..., Any] = func
        if "c10d" in func.namespace:
            raise OtherProcessesNeededError(
                f"{self._what} gathers, reduces or waits over all processes, and an analysis runs it in the first one "
                "alone: log values with sync_dist=True, or give LossDecayMonitor a loss_fn(pl_module, batch) that does "
                "without"
            )
        return run(*args, **(kwargs or {}))
