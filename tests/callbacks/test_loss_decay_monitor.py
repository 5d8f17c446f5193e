"""`LossDecayMonitor` in the trainer: no trace, keys and steps in every logger, resuming, refusals in one sentence."""

import copy
import csv
import math
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_graphon._shared.batch_norm import batch_norms, settle_batch_norms
from lightning_graphon.callbacks import KernelPrediction, LossDecayMonitor
from lightning_graphon.callbacks._analysis import loss_session
from lightning_graphon.callbacks._logging import loss_chart
from lightning_graphon.dynamics import Forecast, LossCurves, LossDecayPredictor, loss_tracker
from tests.helpers.modules import Autoencoder, Classifier, Gan, Recorder, cnn, digits, loader, make_trainer, quiet


def monitor(**kwargs):
    defaults = {
        "predict": "kernel", "probe_size": 24, "every_n_steps": 2, "figure": False, "verbose": False,
        "raise_errors": True,
    }  # fmt: skip
    return LossDecayMonitor(**{**defaults, **kwargs})


def next_key(arguments):
    return next(iter(arguments))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


def fit(*callbacks, model=None, data=None, ckpt_path=None, **kwargs):
    trainer = make_trainer(*callbacks, **{"limit_train_batches": 1.0, "log_every_n_steps": 1, **kwargs})
    trainer.fit(model or Classifier(optimizer=sgd), loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("lightning_graphon")]


# No trace


class Busy(Classifier):
    """Dropout, batch norm, metrics, counters and random numbers of three kinds."""

    def __init__(self):
        super().__init__(cnn)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10)
        self.steps, self.history = 0, []
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x + 0.01 * torch.randn_like(x) * random.random() * np.random.rand())
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.steps += 1
        self.seen += len(y)
        self.history.append(loss.item())
        self.log("accuracy", self.accuracy)
        return loss


