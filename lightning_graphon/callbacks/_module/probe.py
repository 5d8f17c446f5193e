"""Samples of batches of any kind: counted, joined, cut and picked."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from lightning_graphon._shared.objects.trees import flatten, tree_leaves, tree_map

_UNKNOWN_SIZE = 10**9


def join_and_cut(batches: list[Any], size: int) -> Any:
    """The first `size` samples of batches as one batch.

    Batches that cannot be joined (ragged shapes, graphs, objects without samples) give the first of them, cut to size
    where that can be done.
    """
    try:
        return take(_join(batches), size)
    except (ValueError, TypeError, RuntimeError):
        return take(batches[0], size)


def size_in_bytes(batch: Any) -> int:
    """Of all tensors of a batch."""
    return sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def batches_seen(trainer: pl.Trainer) -> float:
    """Batches that training ever takes from this process's loader; infinity where nothing but the data limits them.

    `limit_train_batches` leaves data out for good where the order is the same in every epoch.
    """
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    in_order = isinstance(sampler, SequentialSampler) or getattr(sampler, "shuffle", None) is False
    return trainer.num_training_batches if in_order else math.inf


def training_points(trainer: pl.Trainer) -> int:
    """Samples that training ever sees, over all processes; a very large number where the loader has no length."""
    loader: Any = trainer.train_dataloader
    try:
        count, batches = len(loader.dataset), len(loader)
    except (AttributeError, TypeError):
        return _UNKNOWN_SIZE
    return math.ceil(count * min(1.0, batches_seen(trainer) / max(batches, 1)))


def training_batch_size(trainer: pl.Trainer) -> int | None:
    """Samples of a training batch of this process; None where the loader does not say."""
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return None if size is None else int(size)


def samples(batch: Any) -> int:
    """Number of samples of a batch, by its first tensor or list of images; 0 without one."""
    return _layout(batch)[0]


def take(batch: Any, size: int) -> Any:
    """The first `size` samples of a batch: of every tensor and list that has one entry per sample."""
    count, is_leaf = _layout(batch)
    if count <= size:
        return batch
    return tree_map(lambda x: x[:size] if _per_sample(x, count) else x, batch, is_leaf)


def select(batch: Any, index: Tensor) -> Any:
    """The samples of a batch at `index` [K], integers, in that order."""
    count, is_leaf = _layout(batch)

    def selected(x: Any) -> Any:
        if not _per_sample(x, count):
            return x
        return x[index.to(x.device)] if isinstance(x, Tensor) else [x[i] for i in index.tolist()]

    return tree_map(selected, batch, is_leaf)


def join_samples(batches: list[Any]) -> Any | None:
    """All samples as one batch; None where batches hold more than samples, as graphs and padded sequences do."""
    counts = [samples(batch) for batch in batches]
    try:
        rows = zip(*(tree_leaves(batch, _layout(batch)[1]) for batch in batches), strict=True)
        rest = [row for row in rows if not all(map(_per_sample, row, counts))]
        alike = all(_same(x, row[0]) for row in rest for x in row)
        return _join(batches) if alike and all(counts) else None
    except (ValueError, TypeError, RuntimeError):
        return None


def _same(x: Any, y: Any) -> bool:
    return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else bool(x == y)


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
