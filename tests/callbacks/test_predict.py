"""`LossDecayMonitor(predict=...)`: who predicts, what is said before training, and what a prediction is judged by."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_graphon.callbacks import KernelPrediction, LossDecayMonitor
from lightning_graphon.callbacks._analysis import copies_ahead
from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._rehearsal.rehearse import Rehearsed
from tests.helpers.modules import Autoencoder, Classifier, Gan, cnn, digits, loader, make_trainer

STEPS = 6  # of one epoch of six batches
ALL = ["kernel", "replay", "rehearsal", "sibling"]


def monitor(**kwargs):
    defaults = {"probe_size": 24, "every_n_steps": 2, "figure": False, "verbose": False, "raise_errors": True}
    return LossDecayMonitor(**{**defaults, **kwargs})


def plain(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def decayed(parameters):
    return torch.optim.SGD(parameters, lr=0.01, weight_decay=0.1)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.3)


def fit(watch, *callbacks, model=None, data=None, ckpt_path=None, **kwargs):
    trainer = make_trainer(watch, *callbacks, **{"limit_train_batches": 1.0, "log_every_n_steps": 1, **kwargs})
    trainer.fit(model or Classifier(optimizer=adam), loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def predictors(watch):
    session = watch._session
    return {*session.ahead.predictions, *(["kernel"] if session.tracker is not None else [])}


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("lightning_graphon")]


def told(capsys):
    """What was printed, in one line: a console breaks lines where it likes."""
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def rehearsed(monkeypatch):
    """Copies say what a test lets them say; gives the arguments of the calls."""
    calls = []

    def copies(network, theory):
        def rehearse(trainer, module, *, steps, change, **kwargs):
            calls.append(steps)
            losses = [(network if change is None else theory)(step) for step in steps]
            return Rehearsed(losses, [[0.01]] * max(steps))

        monkeypatch.setattr(copies_ahead, "rehearse_fit", rehearse)
        return calls

    return copies


@pytest.fixture
def true_batches(monkeypatch):
    """Copies train on the batches that training itself sees, in their order."""
    real = copies_ahead.rehearse_fit

    def give(data):
        own = partial(real, batches=list(data) * 20)
        monkeypatch.setattr(copies_ahead, "rehearse_fit", lambda *a, **k: own(*a, **{**k, "seed": None}))

    return give


# Who predicts


@pytest.mark.parametrize(
    ("optimizer", "options", "expected"),
    [
        (plain, {}, {"kernel", "rehearsal"}),
        (plain, {"gradient_clip_val": 1.0}, {"replay", "rehearsal"}),
        (decayed, {}, {"replay", "rehearsal"}),
        (adam, {}, {"replay", "rehearsal"}),
        (torch.optim.Adagrad, {}, {"replay", "rehearsal"}),
    ],
    ids=["sgd", "clipped", "decayed", "adam", "adagrad"],
)
def test_the_optimizer_says_who_predicts(optimizer, options, expected, caplog):
    watch = monitor()
    fit(watch, model=Classifier(optimizer=optimizer), **options)
    assert predictors(watch) == expected
    assert watch.curves["predicted"].isfinite().all(), "from step 0 on"
    assert not warned(caplog)


def test_options_of_a_kernel_ask_for_one():
    watch = monitor(kernel=KernelPrediction(start_step=2))
    fit(watch)
    assert predictors(watch) == {"kernel", "rehearsal"}


def test_only_a_rehearsal_knows_several_optimizers(caplog):
    watch = monitor()
    fit(watch, model=Gan())
    assert predictors(watch) == {"rehearsal"}
    both = watch.curves["predicted"].isfinite()
    assert both[:3].all()
    assert torch.equal(watch.curves["predicted"][both], watch.curves["rehearsed"][both])
    assert not warned(caplog)


def test_what_cannot_be_is_refused_in_one_sentence(caplog):
    watch = monitor(predict="replay")
    fit(watch, model=Gan())
    (message,) = warned(caplog)
    assert "optimises by hand, and a replay does not know when" in message
    caplog.clear()
    pooled = nn.Sequential(nn.Unflatten(1, (1, 64)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(32, 10))
    fit(monitor(predict="sibling"), model=Classifier(lambda: pooled, plain))
    (message,) = warned(caplog)
    assert "no network can be drawn from its graphons" in message
    assert "layer 'net.1' (MaxPool1d)" in message
    assert watch.curves["observed"].isfinite().all()
    assert watch.curves["predicted"].isnan().all()


def test_a_convolutional_network_has_siblings(caplog):
    watch = monitor(predict="sibling")
    fit(watch, model=Classifier(cnn, plain))
    assert not warned(caplog)
    assert watch.curves["sibling"].isfinite().all()


# What is logged and said


def test_keys(tmp_path):
    watch = monitor(predict=ALL, every_n_steps=1)
    trainer = fit(watch, model=Classifier(optimizer=plain), max_epochs=4, logger=CSVLogger(tmp_path))
    logged = {key.removeprefix("loss_decay/") for key in trainer.callback_metrics}
    assert {"observed", "predicted", "relative_error", "rehearsed", "sibling", "replayed", "power_law"} <= logged
    found = watch.curves
    for name in ("predicted", "rehearsed", "sibling", "replayed"):
        assert found[name].isfinite().all(), name
    assert found["power_law"].isfinite().tolist() == [step >= 19 for step in range(25)], "of twenty losses"
    assert set(found) == {"step", "observed", "predicted", "refreshed", "replayed", "rehearsed", "sibling", "power_law"}


def test_the_end_of_theory_is_logged_and_said_before_it_comes(rehearsed, capsys):
    rehearsed(lambda step: 2.3, lambda step: 2.3 + 0.2 * step)  # 10 % of 2.3 are left between the first two steps
    trainer = fit(monitor(verbose=True, tolerance=0.1))
    assert trainer.callback_metrics["loss_decay/lazy_until"] == 2
    text = told(capsys)
    assert "Theory (replay) leaves" in text
    assert "at step 2" in text


class SaysWhen(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 0:
            print("the first step")


@pytest.mark.parametrize(("optimizer", "name"), [(adam, "replay"), (plain, "kernel")])
def test_said_before_the_first_step(optimizer, name, capsys):
    fit(monitor(verbose=True), SaysWhen(), model=Classifier(optimizer=optimizer))
    before, _ = told(capsys).split("the first step")
    assert "predicts the loss of 24 training samples" in before
    assert "rehearsal: to step 6 of 6, 2 orders of batches; 1 training steps per step" in before
    assert f"{name}: " in before
    assert f"Theory ({name}) leaves what the network itself does not before step 6" in before


def test_a_kernel_that_is_yet_to_come_is_no_reason_to_wait(capsys):
    fit(monitor(verbose=True, predict=ALL[:3]), SaysWhen(), max_epochs=2)
    before, after = told(capsys).split("the first step")
    assert "kernel: from step 10 on" in before
    assert "rehearsal: to step 12 of 12" in before
    assert "predicts the loss" not in after, "said once"


def test_a_kernel_says_what_it_leaves_out(capsys):
    fit(monitor(verbose=True, predict="kernel"), model=Classifier(optimizer=decayed), gradient_clip_val=1.0)
    assert "it leaves out weight decay and gradient clipping" in told(capsys)


# What it is judged by


def test_inside_the_band_it_holds_though_theory_is_off(rehearsed):
    rehearsed(lambda step: 2.25, lambda step: 2.25 + step)
    watch = monitor()
    fit(watch)
    assert watch.curves["predicted"][-1] > 3 * watch.curves["observed"][-1]
    assert watch.invalid_from is None


def test_outside_the_band_it_is_void(rehearsed, caplog):
    rehearsed(lambda step: 2.25 if step < 4 else 1.0, lambda step: 2.25)
    watch = monitor()
    fit(watch)
    assert watch.invalid_from == 4
    (message,) = [m for m in warned(caplog) if "no longer holds" in m]
    assert "outside the band of the rehearsals, 0.9 to 1.1" in message


def test_without_a_band_the_error_counts(rehearsed):
    rehearsed(None, lambda step: 2.25 if step < 4 else 1.0)
    watch = monitor(predict="replay")
    fit(watch)
    assert watch.invalid_from == 4


# As far as there is time


def test_horizon():
    watch = monitor(horizon=3)
    fit(watch)
    assert watch._session.ahead.until == 3
    assert watch.curves["step"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 6.0]
    assert watch.curves["predicted"].isfinite().tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("optimizer", [adam, plain])
def test_no_time_for_a_step_is_one_sentence(optimizer, monkeypatch, caplog):
    monkeypatch.setattr(TimeBudget, "floor", 1e-9)
    watch = monitor(time_budget=1e-9)
    assert fit(watch, model=Classifier(optimizer=optimizer)).global_step == STEPS
    (message,) = warned(caplog)
    assert "predicts nothing from step 0 on" in message
    assert "time" in message
    assert watch.curves["observed"].isfinite().all()


def test_no_limit_of_time(monkeypatch):
    monkeypatch.setattr(TimeBudget, "floor", 1e-9)
    watch = monitor(time_budget=None)
    fit(watch)
    assert watch._session.ahead.until == STEPS


def test_a_resumed_run_rehearses_nothing_twice(tmp_path, monkeypatch):
    calls, real = [], copies_ahead.rehearse_fit
    monkeypatch.setattr(copies_ahead, "rehearse_fit", lambda *a, **k: calls.append(1) or real(*a, **k))
    data, path = loader(batch_size=96), tmp_path / "last.ckpt"
    whole, first, again = monitor(horizon=8), monitor(horizon=8), monitor(horizon=8)
    fit(whole, data=data, max_epochs=8)
    assert len(calls) == 3, "two orders and a replay"
    fit(first, data=data, max_epochs=8, max_steps=4).save_checkpoint(path)
    torch.load(path, weights_only=True)
    calls.clear()
    fit(again, data=data, max_epochs=8, ckpt_path=path)
    assert not calls
    for name, predicted in first._session.ahead.predictions.items():
        torch.testing.assert_close(again._session.ahead.predictions[name].losses, predicted.losses, rtol=0, atol=0)
    assert again.curves["step"].tolist()[:5] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert torch.equal(again.curves["observed"][:5], whole.curves["observed"][:5])


def test_other_predictors_than_the_checkpoints_start_anew(tmp_path, caplog):
    path, data = tmp_path / "last.ckpt", loader(batch_size=96)
    fit(monitor(), data=data, max_epochs=4).save_checkpoint(path)
    watch = monitor(predict="rehearsal")
    fit(watch, data=data, max_epochs=8, ckpt_path=path)
    assert any("starts anew at step 4" in m for m in warned(caplog))
    assert predictors(watch) == {"rehearsal"}
    assert watch.curves["step"].tolist()[0] == 4.0
    assert watch.curves["predicted"].isfinite().any()


# What it is worth


class Exactly(Classifier):
    """Linear in its parameters, in double precision."""

    def __init__(self, optimizer):
        super().__init__(lambda: nn.Linear(64, 10).double(), optimizer)


def doubles(n=96):
    x, y = digits(n)
    return DataLoader(TensorDataset(x.double(), y), 16)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("optimizer", [adamw, decayed, torch.optim.Adagrad])
def test_decay_and_clipping_are_predicted(optimizer, clip, true_batches):
    """Given the batches that training sees, of a network that is its own Taylor expansion."""
    data = doubles()
    true_batches(data)
    watch = monitor(every_n_steps=1, predict=["replay", "rehearsal"])
    fit(watch, model=Exactly(optimizer), data=data, max_epochs=2, gradient_clip_val=clip)
    found = watch.curves
    assert len(found["step"]) == 13
    torch.testing.assert_close(found["rehearsed"], found["observed"], rtol=0, atol=0)
    torch.testing.assert_close(found["predicted"], found["observed"], rtol=1e-10, atol=0)
    assert float(found["observed"][-1]) < 0.999 * float(found["observed"][0]), (
        "a training that stands still tests nothing"
    )


class Coded(Autoencoder):
    def __init__(self):
        super().__init__()
        self.double()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def test_two_modules_are_expanded_together(true_batches):
    """Encoder and decoder: the expansion of their composition, and not the composition of their expansions."""
    x = digits(96)[0].double()
    data = DataLoader(TensorDataset(x), 16)
    true_batches(data)
    watch, module = monitor(every_n_steps=1, predict="replay", probe_size=96), Coded()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(watch, model=module, data=data)

    twin = Coded()
    composed = nn.Sequential(twin.encoder, twin.decoder)
    names = dict(zip(dict(composed.named_parameters()), start, strict=True))
    weights = {name: start[own].clone().requires_grad_() for name, own in names.items()}
    origin = {name: start[own] for name, own in names.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=3e-3)

    def loss(batch):
        change = {name: weights[name] - origin[name] for name in origin}
        value, slope = jvp(lambda p: functional_call(composed, p, (batch,)), (origin,), (change,))
        return F.mse_loss(value + slope, batch)

    expected = [float(loss(x))]
    for (batch,) in data:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        expected.append(float(loss(x)))
    assert watch.curves["predicted"].tolist() == pytest.approx(expected, rel=1e-10)
    assert not math.isclose(expected[-1], float(watch.curves["observed"][-1]), rel_tol=1e-6), "no linear network"


class TrainModeOnly(Classifier):
    """As networks for detection: what it returns in eval mode is no loss."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if self.training else {}["loss"]


def test_a_network_without_a_loss_in_eval_mode_is_rehearsed(capsys, caplog):
    watch = monitor(verbose=True)
    fit(watch, model=TrainModeOnly(optimizer=adam))
    assert predictors(watch) == {"rehearsal"}
    assert watch.curves["predicted"].isfinite().all()
    assert "no replay: TrainModeOnly.training_step works in train mode only (KeyError" in told(capsys)
    assert not warned(caplog)


def test_a_checkpoint_with_fewer_curves_goes_on(tmp_path, caplog):
    """Of a version that knew only what a kernel predicts."""
    path, data = tmp_path / "last.ckpt", loader(batch_size=96)
    fit(monitor(predict="kernel"), model=Classifier(optimizer=plain), data=data, max_epochs=4).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    curves = saved["callbacks"]["LossDecayMonitor"]["curves"]
    curves["rows"] = curves["rows"][:, :4]
    torch.save(saved, path)
    watch = monitor(predict="kernel")
    fit(watch, model=Classifier(optimizer=plain), data=data, max_epochs=8, ckpt_path=path)
    assert not warned(caplog)
    assert watch.curves["step"].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert watch.curves["predicted"].isfinite().all()
    assert watch.curves["rehearsed"].isnan().all()
