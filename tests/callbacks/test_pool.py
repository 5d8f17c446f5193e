"""The pool that pushes the probe of `LossDecayMonitor`: drawn apart, in checkpoints, and what it gains."""

import io
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from lightning_graphon.callbacks import KernelPrediction, LossDecayMonitor
from lightning_graphon.callbacks._analysis import loss_session
from lightning_graphon.callbacks._module.pool import draw_data
from lightning_graphon.callbacks._module.probe import per_sample
from lightning_graphon.dynamics import forecast
from tests.helpers.modules import Classifier, loader, make_trainer


def monitor(**kwargs):
    defaults = {
        "predict": "kernel", "probe_size": 32, "figure": False, "verbose": False, "raise_errors": True,
        "time_budget": math.inf,
    }  # fmt: skip
    return LossDecayMonitor(**{**defaults, **kwargs})


def slow(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.5)


def fit(watch, epochs, model=None, ckpt_path=None, **kwargs):
    """Epochs of 16 steps."""
    trainer = make_trainer(watch, max_epochs=epochs, limit_train_batches=1.0, **kwargs)
    model = Classifier(optimizer=slow) if model is None else model
    trainer.fit(model, loader(n=512, batch_size=32), ckpt_path=ckpt_path)
    return trainer


class Draw(Callback):
    def __init__(self, pool):
        self.pool = pool

    def on_train_start(self, trainer, pl_module):
        data = draw_data(trainer, pl_module, 16, self.pool, 0)
        self.drawn = data.probe, data.joined(trainer, pl_module)


@pytest.mark.parametrize(("pool", "drawn"), [(64, 64), (0, None), (10_000, 80), (8, None)], ids=str)
def test_the_two_draws_are_disjoint(pool, drawn):
    draw = Draw(pool)
    make_trainer(draw, limit_train_batches=1.0).fit(Classifier(), loader())
    probe, others = draw.drawn
    assert len(per_sample(probe)[0]) == 16
    if drawn is None:
        assert others is None
    else:
        assert len(per_sample(others)[0]) == drawn
        rows = torch.cat([per_sample(probe)[0], per_sample(others)[0]])
        assert len(rows.unique(dim=0)) == 16 + drawn


@pytest.mark.parametrize("probe", [96, 60])
def test_without_enough_other_samples_the_probe_pushes_itself(probe, caplog):
    caplog.set_level("INFO", "lightning_graphon")
    watch = monitor(probe_size=probe)
    make_trainer(watch).fit(Classifier(optimizer=slow), loader())
    assert watch._session.tracker.initial.pool is None
    assert len([m for m in caplog.messages if "no pool" in m]) == 1


def test_what_is_left_out_is_said_once(caplog):
    caplog.set_level("INFO", "lightning_graphon")
    fit(monitor(), 1, gradient_clip_val=1.0, model=Classifier())
    assert [m for m in caplog.messages if "leaves out" in m] == [
        "LossDecayMonitor: the kernel's prediction leaves out weight decay and gradient clipping."
    ]


class Contrastive(Classifier):
    def training_step(self, batch, batch_idx):
        z = F.normalize(self(batch[0]), dim=1)
        return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


def test_a_loss_of_coupled_samples_has_no_pool():
    watch = monitor()
    fit(watch, 1, model=Contrastive(optimizer=slow))
    assert watch._session.tracker.pool is None


def checkpoint(path, **kwargs):
    fit(monitor(every_n_steps=4, **kwargs), 1).save_checkpoint(path)
    return path


def resumed_and_uninterrupted(tmp_path, **kwargs):
    path = checkpoint(tmp_path / "a.ckpt", **kwargs)
    resumed, whole = monitor(every_n_steps=4, **kwargs), monitor(every_n_steps=4, **kwargs)
    fit(resumed, 3, ckpt_path=path)
    fit(whole, 3)
    return resumed.curves, whole.curves


def test_a_resumed_prediction_goes_on(tmp_path):
    refresh = KernelPrediction(refresh_every_n_steps=12)
    resumed, whole = resumed_and_uninterrupted(tmp_path, kernel=refresh, pool_size=256)
    for name, values in whole.items():
        torch.testing.assert_close(resumed[name], values, rtol=1e-6, atol=0, equal_nan=True)
    assert whole["predicted"].isfinite().all()


def test_a_kernel_too_large_for_a_checkpoint_ends_at_a_resume(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(forecast, "_LARGEST_STATE", 1000)
    refresh = KernelPrediction(refresh_every_n_steps=12)
    resumed, whole = resumed_and_uninterrupted(tmp_path, kernel=refresh, pool_size=256)
    assert resumed["predicted"].isfinite().tolist() == [k <= 16 for k in resumed["step"]]
    assert len([m for m in caplog.messages if "ends at step 16" in m]) == 1
    torch.testing.assert_close(resumed["observed"], whole["observed"])
    later = resumed["step"] > 24  # from the next refresh on
    torch.testing.assert_close(resumed["refreshed"][later], whole["refreshed"][later], rtol=1e-6, atol=0)


def test_a_checkpoint_has_no_large_kernel():
    watch, buffer = monitor(probe_size=128, pool_size=2048), io.BytesIO()
    trainer = make_trainer(watch, max_epochs=-1, max_steps=4, limit_train_batches=1.0)
    trainer.fit(Classifier(optimizer=slow), loader(n=1700, batch_size=64))
    assert len(watch._session.tracker.initial.outputs) == 1700
    torch.save(watch.state_dict(), buffer)
    assert buffer.tell() < 250_000  # outputs of the pool and the probe, and the exact kernel of few


def test_the_checkpoint_of_a_run_without_a_pool_starts_anew(tmp_path, caplog):
    path = checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(path, weights_only=True)
    settings = saved["callbacks"]["LossDecayMonitor"]["settings"]
    del settings["pool"], settings["pool_size"]
    torch.save(saved, path)
    watch = monitor(every_n_steps=4)
    fit(watch, 2, ckpt_path=path)
    assert len([m for m in caplog.messages if "starts anew at step 16" in m]) == 1
    assert watch.curves["step"][0] == 16


def test_the_prediction_holds_longer():
    """A kernel that stands still leaves one error, that a small probe which pushes itself learns itself by heart."""
    held = {}
    for pool in (0, 1024):
        watch = monitor(probe_size=64, pool_size=pool, every_n_steps=20)
        model = Classifier(lambda: nn.Linear(64, 10), lambda p: torch.optim.SGD(p, lr=0.5))
        trainer = make_trainer(watch, max_epochs=-1, max_steps=400, limit_train_batches=1.0)
        trainer.fit(model, loader(n=1700, batch_size=64, shuffle=True))
        held[pool] = watch.invalid_from or 400
    assert held[1024] >= 2 * held[0], held


def test_the_budget_of_this_monitor_alone_counts(monkeypatch):
    found = []
    monkeypatch.setattr(loss_session, "draw_data", lambda *args: found.append(args[-1]))
    with pytest.raises(Exception):  # noqa: B017, PT011 - nothing has been drawn
        fit(monitor(), 1)
    assert found == [math.inf]