class BusyParts(Busy):
    """The same as two networks in a row, so that the kernel is that of training_step itself."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net[4:](self.net[:4](x)), y)
        self.steps += 1
        self.history.append(loss.item())
        return loss


def trained(make, *callbacks):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    model, recorder = make(), Recorder()
    fit(*callbacks, recorder, model=model, data=loader(shuffle=True), max_epochs=2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    grads = [p.grad for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    metrics = {k: getattr(model.accuracy, k) for k in model.accuracy._defaults}
    rest = (model.steps, model.history, recorder.losses, recorder.batches)
    return state, numbers, grads, flags, metrics, rest


@pytest.mark.parametrize("predict", ["kernel", None])
@pytest.mark.parametrize("make", [Busy, BusyParts])
def test_training_is_the_same_to_the_bit(make, predict):
    kernel = KernelPrediction() if predict is None else KernelPrediction(refresh_every_n_steps=3)
    watch = monitor(every_n_steps=1, kernel=kernel, predict=predict)
    plain, watched = trained(make), trained(make, watch)
    assert len(watch.curves["step"]) == 13
    assert watch.curves["predicted"].isfinite().all(), "a monitor that gave up proves nothing"
    torch.testing.assert_close(watched[0], plain[0], rtol=0, atol=0)
    for a, b in zip(watched[1], plain[1], strict=True):
        assert a == b if isinstance(a, tuple) else np.array_equal(a, b)
    torch.testing.assert_close(watched[2:], plain[2:], rtol=0, atol=0)


def test_observed_is_the_loss_in_eval_mode():
    found = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            with torch.no_grad():
                x, y = digits()
                net = copy.deepcopy(pl_module.net).eval()
                settle_batch_norms(batch_norms(net).values(), partial(net, x))
                found[trainer.global_step] = float(F.cross_entropy(net(x).double(), y))

    watch = monitor(probe_size=96)
    fit(watch, Look(), model=Classifier(cnn), data=loader(shuffle=True))
    for step, observed in zip(*(watch.curves[k].tolist()[1:] for k in ("step", "observed")), strict=True):
        assert observed == pytest.approx(found[int(step)], rel=1e-6)  # outputs in single precision, in another order


# Loggers


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = monitor(figure=True, kernel=KernelPrediction(refresh_every_n_steps=4))
    fit(watch, logger=TensorBoardLogger(tmp_path, name="", version=""), max_epochs=2, default_root_dir=tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    steps = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if "loss_decay" in tag}
    for key in ("observed", "predicted", "relative_error"):
        assert steps.pop(f"loss_decay/{key}") == [0, 2, 4, 6, 8, 10, 12]
    for key in ("refreshed", "refreshed_error"):
        assert steps.pop(f"loss_decay/{key}") == [6, 8, 10, 12]
    assert steps.pop("loss_decay/kernel_drift") == [2, 4, 8]  # the next at most twice as far from the start: 16
    assert steps == {f"loss_decay/{key}": [12] for key in ("rate_ratio", "log_correlation", "valid_until")}
    observed = [e.value for e in events.Scalars("loss_decay/observed")]
    assert observed == pytest.approx(watch.curves["observed"].tolist(), rel=1e-6)  # TensorBoard keeps float32
    assert [(image.step, image.width, image.height) for image in events.Images("Loss_decay")] == [(12, 750, 555)]
    assert events.Tags()["images"] == ["Loss_decay"]  # capitals are at the top
    assert "custom_scalars__config__" not in events.Tags()["tensors"]
    assert len(list(tmp_path.glob("**/events*"))) == 1


def test_the_figure_is_drawn_a_few_times_while_training_goes_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = monitor(figure=True, every_n_steps=1)
    fit(watch, logger=TensorBoardLogger(tmp_path, name="", version=""), max_epochs=6, default_root_dir=tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("Loss_decay")] == [7, 15, 31, 36]


def test_exploding_predictions_are_not_logged(tmp_path, monkeypatch):
    curves = LossCurves([[0.0, 2.0, 2.0, math.nan], [1.0, 1.0, 4.0, 4.1]])
    values = {"observed": 1.0, "predicted": 4.0, "relative_error": 3.0, "refreshed": 4.1, "refreshed_error": 3.1}
    kept = {"observed": 1.0, "predicted": 4.0, "relative_error": 3.0}
    assert loss_chart.within_reach(values, curves) == kept
    assert loss_chart.within_reach({**values, "predicted": -math.inf, "kernel_drift": 0.1}, curves) == {
        "observed": 1.0, "kernel_drift": 0.1,
    }  # fmt: skip
    monkeypatch.setattr(loss_chart, "_REACH", 0.5)
    watch = monitor()
    fit(watch, logger=CSVLogger(tmp_path), default_root_dir=tmp_path)
    with open(next(tmp_path.glob("**/metrics.csv"))) as file:
        header = csv.DictReader(file).fieldnames
    assert "loss_decay/observed" in header
    assert not {"loss_decay/predicted", "loss_decay/relative_error"} & set(header)
    assert watch.curves["predicted"].isfinite().all()


def test_csv_and_files(tmp_path):
    watch = monitor(figure=True)
    trainer = fit(watch, logger=CSVLogger(tmp_path), default_root_dir=tmp_path)
    trainer.logger.save()
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["loss_decay/observed"]]
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 6]
    for key in ("observed", "predicted"):
        assert [float(row[f"loss_decay/{key}"]) for row in rows] == pytest.approx(watch.curves[key].tolist())
    (picture,) = tmp_path.glob("**/loss_decay/step_00000006.png")
    with np.load(picture.with_suffix(".npz")) as arrays:
        assert np.array_equal(arrays["observed"], watch.curves["observed"].numpy())


def test_fast_dev_run_and_no_logger(tmp_path):
    watch = monitor(figure=True, every_n_steps=1)
    fit(watch, fast_dev_run=True, default_root_dir=tmp_path)
    assert watch.curves["step"].tolist() == [0.0, 1.0]
    fit(monitor(figure=True), default_root_dir=tmp_path)
    assert list(tmp_path.glob("**/*.png"))


# Resuming


class Momentum(Classifier):
    def __init__(self):
        super().__init__(optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9))


class WithAdam(Classifier):
    def __init__(self):
        super().__init__(optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))


@pytest.mark.parametrize("stop", [7, 9, 12])
@pytest.mark.parametrize("make", [Momentum, WithAdam])
def test_resumed_is_uninterrupted(make, stop, tmp_path, caplog):
    def run(where, steps, ckpt_path=None):
        watch = monitor(kernel=KernelPrediction(refresh_every_n_steps=4, change_tolerance=1e-3))
        save = ModelCheckpoint(tmp_path / where, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
        logger = CSVLogger(tmp_path, name=where)
        options = {"max_epochs": -1, "max_steps": steps, "enable_checkpointing": True, "logger": logger}
        # One batch an epoch: Lightning begins the data anew when it resumes within an epoch.
        fit(watch, save, model=make(), data=loader(batch_size=96), ckpt_path=ckpt_path, **options)
        return watch

    whole = run("whole", 24)
    told = warned(caplog)
    assert [m for m in told if "no longer holds" in m] == told
    assert len(told) == 1
    caplog.clear()
    half = run("half", stop)
    saved = tmp_path / "half" / f"step={stop}.ckpt"
    assert torch.load(saved, weights_only=True)["callbacks"]["LossDecayMonitor"]["curves"]["rows"].shape[1] == 8
    again = run("again", 24, ckpt_path=saved)
    for name, values in whole.curves.items():
        assert torch.equal(values.nan_to_num(-1), again.curves[name].nan_to_num(-1)), name
    assert again.invalid_from == whole.invalid_from
    assert warned(caplog) == told, "said once, by whichever part came to it"
    torch.testing.assert_close(again.metric.compute(), whole.metric.compute(), rtol=0, atol=0)
    assert half.curves["step"].tolist() == [s for s in whole.curves["step"].tolist() if s <= stop]


def checkpoint(tmp_path, *callbacks, model=None, **kwargs):
    trainer = fit(*callbacks, model=model or Momentum(), **kwargs)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("make", [Momentum, WithAdam])
def test_new_in_a_run_that_goes_on(make, tmp_path):
    path = checkpoint(tmp_path, model=make(), max_epochs=3)
    watch = monitor()
    fit(watch, model=make(), max_epochs=4, ckpt_path=path)
    assert watch.curves["step"].tolist() == [18.0, 20.0, 22.0, 24.0]
    assert watch.curves["predicted"].isfinite().all()
    assert watch.curves["predicted"][0] == watch.curves["observed"][0]


@pytest.mark.parametrize(
    "other", [{"probe_size": 32}, {"probe_seed": 5}, {"kernel": KernelPrediction(ntk="graphon")}], ids=next_key
)
def test_a_checkpoint_of_other_settings_starts_anew(other, tmp_path, caplog):
    path = checkpoint(tmp_path, monitor(), max_epochs=1)
    watch = monitor(**other)
    fit(watch, model=Momentum(), max_epochs=2, ckpt_path=path)
    (message,) = [m for m in warned(caplog) if "starts anew" in m]
    assert "starts anew at step 6" in message
    assert {"kernel": "ntk"}.get(next_key(other), next_key(other)) in message
    assert watch.curves["step"].tolist() == [6.0, 8.0, 10.0, 12.0]
    assert watch.curves["predicted"].isfinite().all()


def test_a_checkpoint_of_other_data_starts_anew(tmp_path, caplog):
    path = checkpoint(tmp_path, monitor(), max_epochs=1)
    x, y = digits(96)
    data = DataLoader(torch.utils.data.TensorDataset(x, (y + 1) % 10), 16)
    watch = monitor()
    fit(watch, model=Momentum(), data=data, max_epochs=2, ckpt_path=path)
    assert any("starts anew at step 6" in m and "training data" in m for m in warned(caplog))
    assert watch.curves["step"].tolist() == [6.0, 8.0, 10.0, 12.0]


def test_what_was_given_up_stays_given_up(tmp_path):
    """The observed curve goes on, and no prediction begins in the middle."""
    path = checkpoint(tmp_path, monitor(), model=Autocast(), max_epochs=1)
    watch = monitor()
    fit(watch, model=Autocast(), max_epochs=2, ckpt_path=path)
    assert watch.curves["step"].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert watch.curves["observed"].isfinite().all()
    assert watch.curves["predicted"].isnan().all()


class Autocast(Classifier):
    """Its loss holds the weights themselves."""

    def __init__(self):
        super().__init__(optimizer=sgd)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 1e-3 * self.net[0].weight.square().sum()


def test_a_second_fit_starts_anew():
    watch = monitor()
    fit(watch)
    first = watch.curves
    fit(watch)
    torch.testing.assert_close(watch.curves, first, equal_nan=True)
    assert int(watch.metric.points) == len(first["step"])


def test_the_same_trainer_goes_on():
    """Optimizers are new then: Adam's prediction begins ten steps later."""
    watch = monitor()
    model = WithAdam()
    trainer = fit(watch, model=model, max_epochs=2)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(model, loader())
    curves = watch.curves
    assert curves["step"][0] == 12
    assert curves["step"][curves["predicted"].isfinite()].tolist() == [22.0, 24.0, 26.0, 28.0, 30.0]


