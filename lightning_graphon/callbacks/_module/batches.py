"""Batches from the trainer's own train dataloader, without moving its place in the data or any generator."""

import copy
import inspect
import math
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset

from lightning_graphon._shared.module_state import preserve_random_state
from lightning_graphon._shared.objects.object_state import preserve_objects

_ROOM = 1 << 20  # bytes of a dataset's tensors that are copied: counters and the like, not the data


def train_batches(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    count: int,
    *,
    required: bool = True,
    seed: int | None = None,
    enough: Callable[[list[Any]], bool] = lambda batches: False,
    raw: bool = False,
) -> list[Any]:
    """The first training batches, on the module's device, as `training_step` would get them.

    The order in which training will see the data is unchanged: samplers and generators are put back.

    Args:
        trainer: Its train dataloader is read.
        pl_module: Its transfer hooks are applied.
        count: Number of batches, at most; with `overfit_batches` no more than those.
        required: Whether an empty dataloader is an error.
        seed: Seed of a shuffling sampler; None shuffles as the training will.
        enough: Stops before `count` when it says so of the batches so far.
        raw: Leave them as the dataloader yields them, without transfer hooks.

    Raises:
        ValueError: There is no batch and one is required.
    """
    # Outside the guard: Lightning would draw these numbers itself a little later, and then finds the work done.
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    loaders = trainer.train_dataloader
    if getattr(trainer, "overfit_batches", 0) and math.isfinite(trainer.num_training_batches):
        count = min(count, int(trainer.num_training_batches))
    with undisturbed_data(trainer, pl_module, loaders, seed):
        copies = tree_map(_fresh, [] if loaders is None else loaders, is_leaf=_is_loader)
        stream = iter(copies) if _is_loader(copies) else (b for b, _, _ in CombinedLoader(copies, _mode(trainer)))
        drawn: list[Any] = []
        for batch in islice(stream, count):
            drawn.append(batch)
            if enough(drawn):
                break
        batches = drawn if raw else [to_device(trainer, pl_module, batch) for batch in drawn]
    _warn_of_iterators(loaders)
    if required and not batches:
        raise ValueError(
            "the train dataloader yielded no batch (or limit_train_batches is 0), and the method scores by data: give "
            "batches=[...], masks=... or a method that needs none"
        )
    return batches


def scoring_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int | Sequence[Any], needs: str
) -> list[Any]:
    """Batches to score on, on the device: those given or the first so many; none where the method looks at none."""
    if not isinstance(batches, int):
        with undisturbed_data(trainer, pl_module):
            return [to_device(trainer, pl_module, batch) for batch in batches]
    if needs == "nothing":
        return []
    return train_batches(trainer, pl_module, batches, required=needs in ("loss", "data"))


def _mode(trainer: pl.Trainer) -> Any:
    """How several train dataloaders are combined; Lightning does so in cycles unless told otherwise."""
    # Private, since of the CombinedLoader that a user gave, and of its mode, Lightning shows the loaders only.
    return getattr(getattr(trainer.fit_loop, "_combined_loader", None), "_mode", "max_size_cycle")


def to_device(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """A batch after the precision plugin and the module's transfer hooks, as in Lightning's training loop."""
    batch = trainer.precision_plugin.convert_input(batch)
    datamodule: pl.LightningDataModule | None = getattr(trainer, "datamodule", None)
    hooked = datamodule if is_overridden("on_before_batch_transfer", datamodule) else None
    batch = (hooked or pl_module).on_before_batch_transfer(batch, 0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _is_loader(x: Any) -> bool:
    return hasattr(x, "__iter__") and not isinstance(x, (list, tuple, dict))


def _fresh(loader: Any) -> Any:
    """A loader like this one that shares no iterator with it.

    Workers that outlive an epoch belong to one iterator, and Lightning has made it by now: reading from it would take
    its batches from training. So such a loader is built anew, with workers of its own.

    Raises:
        ValueError: That cannot be done.
    """
    if not isinstance(loader, DataLoader):
        return loader
    if not loader.persistent_workers:
        return copy.copy(loader)  # some loaders, of torchdata for one, write down where their last iterator is
    kind = DataLoader if _only_made_otherwise(type(loader)) else type(loader)
    arguments, unknown = _constructor_arguments(loader, kind)
    if unknown:
        raise ValueError(
            f"{kind.__name__} has persistent workers: batches looked at now would be missing in training. It cannot be "
            f"built a second time, since of its constructor's arguments it has no {', '.join(unknown)}. Give it "
            "persistent_workers=False, or give the callback batches or a probe"
        )
    return kind(**arguments)


def _only_made_otherwise(kind: type) -> bool:
    """Whether a kind of DataLoader differs from it in its constructor only, and so a plain one has the same batches."""
    own = kind.__mro__[: kind.__mro__.index(DataLoader)]
    return not any(
        callable(value) and name != "__init__" and hasattr(DataLoader, name)
        for cls in own
        for name, value in vars(cls).items()
    )


def _constructor_arguments(loader: Any, kind: type) -> tuple[dict[str, Any], list[str]]:
    """Arguments that make this loader, without persistent workers, from its attributes; the names of those in doubt."""
    parameters = dict(inspect.signature(kind).parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        parameters |= inspect.signature(DataLoader).parameters
    named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    order = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last")  # one says what others say too
    values = {name: getattr(loader, name) for name in named if name not in order and hasattr(loader, name)}
    values["persistent_workers"] = False
    if isinstance(loader.dataset, IterableDataset):
        values |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    elif loader.batch_sampler is None:
        values |= {"batch_size": None, "sampler": loader.sampler}
    else:
        values["batch_sampler"] = loader.batch_sampler
    wanted = [name for name, p in named.items() if p.default is p.empty and name not in values]
    return values, wanted or sorted(values.keys() - named.keys())


@contextmanager
def undisturbed_data(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loaders: Any = None, seed: int | None = None
) -> Iterator[None]:
    """Restore whatever says which batches come next, and what transfer hooks make of them."""
    datamodule = getattr(getattr(trainer, "datamodule", None), "__dict__", None)
    with preserve_random_state(seed), preserve_objects(_sources(loaders), datamodule, pl_module, room=_ROOM):
        yield


def _sources(loaders: Any) -> list[Any]:
    """Loaders and what they draw from."""
    names = ("dataset", "sampler", "batch_sampler", "generator", "collate_fn")
    leaves = tree_leaves(loaders, is_leaf=_is_loader)
    return [*leaves, *(getattr(loader, name, None) for loader in leaves for name in names)]


def _warn_of_iterators(loaders: Any) -> None:
    """Say so where what was drawn is missing in training: an iterator gives its values once."""
    # Worker processes have a copy of it.
    here = [leaf for leaf in tree_leaves(loaders, is_leaf=_is_loader) if not getattr(leaf, "num_workers", 0)]
    held = [value for source in _sources(here) for value in (source, *getattr(source, "__dict__", {}).values())]
    spent = {type(value).__name__ for value in held if isinstance(value, (types.GeneratorType, zip, map, filter))}
    if spent:
        warnings.warn(
            f"the training data come from an iterator ({', '.join(sorted(spent))}), which cannot be wound back: the "
            "batches that lightning-graphon has looked at are missing in training. Give it a dataset that makes a new "
            "iterator in __iter__, or give the callback its batches",
            stacklevel=2,
        )
