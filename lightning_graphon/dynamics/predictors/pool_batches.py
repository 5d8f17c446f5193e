"""Minibatches of a pool of samples, in orders drawn by seeds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_graphon._shared.objects.trees import tree_leaves, tree_map
from lightning_graphon._shared.random import ShuffledPasses, generator


@dataclass(frozen=True)
class PoolBatches:
    """Minibatches of a pool without end, every sample once per pass, in several random orders.

    All batches have the same size: one may hold the end of a pass and the beginning of the next.

    Args:
        pool: A batch of many samples: tensors whose first axis counts them, in tuples, dicts and the like. What is no
            tensor with that axis goes into every batch as it is.
        batch_size: Samples per batch; at most the whole pool.
        orders: Number of orders.
        seed: Of the orders.

    Raises:
        ValueError: There is no sample, or a number is below 1.

    >>> import torch
    >>> batches = PoolBatches((torch.arange(4), "labels"), batch_size=3, orders=2)
    >>> stream = batches.order(0)
    >>> pushed = torch.cat([next(stream)[0] for _ in range(4)])
    >>> pushed[:4].sort().values, pushed.bincount()
    (tensor([0, 1, 2, 3]), tensor([3, 3, 3, 3]))
    """

    pool: Any
    batch_size: int
    orders: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "orders"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)!r}")
        if len(self) == 0:
            raise ValueError("the pool has no sample")

    def __len__(self) -> int:
        """Samples in the pool."""
        return next((len(leaf) for leaf in tree_leaves(self.pool) if isinstance(leaf, Tensor) and leaf.ndim), 0)

    def order(self, number: int) -> Iterator[Any]:
        """Minibatches in one of the orders, without end."""
        rows = ShuffledPasses(len(self), generator(self.seed, f"order {number} of batches"))
        while True:
            yield self._rows(rows.take(min(self.batch_size, len(self))))

    def _rows(self, rows: Tensor) -> Any:
        def of(leaf: Any) -> Any:
            counts = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(self)
            return leaf[rows.to(leaf.device)] if counts else leaf

        return tree_map(of, self.pool)