def test_copies_and_pickles():
    watch = monitor(kernel=KernelPrediction(change_tolerance=1e-6))
    fit(watch)
    assert watch.invalid_from == 2
    for twin in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        torch.testing.assert_close(twin.curves, watch.curves, equal_nan=True)
        assert twin.invalid_from == 2
        assert "Classifier" not in repr(pickle.dumps(twin)), "no module is taken along"
        fit(twin)
        torch.testing.assert_close(twin.curves, watch.curves, equal_nan=True)


def test_the_logged_end_of_a_prediction_is_the_one_that_was_said(tmp_path):
    """The kernel moves before the error passes its tolerance: console, picture, log and report name one step."""
    watch, logger = monitor(tolerance=10.0, kernel=KernelPrediction(change_tolerance=1e-6)), CSVLogger(tmp_path)
    fit(watch, logger=logger)
    assert watch.metric.compute()["valid_until"] == 6, "errors alone would have let it pass"
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for key, step in (("valid_until", watch.valid_until), ("invalid_from", watch.invalid_from)):
        assert [float(row[f"loss_decay/{key}"]) for row in rows if row[f"loss_decay/{key}"]] == [step]
    assert (watch.valid_until, watch.invalid_from) == (0, 2)


def test_a_prediction_that_holds_has_no_step_from_which_it_did_not(tmp_path):
    watch, logger = monitor(tolerance=10.0, kernel=KernelPrediction(change_tolerance=10.0)), CSVLogger(tmp_path)
    fit(watch, logger=logger)
    assert (watch.valid_until, watch.invalid_from) == (6, None)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "loss_decay/valid_until" in text
    assert "invalid_from" not in text


