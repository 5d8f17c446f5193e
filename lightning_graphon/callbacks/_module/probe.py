"""A fixed batch of training data, joined from the loader's batches and cut to size."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import SequentialSampler

from lightning_graphon.callbacks._module.batches import train_batches

_UNKNOWN_SIZE = 10**9


def draw_probe(trainer: pl.Trainer, pl_module: pl.LightningModule, size: int, seed: int, most: float = math.inf) -> Any:
    """The first `size` training samples in the order of `seed`, as one batch on the module's device.

    They come from the first `most` batches at most.

    Batches that cannot be joined (ragged shapes, objects that are not tensors) give the first of them, cut to size
    where that can be done.

    Raises:
        ValueError: There is no training data.
    """
    batches = train_batches(
        trainer, pl_module, int(min(size, most)), required=False, seed=seed, enough=lambda seen: _count(seen) >= size
    )
    if not batches:
        raise ValueError("there is no training data to draw a probe batch from: the train dataloader yields no batch")
    try:
        counts = [samples(batch) for batch in batches]
        batch = tree_map(lambda *parts: _joined(parts, counts), batches[0], *batches[1:], is_leaf=_is_leaf)
    except (ValueError, TypeError, RuntimeError):
        batch = batches[0]
    return take(batch, size)


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


def samples(batch: Any) -> int:
    """Number of samples of a batch, by its first tensor; 0 without one."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def take(batch: Any, size: int) -> Any:
    """The first `size` samples of a batch: of every tensor and list that has one entry a sample."""
    count = samples(batch)
    if count <= size:
        return batch
    return tree_map(lambda x: x[:size] if _per_sample(x, count) else x, batch, is_leaf=_is_leaf)


def repeat_batch(batch: Any) -> Any:
    """The batch with every sample twice.

    Raises:
        ValueError, TypeError, RuntimeError: It holds what cannot be joined.
    """
    counts = [samples(batch)] * 2
    return tree_map(lambda x: _joined((x, x), counts), batch, is_leaf=_is_leaf)


def per_sample(batch: Any) -> list[Tensor]:
    """The tensors of a batch with one entry a sample, in order."""
    count = samples(batch)
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and _per_sample(leaf, count)]


def with_samples(batch: Any, tensors: tuple[Tensor, ...]) -> Any:
    """The batch with other samples: `tensors` in the order of `per_sample`."""
    count, rest = samples(batch), iter(tensors)
    return tree_map(lambda x: next(rest) if isinstance(x, Tensor) and _per_sample(x, count) else x, batch)


def labels_of(batch: Any) -> Tensor | None:
    """Class numbers [N] where the batch is a pair of inputs and classes."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    classes = batch[1] if pair else None
    if isinstance(classes, Tensor) and classes.shape == (samples(batch),) and not classes.is_floating_point():
        return classes
    return None


def _count(batches: list[Any]) -> int:
    return sum(map(samples, batches))


def _is_leaf(x: Any) -> bool:
    """Lists of strings and the like are one value with an entry a sample."""
    return isinstance(x, (list, tuple)) and len(x) > 0 and all(isinstance(v, (str, int, float)) for v in x)


def _per_sample(x: Any, count: int) -> bool:
    return (isinstance(x, Tensor) and x.ndim > 0 and len(x) == count) or (_is_leaf(x) and len(x) == count)


def _joined(parts: tuple[Any, ...], counts: list[int]) -> Any:
    """What has an entry a sample in every batch, one after the other; of anything else the first."""
    if not all(_per_sample(part, count) for part, count in zip(parts, counts, strict=True)):
        return parts[0]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else [value for part in parts for value in part]
