"""A fixed batch of training data, joined from the loader's batches and cut to size."""

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from lightning_graphon._shared.objects.trees import flatten, tree_leaves, tree_map
from lightning_graphon.callbacks._module.batches import train_batches

_LARGEST_POOL = 2**28  # bytes


def draw_probe(trainer: pl.Trainer, pl_module: pl.LightningModule, size: int, seed: int, most: float = math.inf) -> Any:
    """The first `size` training samples in the order of `seed`, as one batch on the module's device.

    They come from the first `most` batches at most.

    Batches that cannot be joined (ragged shapes, graphs, objects without samples) give the first of them, cut to size
    where that can be done.

    Raises:
        ValueError: There is no training data.
    """
    return draw_probe_and_pool(trainer, pl_module, size, 0, seed, most)[0]


def draw_probe_and_pool(
    trainer: pl.Trainer, pl_module: pl.LightningModule, probe_size: int, pool_size: int, seed: int,
    most: float = math.inf, seconds: float = math.inf,
) -> tuple[Any, Any | None]:  # fmt: skip
    """A probe as `draw_probe`, and the up to `pool_size` samples that come after it in one draw.

    Loading for the pool ends after some seconds, or at a quarter of a gigabyte.

    Returns:
        The probe; the pool, or None where fewer samples than the probe's are left for it.

    Raises:
        ValueError: There is no training data.
    """
    size, end = probe_size + pool_size, perf_counter() + seconds

    def enough(seen: list[Any]) -> bool:
        count = sum(map(samples, seen))
        if not samples(seen[0]) or count >= size:
            return True
        return count >= probe_size and (perf_counter() > end or len(seen) * _bytes(seen[0]) > _LARGEST_POOL)

    batches = train_batches(trainer, pl_module, int(min(size, most)), required=False, seed=seed, enough=enough)
    if not batches:
        raise ValueError("there is no training data to draw a probe batch from: the train dataloader yields no batch")
    try:
        drawn = _join(batches)
    except (ValueError, TypeError, RuntimeError):
        return take(batches[0], probe_size), None
    left = min(pool_size, samples(drawn) - probe_size)
    return take(drawn, probe_size), take(drawn, size, start=probe_size) if left >= probe_size else None


def _bytes(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def batches_seen(trainer: pl.Trainer) -> float:
    """Batches that training ever takes from this process's loader; infinity where nothing but the data limits them.

    `limit_train_batches` leaves data out for good where the order is the same in every epoch.
    """
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    in_order = isinstance(sampler, SequentialSampler) or getattr(sampler, "shuffle", None) is False
    return trainer.num_training_batches if in_order else math.inf


def training_batch_size(trainer: pl.Trainer) -> int | None:
    """Samples of a training batch of this process; None where the loader does not say."""
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return None if size is None else int(size)


def samples(batch: Any) -> int:
    """Number of samples of a batch, by its first tensor or list of images; 0 without one."""
    return _layout(batch)[0]


def take(batch: Any, size: int, start: int = 0) -> Any:
    """The samples from `start` to `size` of a batch: of every tensor and list that has one entry per sample."""
    count, is_leaf = _layout(batch)
    if count <= size and not start:
        return batch
    return tree_map(lambda x: x[start:size] if _per_sample(x, count) else x, batch, is_leaf)


def repeat_batch(batch: Any) -> Any:
    """The batch with every sample twice.

    Raises:
        ValueError, TypeError, RuntimeError: It holds what cannot be joined.
    """
    return _join([batch, batch])


def per_sample(batch: Any) -> list[Tensor]:
    """The tensors of a batch with one entry per sample, in order."""
    count, is_leaf = _layout(batch)
    return [x for x in tree_leaves(batch, is_leaf) if isinstance(x, Tensor) and _per_sample(x, count)]


def holds_lists(batch: Any) -> bool:
    """Whether tensors of the batch are in lists with one entry per sample."""
    count, is_leaf = _layout(batch)
    lists = [x for x in tree_leaves(batch, is_leaf) if _is_list(x) and len(x) == count]
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(lists))