# What cannot be predicted, and odd data


class IgnoresOutputs(Classifier):
    def training_step(self, batch, batch_idx):
        self(batch[0])
        return self.net[0].weight.square().sum()


class Branches(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss > 2.0 else 3 * loss


class Noisy(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self(x)
        return F.cross_entropy(outputs + torch.randn_like(outputs), y)


class UnknownOptimizer(Classifier):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Gan, "there are 2 optimizers"),
        (Autocast, "depends on weights otherwise than through the network's outputs"),
        (IgnoresOutputs, "does not depend on the network's outputs"),
        (Branches, "branche"),
        (Noisy, "something else each time"),
        (UnknownOptimizer, "Adagrad cannot be told in function space"),
    ],
)
def test_one_sentence_and_the_observed_curve(make, why, caplog):
    watch = monitor()
    fit(watch, model=make())
    (message,) = warned(caplog)
    assert why in message
    every = [0.0, 2.0, 4.0, 6.0] if make is not Gan else [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert watch.curves["step"].tolist() == every
    assert watch.curves["observed"].isfinite().all()
    assert watch.curves["predicted"].isnan().all() or make is Branches
    assert watch.invalid_from is None


@pytest.mark.parametrize("options", [{"ntk": "graphon"}, {"start_step": 0}], ids=str)
def test_no_kernel_is_said_in_one_sentence(options, caplog):
    watch = monitor(kernel=KernelPrediction(**options))
    # Of a maximum over neighbours no limit is known.
    pooled = lambda: nn.Sequential(*list(cnn())[:2], nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))  # noqa: E731
    fit(watch, model=Classifier(pooled, sgd) if "ntk" in options else WithAdam())
    (message,) = warned(caplog)
    assert "predicts nothing from step 0 on: there is no" in message
    assert watch.curves["observed"].isfinite().all()
    assert len(watch.curves["step"]) == 4


def test_new_parameter_groups(caplog):
    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                trainer.optimizers[0].add_param_group({"params": pl_module.net[4].parameters()})

    model = Classifier(optimizer=lambda p: torch.optim.SGD(list(p)[:4], lr=0.01))
    watch = monitor()
    fit(watch, Unfreeze(), model=model)
    (message,) = warned(caplog)
    assert "2 parameter groups" in message
    assert watch.curves["step"].tolist() == [0.0, 2.0, 4.0, 6.0]


