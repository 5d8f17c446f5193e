"""Loggers that can be asked for everything and write nothing, while the library runs a `training_step`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

_WRITE = ("log", "add_", "watch", "unwatch", "save", "finalize", "after_save_checkpoint", "use_artifact")
_PLAIN = (bool, int, float, str, os.PathLike, type(None))


@contextmanager
def muted_loggers(trainer: pl.Trainer) -> Iterator[None]:
    """Code such as `self.logger.experiment.add_image(...)` runs and writes nothing; `log_dir` and the like are read."""
    loggers = trainer.loggers
    trainer.loggers = [_muted(logger) for logger in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def _muted(logger: Logger) -> Any:
    """A logger of the same kind and with the same attributes, whose methods that write do nothing."""
    kind = type(logger)
    writes = [name for name in dir(kind) if name.startswith(_WRITE) and callable(getattr(kind, name))]
    shadows: dict[str, Any] = dict.fromkeys(writes, _nothing)
    shadows["experiment"] = property(lambda self: _Muted(getattr(logger, "experiment", None)))
    muted: Any = object.__new__(type(kind.__name__, (kind,), shadows))
    muted.__dict__.update(logger.__dict__)
    return muted


class _Muted:
    """An object whose plain values can be read and whose methods do nothing, to any depth."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name, self)
        if isinstance(value, _PLAIN) or (name.startswith("get") and value is not self):
            return value
        return _Muted(None if value is self else value)

    def __call__(self, *args: Any, **kwargs: Any) -> "_Muted":
        return _Muted(None)

    def __getitem__(self, key: Any) -> "_Muted":
        return _Muted(None)

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __enter__(self) -> "_Muted":
        return self

    def __exit__(self, *error: object) -> None: ...


def _nothing(*args: Any, **kwargs: Any) -> None: ...