def with_samples(batch: Any, tensors: tuple[Tensor, ...]) -> Any:
    """The batch with other samples: `tensors` in the order of `per_sample`."""
    (count, is_leaf), rest = _layout(batch), iter(tensors)
    return tree_map(lambda x: next(rest) if isinstance(x, Tensor) and _per_sample(x, count) else x, batch, is_leaf)


def labels_of(batch: Any) -> Tensor | None:
    """Class numbers [N] where the batch is a pair of inputs and classes."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    classes = batch[1] if pair else None
    if isinstance(classes, Tensor) and classes.shape == (samples(batch),) and not classes.is_floating_point():
        return classes
    return None


def _layout(batch: Any) -> tuple[int, Callable[[Any], bool]]:
    """Number of samples, and which lists are one value with an entry per sample.

    A list may hold one tensor per sample, as images of several sizes, or one per kind of input, with as many rows as
    there are samples. Of the first kind are images, and entries that differ in length; a batch that is a list of few
    tensors is of the second.
    """
    rows = {len(x) for x in tree_leaves(batch, lambda x: _is_list(x) and x is not batch) if _has_rows(x)}

    def starts(x: Any) -> bool:
        if x is batch and _is_list(x):
            return _holds_images(x, set()) and (len(x) > 3 or not any(isinstance(entry, Tensor) for entry in x))
        return _is_list(x) and (_holds_images(x, rows) or _holds_samples(x, rows))

    first = next((x for x in tree_leaves(batch, starts) if starts(x) or _has_rows(x)), ())
    count, listed = len(first), _is_list(first)

    def is_leaf(x: Any) -> bool:
        if x is batch or not _is_list(x) or len(x) != count:
            return starts(x) and len(x) == count
        return listed or starts(x) or not any(_has_rows(leaf, count) for leaf in tree_leaves(x))

    return count, is_leaf


def _is_list(x: Any) -> bool:
    return type(x) in (list, tuple)


def _holds_images(x: Any, rows: set[int]) -> bool:
    """Whether each entry is an image [C, H, W], or begins with one."""
    firsts = [next((leaf for leaf in tree_leaves(entry) if isinstance(leaf, Tensor)), None) for entry in x]
    if not firsts or not all(t is not None and t.ndim == 3 and len(t) in (1, 3, 4) for t in firsts):
        return False
    return len(x) in rows or not rows.issuperset(len(t) for t in firsts if t is not None)


def _holds_samples(x: Any, rows: set[int]) -> bool:
    """Whether the entries are tensors of different lengths, or of none, or there is a tensor with a row for each."""
    if not x or not all(isinstance(entry, Tensor) for entry in x):
        return False
    lengths = {len(entry) if entry.ndim else None for entry in x}
    return len(lengths) > 1 or None in lengths or (len(x) in rows and not lengths & rows)


def _has_rows(x: Any, count: int | None = None) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and count in (None, len(x))


def _per_sample(x: Any, count: int) -> bool:
    return _has_rows(x, count) or (_is_list(x) and len(x) == count)


def _join(batches: list[Any]) -> Any:
    """What has an entry per sample in every batch, one after the other; of anything else the first.

    Raises:
        ValueError, TypeError, RuntimeError: They differ in what they hold.
    """
    counts = [samples(batch) for batch in batches]
    trees = [flatten(batch, _layout(batch)[1]) for batch in batches]

    def joined(*parts: Any) -> Any:
        if not all(map(_per_sample, parts, counts)):
            return parts[0]
        return torch.cat(parts) if isinstance(parts[0], Tensor) else [value for part in parts for value in part]

    return trees[0][1](joined(*parts) for parts in zip(*(leaves for leaves, _ in trees), strict=True))
