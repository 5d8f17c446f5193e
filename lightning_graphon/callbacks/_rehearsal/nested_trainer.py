"""A trainer inside a trainer: it fits a copy, answers as the real one would, and leaves nothing behind."""

import copy
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _BaseProgress
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from typing_extensions import override

# Where a loop stands besides its counters; not every version of Lightning has all of them.
_FLAGS = (
    "_restarting",
    "_restart_stage",
    "_loaded_from_state_dict",
    "_resuming_from_checkpoint",
    "_batches_that_stepped",
)


class NestedTrainer(pl.Trainer):
    """Trains on one device what `real` trains, from where it stands, with its precision, clipping and accumulation.

    What user code asks about the plan (steps, epochs, batches, processes, folders, data) is answered for the real run.
    Nothing is logged, printed or saved, nothing is validated, and no callbacks of the user run.

    Args:
        real: The trainer whose fit has begun.
        callback: Watches the nested fit.
    """

    def __init__(self, real: Any, callback: Callback) -> None:
        self._real = real
        precision = copy.deepcopy(real.precision_plugin)
        _shadow(precision, convert_module=_unchanged)  # it has been converted, and is copied as it is
        strategy = SingleDeviceStrategy(real.strategy.root_device, real.accelerator, precision_plugin=precision)
        algorithm = real.gradient_clip_algorithm
        super().__init__(
            strategy=strategy, devices=1, plugins=[LightningEnvironment()], logger=False, callbacks=[],
            min_epochs=real.min_epochs, max_epochs=real.max_epochs, min_steps=real.min_steps, max_steps=real.max_steps,
            gradient_clip_val=real.gradient_clip_val,
            gradient_clip_algorithm=None if algorithm is None else str(getattr(algorithm, "value", algorithm)),
            accumulate_grad_batches=real.accumulate_grad_batches, limit_val_batches=0, num_sanity_val_steps=0,
            log_every_n_steps=real.log_every_n_steps, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=real.default_root_dir,
        )  # fmt: skip
        self.callbacks: list[Callback] = [callback]  # and none that packages register
        self.fast_dev_run: int | bool = real.fast_dev_run
        self.state.fn, self.state.status, self.state.stage = (
            TrainerFn.FITTING,
            TrainerStatus.RUNNING,
            RunningStage.TRAINING,
        )

    def attach(self, twin: pl.LightningModule, loader: Any) -> None:
        """Connect a copy and its data. The real datamodule's hooks are used, and it keeps its own trainer."""
        # Private, as Lightning does this in `fit` only, together with hooks that would build the network once more.
        self._data_connector.attach_data(twin, train_dataloaders=loader)
        self.datamodule = getattr(self._real, "datamodule", None)
        selector: Any = self._data_connector._datahook_selector
        selector.datamodule = self.datamodule
        self.strategy.connect(twin)

    def setup(self, resume: bool) -> None:
        """Configure optimizers and schedulers, with `resume` in the states of the real ones, and stand where it stands.

        Raises:
            ValueError, RuntimeError, KeyError: The states do not fit.
        """
        self.strategy.setup(self)
        for config in self.lr_scheduler_configs:
            config.strict = False  # what is monitored may be a metric of validation
        if resume:
            self._load_states()
        _copy_progress(self._real.fit_loop, self.fit_loop)

    def _load_states(self) -> None:
        for new, old in zip(self.optimizers, self._real.optimizers, strict=True):
            _load_state(new, old)
        for ours, theirs in zip(self.lr_scheduler_configs, self._real.lr_scheduler_configs, strict=True):
            ours.scheduler.load_state_dict(copy.deepcopy(theirs.scheduler.state_dict()))

    def run(self) -> None:
        """Train from where the real fit stands until something stops it."""
        loop = self.fit_loop
        _shadow(loop, on_run_end=_nothing)
        _shadow(loop.epoch_loop, _broadcast_sigterm_tensor=_nothing)  # all processes would have to take part
        if begun(self._real):
            loop.restarting = True
            _shadow(self.lightning_module, on_train_start=_nothing)
        else:
            _shadow(loop, reset=_nothing)  # the real one has done so, and its state is copied
        loop.run()

    def __getattr__(self, name: str) -> Any:
        # Attributes that users give to their trainers.
        real = self.__dict__.get("_real")
        if real is not None and name in vars(real):
            return getattr(real, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    @override
    def estimated_stepping_batches(self) -> int | float:
        return self._real.estimated_stepping_batches

    @property
    @override
    def num_training_batches(self) -> int | float:
        return self._real.num_training_batches

    @property
    @override
    def world_size(self) -> int:
        return self._real.world_size

    @property
    @override
    def num_devices(self) -> int:
        return self._real.num_devices

    @property
    @override
    def num_nodes(self) -> int:
        return self._real.num_nodes

    @property
    @override
    def train_dataloader(self) -> Any:
        return self._real.train_dataloader

    @property
    @override
    def val_dataloaders(self) -> Any:
        return self._real.val_dataloaders

    @override
    def print(self, *args: Any, **kwargs: Any) -> None: ...

    @override
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...


def begun(trainer: pl.Trainer) -> bool:
    """Whether a trainer is inside an epoch, after the hooks `on_train_start`."""
    progress = trainer.fit_loop.epoch_progress.current
    return progress.ready > progress.completed and not trainer.fit_loop.epoch_loop.restarting


@contextmanager
def silenced() -> Iterator[None]:
    """No messages of Lightning, no warnings, and compiled functions run eagerly: compiling costs more than it saves."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for logger in map(logging.getLogger, names):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _load_state(new: Any, old: Any) -> None:
    """Give an optimizer the state of another."""
    try:
        new.load_state_dict(copy.deepcopy(old.state_dict()))  # which would share its tensors
    except ValueError:
        # Where weights froze after the old one was made, an optimizer of the others alone takes the same steps.
        if old.state:
            raise


def _copy_progress(real: _Loop, nested: _Loop) -> None:
    """Give a loop and those inside it the counters and flags of another."""
    for name, value in vars(real).items():
        if isinstance(value, _BaseProgress) or name in _FLAGS:
            setattr(nested, name, copy.deepcopy(value))
        elif isinstance(value, _Loop):
            _copy_progress(value, getattr(nested, name))


def _shadow(owner: Any, **methods: Any) -> None:
    """Replace methods of one object."""
    owner.__dict__.update(methods)


def _unchanged(module: Any) -> Any:
    return module


def _nothing(*args: Any, **kwargs: Any) -> None: ...
