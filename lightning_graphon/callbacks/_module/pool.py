"""Training data that push, the pool, apart from those that are measured, the probe; and minibatches of them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_graphon._shared.objects.trees import tree_map
from lightning_graphon._shared.random import ShuffledPasses
from lightning_graphon.callbacks._distributed.first_process import first_process_alone
from lightning_graphon.callbacks._module.batches import scoring_batches, train_batches
from lightning_graphon.callbacks._module.probe import (
    batches_seen,
    join_and_cut,
    join_samples,
    samples,
    select,
    size_in_bytes,
    take,
    training_batch_size,
    training_points,
)

_LARGEST = 2**28  # bytes
_FEWEST, _LOOK = 32, 6  # samples of a probe, and batches: measuring needs a third of a training step's work
_UNSIZED = 64  # samples that a batch is taken for where it does not say


class DataExhaustedError(Exception):
    """A rehearsal has seen all batches that it was given."""


@dataclass(frozen=True)
class TrainingData:
    """Samples of the training data, drawn once: those that are measured and those that push.

    Attributes:
        probe: One batch on the module's device.
        drawn: Batches as the dataloader yields them, to train on; those of the probe where there are no others.
        apart: Whether they are others than the probe's.
        measured: The probe's batches as the dataloader yields them.
        share: Of the probe in all training data: training sees it, too.
    """

    probe: Any
    drawn: list[Any]
    apart: bool
    measured: list[Any] = field(default_factory=list)
    share: float = 0.0

    def joined(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any | None:
        """What pushes as one batch on the device; None where it is the probe, holds less, or cannot be joined."""
        if not self.apart:
            return None
        whole = join_samples(scoring_batches(trainer, pl_module, self.drawn, "loss"))
        return whole if whole is not None and samples(whole) >= samples(self.probe) else None


def draw_data(
    trainer: pl.Trainer, pl_module: pl.LightningModule, probe_size: int, pool_size: int = 2048, seed: int = 0,
    seconds: float = math.inf, unseen: bool = False,
) -> TrainingData:  # fmt: skip
    """Disjoint training samples in the order of `seed`: first those of the probe, then those of the pool.

    The order in which training will see the data is unchanged, as by `train_batches`.

    Batches that hold more than samples are not cut: the pool begins with the batch after those of the probe.

    Args:
        trainer: Its train dataloader is read; of several processes, the part of this one.
        pl_module: Its transfer hooks are applied to the probe.
        probe_size: Samples of the probe, at most.
        pool_size: Samples of the pool, at most; fewer where they take longer or fill a quarter of a gigabyte.
        seed: Seed of a shuffling sampler.
        seconds: After which loading for the pool ends.
        unseen: Whether to draw samples, too, that `limit_train_batches` leaves out for good.

    Raises:
        ValueError: There is no training data.
    """
    size, end = probe_size + pool_size, perf_counter() + seconds
    most = min(size, math.inf if unseen else batches_seen(trainer), 2 + size // (training_batch_size(trainer) or 1))

    def enough(seen: list[Any]) -> bool:
        count = sum(samples(batch) or _UNSIZED for batch in seen)
        if not samples(seen[0]) and pool_size == 0:
            return True
        return count >= size or (
            count >= probe_size and (perf_counter() > end or len(seen) * size_in_bytes(seen[0]) > _LARGEST)
        )

    with first_process_alone(trainer, "the train dataloader"):
        raw = train_batches(trainer, pl_module, int(most), required=False, seed=seed, raw=True, enough=enough)
    if not raw:
        raise ValueError("there is no training data to draw a probe batch from: the train dataloader yields no batch")
    count, seen = 0, 0
    while count < len(raw) and seen < probe_size:
        seen += samples(raw[count]) or probe_size
        count += 1
    probe = join_and_cut(scoring_batches(trainer, pl_module, raw[:count], "loss"), probe_size)
    joins = join_samples(raw) is not None
    rest = [*_last(raw[count - 1], seen - probe_size if joins else 0), *raw[count:]]
    pool = _first(rest, pool_size) if joins else rest
    share = min(1.0, samples(probe) / training_points(trainer))
    return TrainingData(probe, pool or raw[:count], bool(pool), _first(raw[:count], probe_size), share if pool else 0.0)


def probe_for_batches(trainer: pl.Trainer, size: int, seconds: float) -> int:
    """A probe's size at which measuring it costs no more than a few training steps, where time is limited."""
    batch = training_batch_size(trainer)
    return size if math.isinf(seconds) or batch is None else min(size, max(_FEWEST, _LOOK * batch))


def draw_probe(trainer: pl.Trainer, pl_module: pl.LightningModule, size: int, seed: int) -> Any:
    """The first `size` samples in the order of `seed`, as one batch on the module's device; see `draw_data`."""
    return draw_data(trainer, pl_module, size, 0, seed, unseen=True).probe


def _last(batch: Any, size: int) -> list[Any]:
    """The last `size` samples of a batch, where there are any."""
    count = samples(batch)
    return [select(batch, torch.arange(count - size, count))] if count and size > 0 else []


def _first(batches: list[Any], size: int) -> list[Any]:
    """The first `size` samples of batches, each a batch still."""
    kept = []
    for batch in batches:
        if size <= 0:
            break
        kept.append(take(batch, size))
        size -= samples(batch) or _UNSIZED
    return kept


class PoolLoader:
    """Minibatches of a pool for ever, in a random order that is new in each epoch of the pool.

    Samples are mixed anew where batches can be joined; otherwise the batches come as they were drawn.

    Args:
        pool: Batches as a dataloader yields them.
        batch_size: Samples of a minibatch.
        length: Batches of an epoch, as a trainer counts them; infinity where it knows none.
        seed: Seed of the order.
        batches: To be given in this order, in place of minibatches of the pool.
        others: Batches whose samples come among the pool's, too: those of the probe, which training sees.
        share: Part of all samples that they are, on average.

    >>> pool = [[torch.arange(4)], [torch.arange(4, 6)]]
    >>> loader = PoolLoader(pool, 3, math.inf, seed=0)
    >>> sorted(torch.cat([next(loader)[0], next(loader)[0]]).tolist())
    [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self, pool: list[Any], batch_size: int, length: float, seed: int, batches: Iterable[Any] | None = None,
        others: Sequence[Any] = (), share: float = 0.0,
    ) -> None:  # fmt: skip
        self._length = length
        mixed = self._mixed(pool, batch_size, seed, others, share)
        self._stream = mixed if batches is None else iter(batches)

    def __len__(self) -> int:
        if math.isinf(self._length):
            raise TypeError("the loader has no length")
        return int(self._length)

    def __iter__(self) -> Iterator[Any]:
        return self  # where the pool's epoch ends does not depend on where the trainer's does

    def __next__(self) -> Any:
        try:
            batch = next(self._stream)
        except StopIteration as error:
            raise DataExhaustedError from error
        # A step may write into its batch.
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)

    @staticmethod
    def _mixed(pool: list[Any], batch_size: int, seed: int, others: Sequence[Any], share: float) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        whole = join_samples([*pool, *others])
        if whole is None:
            while True:
                yield from (pool[i] for i in torch.randperm(len(pool), generator=generator).tolist())
        count = sum(map(samples, others))
        first = samples(whole) - count
        of_pool, of_others = ShuffledPasses(first, generator), ShuffledPasses(count, generator)
        while True:
            few = int((torch.rand(batch_size, generator=generator) < share).sum()) if share else 0
            yield select(whole, torch.cat([of_pool.take(batch_size - few), first + of_others.take(few)]))