def test_outputs_with_structure():
    class Tokens(Classifier):
        def __init__(self):
            super().__init__(lambda: nn.Sequential(nn.Unflatten(1, (4, 16)), nn.Linear(16, 10)), sgd)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x).transpose(1, 2), y[:, None].expand(-1, 4))

    watch = monitor(probe_size=48)
    fit(watch, model=Tokens(), data=loader(48, 48), max_epochs=6)
    # Linear in its parameters and all of its data: exact to single precision.
    torch.testing.assert_close(watch.curves["predicted"], watch.curves["observed"], rtol=1e-5, atol=0)


def test_too_many_outputs_are_predicted_from_part_of_them(caplog):
    watch = monitor(probe_size=96)
    fit(watch, model=Classifier(lambda: nn.Sequential(nn.Linear(64, 320), nn.Unflatten(1, (32, 10)), Pool()), sgd))
    assert watch.curves["predicted"].isfinite().all()
    many = Classifier(lambda: nn.Sequential(nn.Linear(64, 320), nn.Unflatten(1, (10, 32))), sgd)
    many.training_step = lambda batch, batch_idx: F.cross_entropy(many(batch[0]).mean(2), batch[1])
    fit(watch, model=many)
    assert watch.curves["predicted"].isfinite().all()
    watch = monitor(probe_size=96, kernel=KernelPrediction(full=True))
    fit(watch, model=many)
    assert "give a smaller probe_size" in warned(caplog)[-1]


class Pool(nn.Module):
    def forward(self, x):
        return x.mean(1)


def test_a_prediction_that_explodes_at_once_leaves_a_line_keys_and_no_stale_error(capsys, monkeypatch):
    monkeypatch.setattr(loss_tracker, "_DIVERGED", 0.0)
    kernel = KernelPrediction(change_tolerance=1e-12, change_every_n_steps=1)
    watch = monitor(verbose=True, kernel=kernel)
    trainer = fit(watch, max_epochs=2)
    assert watch.curves["predicted"].isfinite().tolist() == [True] + [False] * 6
    assert trainer.callback_metrics["loss_decay/relative_error"] == math.inf
    assert trainer.callback_metrics["loss_decay/invalid_from"] == watch.invalid_from == 2
    assert "held at step 0, no longer at step 2, far above every loss" in " ".join(capsys.readouterr().out.split())


def test_a_loss_that_becomes_nan(caplog):
    model = Classifier(optimizer=lambda p: torch.optim.SGD(p, lr=1e6))
    watch = monitor(kernel=KernelPrediction(refresh_every_n_steps=2))
    fit(watch, model=model, max_epochs=2)
    assert watch.curves["step"].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert len(warned(caplog)) == 1
    assert "from step 2 on the prediction of the start no longer holds" in warned(caplog)[0]


