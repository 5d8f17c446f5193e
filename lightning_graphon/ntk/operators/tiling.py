"""Divide the tiles of a kernel among the processes of torch.distributed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class TileShard:
    """This process's part of a list of independent tiles: every `size`-th one, starting at `rank`.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        group: Process group that sums the parts; None for one process alone.
    """

    rank: int = 0
    size: int = 1
    group: object | None = None

    @classmethod
    def from_group(cls, group: object | None) -> "TileShard":
        """From None for one process, "world" for all, a process group, or a `TileShard`.

        Raises:
            RuntimeError: Torch.distributed is not initialised.
        """
        if group is None or isinstance(group, TileShard):
            return group or cls()
        if not dist.is_initialized():
            raise RuntimeError("sharing a kernel over processes needs torch.distributed.init_process_group first")
        chosen = dist.group.WORLD if group == "world" else group
        return cls(dist.get_rank(chosen), dist.get_world_size(chosen), chosen)  # type: ignore[arg-type]

    def edge(self, edge: int, samples: int) -> int:
        """At most `edge`, and small enough that every process has several tiles."""
        return edge if self.size == 1 else max(1, min(edge, -(-samples // (2 * self.size))))

    def mine(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items of this process.

        >>> list(TileShard(1, 3).mine(range(7)))
        [1, 4]
        """
        # Round robin: neighbouring tiles cost the same, so all processes have as much to do.
        return (item for i, item in enumerate(items) if i % self.size == self.rank)

    def collect(self, partial: Tensor) -> Tensor:
        """Sum the processes' tensors; each entry is non-zero on one process, so the sum is exact."""
        if self.size > 1:
            dist.all_reduce(partial, op=dist.ReduceOp.SUM, group=self.group)  # type: ignore[call-overload]
        return partial


def tiles(rows: int, cols: int, edge: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Pairs of slices that cover [rows, cols], or its lower triangle when `symmetric`."""
    for i in range(0, rows, edge):
        for j in range(0, min(i + 1, cols) if symmetric else cols, edge):
            yield slice(i, min(i + edge, rows)), slice(j, min(j + edge, cols))


def world_tile_shard() -> TileShard:
    """The part of this process among all; everything where torch.distributed is not initialised.

    >>> world_tile_shard()
    TileShard(rank=0, size=1, group=None)
    """
    available = dist.is_available() and dist.is_initialized()
    return TileShard.from_group("world") if available else TileShard()
