"""A fit with a rehearsal is bit for bit the fit without one, and nothing is written or said."""

import logging
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.nn import functional as F

from lightning_graphon.callbacks._rehearsal.nested_trainer import NestedTrainer
from tests.callbacks.test_no_trace import LOADERS, AnyBatch, NoisyStream, Rich, everything, fit, same
from tests.helpers.modules import Classifier, Recorder, cnn, loader, make_trainer, snapshot
from tests.helpers.rehearsal_cases import CASES, Rehearses
from tests.helpers.rehearsal_cases import fit as fit_case


class OnlyRehearses(Rehearses):
    """And measures nothing, which would be a trace of its own."""

    def look(self, trainer):
        self.observed.append(0.0)
        self.steps.append(trainer.global_step - self.at)


class State(Callback):
    """Keeps everything after each batch."""

    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        state = snapshot(pl_module)
        del state["ids"]
        generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        optimizers = [torch.utils._pytree.tree_map(_copied, o.state_dict()) for o in trainer.optimizers]
        schedulers = [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]
        metrics = {k: v.clone() for k, v in trainer.callback_metrics.items()}
        loop = trainer.fit_loop.epoch_loop
        steps = trainer.global_step, trainer.current_epoch, loop.batch_progress.current.ready
        self.kept.append((state, generators, optimizers, schedulers, metrics, steps))


def _copied(x):
    return x.clone() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_fit_is_as_without(name, at, tmp_path):
    plain, rehearsed, callback = State(), State(), OnlyRehearses(3, at=at, true_batches=False)
    _, first = fit_case(CASES[name], plain, logger=CSVLogger(tmp_path / "a"))
    _, second = fit_case(CASES[name], callback, rehearsed, logger=CSVLogger(tmp_path / "a"))
    assert len(callback.rehearsed) >= 2  # the fit may be over by then, and the rehearsal with it
    same(plain.kept, rehearsed.kept)
    same(first.hparams, second.hparams)


@pytest.mark.parametrize("kind", LOADERS, ids=[k.replace(" ", "-") for k in LOADERS])
def test_data_and_generators_are_as_without(kind):
    plain, plain_state = fit(LOADERS[kind], max_epochs=2)
    callback = OnlyRehearses(5, true_batches=False, seed=7)
    rehearsed, rehearsed_state = fit(LOADERS[kind], callback, max_epochs=2)
    assert len(callback.rehearsed) == 6
    assert np.isfinite(callback.rehearsed).all()
    same(plain.batches, rehearsed.batches)
    same(plain_state, rehearsed_state)
    assert plain.losses == rehearsed.losses


def test_with_workers():
    make = partial(loader, shuffle=True, num_workers=1, persistent_workers=True)
    plain, _ = fit(make)
    rehearsed, _ = fit(make, OnlyRehearses(3, true_batches=False))
    same(plain.batches, rehearsed.batches)
    assert plain.losses == rehearsed.losses


def test_a_stream_is_drawn_once():
    from torch.utils.data import DataLoader

    make = lambda: DataLoader(NoisyStream(), 16)  # noqa: E731
    plain, _ = fit(make)
    callback = OnlyRehearses(3, true_batches=False)
    rehearsed, _ = fit(make, callback)
    assert len(callback.rehearsed) == 4
    same(plain.batches, rehearsed.batches)
    assert plain.losses == rehearsed.losses


def test_metrics_lists_and_flags_of_the_module():
    model, seen = Rich(), {}
    before = everything(model)

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen["after"] = everything(pl_module)

    callback = OnlyRehearses(3, true_batches=False)
    make_trainer(callback, Look(), limit_train_batches=1).fit(model, loader())
    assert len(callback.rehearsed) == 2
    same(before, seen["after"])
    assert model.seen == 16


class Loud(Classifier):
    """Logs and writes in every way that its logger has, and prints."""

    def __init__(self):
        super().__init__(cnn)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"a": 1.0, "b": logits.mean()})
        self.logger.experiment.add_scalar("by_hand", 1.0, self.global_step)
        self.logger.log_metrics({"m": 1.0}, step=self.global_step)
        self.logger.log_hyperparams({"width": 3})
        self.print("loud")
        self.trainer.print("louder")
        self.trainer.save_checkpoint(self.trainer.default_root_dir + "/loud.ckpt")
        warnings.warn("loudest", stacklevel=1)
        return F.cross_entropy(logits, y)

    def on_train_epoch_end(self):
        self.logger.experiment.add_text("epoch", "over")


def test_nothing_is_written_or_said(tmp_path, capsys, caplog):
    seen = {}

    def files():
        return {p: p.stat().st_size for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    class Around(OnlyRehearses):
        def rehearse(self, trainer, pl_module):
            capsys.readouterr()
            caplog.clear()
            trainer.logger.experiment.flush()
            before = files(), dict(trainer.callback_metrics), dict(trainer.logged_metrics), trainer.loggers
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                super().rehearse(trainer, pl_module)
            trainer.logger.experiment.flush()
            after = files(), dict(trainer.callback_metrics), dict(trainer.logged_metrics), trainer.loggers
            seen.update(before=before, after=after, said=capsys.readouterr(), logged=[*caplog.records], warned=warned)

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.INFO)
    callback = Around(7, true_batches=False)
    trainer = make_trainer(
        callback, logger=TensorBoardLogger(tmp_path), default_root_dir=tmp_path, max_epochs=2, log_every_n_steps=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Loud(), loader())
    assert len(callback.rehearsed) == 7  # two epochs of three batches, and the start
    assert seen["before"] == seen["after"]
    assert not seen["said"].out
    assert not seen["said"].err
    assert not seen["logged"]
    assert not [w for w in seen["warned"] if "lightning" in str(w.filename) or "loudest" in str(w.message)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_and_leaves_no_trace(error):
    """As it is: Lightning would make an exit of it, and take the interrupts of the outer fit away."""
    import signal

    handler, seen = signal.getsignal(signal.SIGINT), {}

    class Interrupted(OnlyRehearses):
        def on_train_start(self, trainer, pl_module):
            before = snapshot(pl_module), torch.get_rng_state()
            with pytest.raises(error):
                self.rehearse(trainer, pl_module)
            same(before, (snapshot(pl_module), torch.get_rng_state()))
            assert signal.getsignal(signal.SIGINT) is handler
            assert pl_module.trainer is trainer
            seen["it"] = True

    class Breaks(AnyBatch):
        def training_step(self, batch, batch_idx):
            if isinstance(self.trainer, NestedTrainer) and self.trainer.global_step == 2:
                raise error
            return super().training_step(batch, batch_idx)

    recorder = Recorder()
    make_trainer(Interrupted(4, true_batches=False), recorder).fit(Breaks(cnn), loader())
    assert seen
    assert len(recorder.losses) == 3