class Stream(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        x, y = digits()
        yield from zip(x[: self.n], y[: self.n], strict=True)


def test_data_without_a_length():
    watch = monitor()
    fit(watch, data=DataLoader(Stream(96), 16))
    assert watch.curves["step"].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert watch.curves["predicted"].isfinite().all()


@pytest.mark.parametrize("fatal", [True, False])
def test_no_data(fatal, caplog):
    fit(monitor(), data=loader(0))
    assert not warned(caplog), "Lightning itself skips the fit"
    if fatal:
        with pytest.raises(ValueError, match="training data"):
            fit(monitor(), data=DataLoader(Stream(0), 16))
    else:
        fit(monitor(raise_errors=False), data=DataLoader(Stream(0), 16))
        assert "training goes on without it" in caplog.text


def test_a_short_fit_is_compared_at_its_end(capsys):
    """Of a fit that ends before the next measurement there is more to say than that the start agrees with itself."""
    watch = monitor(every_n_steps=100, verbose=True, kernel=KernelPrediction(start_step=2))
    fit(watch)
    assert watch.curves["step"].tolist() == [0.0, 2.0, 6.0]
    assert "Median errors: kernel" in capsys.readouterr().out
    wrong = monitor(every_n_steps=100, tolerance=1e-9, verbose=True, kernel=KernelPrediction(start_step=2))
    fit(wrong)
    assert "held at step 2, no longer at step 6" in capsys.readouterr().out
    late = monitor(every_n_steps=100, verbose=True, kernel=KernelPrediction(start_step=6))
    fit(late)
    assert late.curves["step"].tolist() == [0.0, 6.0]
    assert "points" not in capsys.readouterr().out, "nothing was predicted but the last step from itself"


def test_a_probe_larger_than_the_data():
    watch = monitor(probe_size=500)
    fit(watch)
    assert "96 training samples" in watch.plot()._suptitle.get_text()


@pytest.mark.parametrize("fatal", [True, False])
def test_an_error_in_the_analysis(fatal, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("broken kernel")

    monkeypatch.setattr("lightning_graphon.dynamics.optimizer_kernels.kronecker_ntk", broken)
    if fatal:
        with pytest.raises(RuntimeError, match="broken kernel"):
            fit(monitor())
        return
    assert fit(monitor(raise_errors=False)).global_step == 6
    assert "broken kernel" in caplog.text


def test_several_steps_in_a_batch():
    """Every third step falls between batches of two: the loss is measured at the next end of a batch."""

    class ByHand(Classifier):
        def __init__(self):
            super().__init__(optimizer=sgd)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                self.optimizers().zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                self.optimizers().step()

    watch = monitor(every_n_steps=3)
    fit(watch, model=ByHand())
    assert watch.curves["step"].tolist() == [0.0, 4.0, 6.0, 10.0, 12.0]


def test_refreshes_between_measurements():
    """The loss is measured at refreshes too, whatever the other cadence."""
    watch = monitor(every_n_steps=4, kernel=KernelPrediction(refresh_every_n_steps=3))
    fit(watch)
    assert watch.curves["step"].tolist() == [0.0, 3.0, 4.0, 6.0]
    assert watch.curves["refreshed"].isfinite().tolist() == [False, False, True, True]


def test_loss_fn():
    watch = monitor(loss_fn=lambda module, batch: F.mse_loss(module(batch[0]), torch.ones(len(batch[1]), 10)))
    fit(watch)
    x, _ = digits(24)
    expected = F.mse_loss(Classifier()(x), torch.ones(24, 10))
    assert float(watch.curves["observed"][0]) == pytest.approx(float(expected), rel=1e-6)


def test_layers_frozen_in_the_middle(caplog):
    class Freezes(Classifier):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch == 0)

    watch = monitor(every_n_steps=1, tolerance=10.0, kernel=KernelPrediction(change_tolerance=0.2))
    fit(watch, model=Freezes(optimizer=sgd), max_epochs=2)
    assert len(watch.curves["step"]) == 13
    assert any("kernel has moved" in text for text in warned(caplog))


def test_several_networks_in_a_row():
    watch = monitor(kernel=KernelPrediction(start_step=1))
    fit(watch, model=Autoencoder())
    assert watch.curves["step"].tolist() == [0.0, 1.0, 2.0, 4.0, 6.0]
    assert watch.curves["predicted"][1].isfinite()


def test_exploded_predictions_are_not_drawn(monkeypatch):
    """From the step on where they exceed ten times every loss seen, and never again."""
    predicted = iter([2.0, 2.0, 1000.0, 1000.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(Forecast, "loss", property(lambda forecast: next(predicted)))
    watch = monitor(tolerance=5.0)
    fit(watch)
    finite = watch.curves["predicted"].isfinite().tolist()
    assert finite[:2] == [True, True]
    assert not any(finite[2:])
    assert watch.invalid_from == watch.curves["step"][2]
    steps = watch._session.tracker.initial.predictor.steps
    assert steps == watch.invalid_from, "nothing is computed for them any more"


def two_rates(parameters):
    """One of them falls to a tenth in the middle."""
    first, *rest = parameters
    return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.01}], lr=0.1, momentum=0.5)


class Falling(Classifier):
    def __init__(self):
        super().__init__(optimizer=two_rates)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda k: 1.0 if k < 8 else 0.1, lambda k: 1.0])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("stop", [None, 7])
def test_drift_and_refreshes_go_on_after_an_explosion(stop, monkeypatch, tmp_path):
    """Also in a run that was resumed: neither asks what the exploded prediction thinks of later steps."""

    def run(**kwargs):
        kernel = KernelPrediction(change_every_n_steps=1, refresh_every_n_steps=4, **kwargs)
        logged, watch = [], monitor(every_n_steps=1, kernel=kernel)
        monkeypatch.setattr(loss_session, "log_scalars", lambda trainer, scalars: logged.append(scalars))
        model, data, path = Falling(), loader(batch_size=96), tmp_path / "stop.ckpt"
        if stop:
            fit(watch, model=model, data=data, max_epochs=stop).save_checkpoint(path)
        fit(watch, model=model, data=data, max_epochs=12, ckpt_path=path if stop else None)
        return watch, [row["loss_decay/kernel_drift"] for row in logged if "loss_decay/kernel_drift" in row]

    drifts = run()[1]
    monkeypatch.setattr(loss_tracker, "_DIVERGED", 0.0)
    exploded, others = run(change_tolerance=1e-12)
    assert exploded.curves["predicted"].isfinite().tolist() == [k < 1 for k in range(13)]
    assert len(drifts) == 12
    assert others == drifts
    assert exploded.curves["refreshed"][5:].isfinite().all()
    watch = exploded._session.tracker
    again = Forecast.from_state(watch.initial.state_dict(), watch.loss, watch.pool_loss, torch.device("cpu"))
    assert again.ratios == watch.initial.ratios
    assert again.ratios[1] == pytest.approx(1.0), "0.1 at the start"


# Pruned


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("method", ["snip", "synflow"])
def test_pruned_networks_in_the_lazy_regime(method, first):
    pruner = quiet(method, batches=3)
    # Networks of this width move; a small learning rate over 150 steps keeps them lazy.
    watch = monitor(probe_size=96, every_n_steps=30)
    model = Classifier(lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                                             nn.Linear(256, 10)), lambda p: torch.optim.SGD(p, lr=0.02))  # fmt: skip
    callbacks = (pruner, watch) if first else (watch, pruner)
    fit(*callbacks, model=model, data=loader(shuffle=True), max_epochs=25)
    curves = watch.curves
    assert curves["step"][-1] == 150
    errors = (curves["predicted"] / curves["observed"] - 1).abs()
    assert float(errors.max()) < 0.06  # design.md: minibatch training within a few per cent
    assert watch.invalid_from is None


def test_the_first_fall_after_snip_is_nearly_that_of_the_full_kernel():
    """Its masks make outputs mix: the mean of their own kernels misses three tenths of the fall."""
    speeds = {}
    for full in (False, True):
        watch = monitor(probe_size=96, kernel=KernelPrediction(full=full))
        fit(quiet("snip"), watch, model=Classifier(he_init, sgd), max_epochs=1)
        forecast = watch._session.tracker.initial
        speeds[full] = forecast._predictor(forecast.kernels).speed
    kernel = forecast.kernels[0].diagonal(dim1=1, dim2=3).mean(2)
    mean = LossDecayPredictor(kernel, forecast.outputs, None, forecast._loss).speed
    missed, missed_by_mean = (abs(speed / speeds[True] - 1) for speed in (speeds[False], mean))
    assert missed_by_mean > 0.25
    assert missed < missed_by_mean / 2  # measured: 0.12 and 0.31


def he_init():
    """Weights that keep the scale of the signal; the last layer's too."""
    net = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )  # fmt: skip
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return net


def test_random_pruning_leaves_the_lazy_regime(caplog):
    """The kernel moves: said once, before the prediction is far off; predictions from fresh kernels hold."""
    watch = monitor(probe_size=96, every_n_steps=5, kernel=KernelPrediction(refresh_every_n_steps=20))
    model = Classifier(he_init, lambda p: torch.optim.SGD(p, lr=0.3))
    fit(quiet("random"), watch, model=model, data=loader(shuffle=True), max_epochs=27)
    curves = watch.curves
    errors = (curves["predicted"] / curves["observed"] - 1).abs()
    past = curves["step"][errors > 0.25]
    assert len(past), "the prediction of the start must fail for this test to say anything"
    assert watch.invalid_from is not None
    assert watch.invalid_from < float(past[0])
    assert len([m for m in warned(caplog) if "no longer holds" in m]) == 1
    refreshed = (curves["refreshed"] / curves["observed"] - 1).abs()
    assert float(refreshed[refreshed.isfinite()].max()) < 0.1
    assert float(refreshed[-1]) < float(errors[-1])


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown ntk 'empiric'.*'empirical'"):
        LossDecayMonitor(kernel=KernelPrediction(ntk="empiric"))
    for name in ("probe_size", "every_n_steps", "tolerance"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            LossDecayMonitor(**{name: 0})
    for name in ("change_every_n_steps", "refresh_every_n_steps", "change_tolerance"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            KernelPrediction(**{name: 0})
    with pytest.raises(ValueError, match="start_step must be 0 or more"):
        LossDecayMonitor(kernel=KernelPrediction(start_step=-1))
    with pytest.raises(RuntimeError, match="has made no prediction"):
        LossDecayMonitor().plot()
