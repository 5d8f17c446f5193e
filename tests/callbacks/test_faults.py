"""What goes wrong around training: it is said aloud, and no training is lost because of an analysis."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_graphon.callbacks import SpectrumOptions
from lightning_graphon.callbacks._analysis.loss_session import LossSession
from tests.callbacks.test_model_matrix import Recorder, all_three, fit
from tests.helpers.kinds import Kind, small_sgd
from tests.helpers.modules import Classifier, Gan, digits, loader, make_trainer, mlp, pruned_max, quiet

MLP = Kind(lambda: Classifier(mlp, small_sgd))
STEPS = 12


def same_batches():
    # Lightning takes up an epoch's batches from its first one: let all be the same.
    return DataLoader([next(iter(loader()))] * 5, batch_size=None)


def run(folder, *callbacks, ckpt_path=None, steps=STEPS):
    """Fit twelve steps of five a epoch; what was logged."""
    logger = Recorder()
    trainer = make_trainer(
        *callbacks, logger=logger, log_every_n_steps=1, max_epochs=-1, max_steps=steps, limit_train_batches=1.0,
        default_root_dir=folder, enable_checkpointing=True,
    )  # fmt: skip
    trainer.fit(Classifier(mlp, small_sgd), same_batches(), ckpt_path=ckpt_path)
    return logger


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}]
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tests.callbacks.test_faults import all_three, run

class Kill(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

folder = sys.argv[1]
run(folder, *all_three(), ModelCheckpoint(folder, every_n_train_steps=7, filename="{{step}}"), Kill())
"""


def test_killed_in_the_middle_of_an_epoch_and_resumed(tmp_path):
    """Masks, metrics and their steps are those of a run that nothing interrupted."""
    here = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", KILLED.format(here=here), str(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr[-2000:]

    whole, resumed = all_three(), all_three()
    expected = run(tmp_path / "whole", *whole)
    logged = run(tmp_path / "resumed", *resumed, ckpt_path=tmp_path / "step=7.ckpt")
    assert resumed[0].masks == whole[0].masks
    for key in ("observed", "predicted", "relative_error", "kernel_drift", "rate_ratio", "log_correlation"):
        rest = {step: value for step, value in expected.series(f"loss_decay/{key}").items() if step > 7}
        assert logged.series(f"loss_decay/{key}") == pytest.approx(rest, rel=1e-9), key
        assert rest
    for key in ("ntk/trace", "ntk/lambda_max"):
        assert logged.series(key)[STEPS] == pytest.approx(expected.series(key)[STEPS], rel=1e-9)
    torch.testing.assert_close(resumed[2].curves, whole[2].curves, rtol=1e-9, atol=0, equal_nan=True)


class Stream(IterableDataset):
    """Digits without a length."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        x, y = digits()
        return iter([(x[i], y[i]) for i in range(self.count)])


DATA = {
    "one batch": lambda: loader(8, batch_size=16),
    "one sample": lambda: loader(1, batch_size=16),
    "without a length": lambda: DataLoader(Stream(48), batch_size=16),
    "workers": lambda: loader(48, num_workers=1),
    "persistent workers": lambda: loader(48, num_workers=1, persistent_workers=True),
    "a last batch of one": lambda: loader(17, batch_size=16),
}


@pytest.mark.parametrize("name", DATA)
def test_data_of_every_sort(name, tmp_path):
    prune, graphons, losses = all_three()
    model, _, logger = fit(Kind(MLP.build, DATA[name]), prune, graphons, losses, default_root_dir=tmp_path)
    assert pruned_max(model, prune.masks) == 0.0
    assert graphons.spectrum is not None
    assert logger.series("loss_decay/predicted")


@pytest.mark.parametrize("method", ["magnitude", "synflow"])
def test_an_empty_dataloader_trains_nothing_and_breaks_nothing(method, tmp_path):
    prune, graphons, losses = all_three(method)
    losses.raise_errors = False
    kind = Kind(MLP.build, lambda: DataLoader(Stream(0), batch_size=16))
    _, trainer, _ = fit(kind, prune, graphons, losses, default_root_dir=tmp_path)
    assert trainer.global_step == 0
    assert prune.masks.sparsity == pytest.approx(0.5, abs=0.01)


class Diverges(Classifier):
    """Its loss is no number from the third batch on."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        return loss * torch.nan if self.trainer.global_step >= 2 else loss


def test_a_loss_that_becomes_nan_is_said_and_not_fatal(tmp_path, caplog):
    prune, graphons, losses = all_three()
    losses.raise_errors = False
    with caplog.at_level(logging.WARNING, logger="lightning_graphon"):
        model, trainer, _ = fit(
            Kind(lambda: Diverges(mlp, small_sgd)), prune, graphons, losses, default_root_dir=tmp_path,
            max_epochs=2,
        )  # fmt: skip
    assert trainer.global_step == 6
    assert pruned_max(model, prune.masks) == 0.0
    assert "GraphonMonitor failed" in caplog.text  # the kernel at the end is no number
    assert "LossDecayMonitor" in caplog.text


def test_out_of_memory_in_the_kernel_takes_smaller_chunks_and_says_so(tmp_path, monkeypatch):
    from lightning_graphon.ntk.empirical import kernel as empirical

    whole = empirical._sum_tiles

    def tight(task, budget, chunk):
        if chunk > 1:
            raise MemoryError("full")
        return whole(task, budget, chunk)

    monkeypatch.setattr(empirical, "_sum_tiles", tight)
    prune, graphons, losses = all_three()
    graphons.spectrum_options = SpectrumOptions(ntk="empirical", probe_size=4)
    with pytest.warns(UserWarning, match="ran out of memory with 4 samples at a time and went on with 1"):
        fit(MLP, prune, graphons, losses, default_root_dir=tmp_path)
    assert graphons.spectrum is not None
    assert losses._session.tracker.initial is not None


def test_out_of_memory_for_good_loses_the_analysis_and_not_the_training(tmp_path, monkeypatch, caplog):
    from lightning_graphon.ntk.empirical import kernel as empirical

    def full(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(empirical, "_sum_tiles", full)
    prune, graphons, losses = all_three()
    graphons.spectrum_options, losses.raise_errors = SpectrumOptions(ntk="empirical"), False
    with caplog.at_level(logging.ERROR, logger="lightning_graphon"):
        model, trainer, _ = fit(MLP, prune, graphons, losses, default_root_dir=tmp_path)
    assert trainer.global_step == 3
    assert pruned_max(model, prune.masks) == 0.0
    assert "GraphonMonitor failed at step 0" in caplog.text
    assert "LossDecayMonitor failed at step 1" in caplog.text


def test_a_log_directory_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("no directory")
    prune, graphons, losses = all_three()
    graphons.figure = losses.figure = True
    losses.raise_errors = False
    with caplog.at_level(logging.ERROR, logger="lightning_graphon"):
        model, trainer, _ = fit(MLP, prune, graphons, losses, default_root_dir=tmp_path / "file" / "below")
    assert trainer.global_step == 3
    assert pruned_max(model, prune.masks) == 0.0
    assert list(graphons.graphons) == list(prune.masks)
    assert losses.curves["predicted"].isfinite().any()
    assert {r.name.rpartition(".")[2] for r in caplog.records} == {"graphon_monitor", "loss_decay_monitor"}


def saved(tmp_path, *callbacks):
    run(tmp_path, *callbacks, ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="{step}"), steps=3)
    return tmp_path / "step=3.ckpt"


def test_half_a_checkpoint_is_an_error(tmp_path):
    path = saved(tmp_path, *all_three())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((RuntimeError, OSError)):  # torch's own words
        run(tmp_path / "again", *all_three(), ckpt_path=path)


def rewrite(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["callbacks"])
    torch.save(checkpoint, path)


DAMAGE = {
    "too few bits": lambda masks: {name: {**entry, "bits": entry["bits"][:-1]} for name, entry in masks.items()},
    "no shape": lambda masks: {name: {"bits": entry["bits"]} for name, entry in masks.items()},
    "another model's layer": lambda masks: {f"other.{name}": entry for name, entry in masks.items()},
    "one bit": lambda masks: {
        n: {**e, "bits": e["bits"].clone().index_fill_(0, torch.tensor(0), 7)} for n, e in masks.items()
    },
    "a layer lost": lambda masks: dict(list(masks.items())[1:]),
    "nothing": lambda masks: None,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_masks_end_the_fit(name, tmp_path):
    path = saved(tmp_path, *all_three())

    def damage(states):
        state = next(state for key, state in states.items() if key.startswith("PruneAtInit"))
        state["masks"] = DAMAGE[name](state["masks"])

    rewrite(path, damage)
    with pytest.raises(ValueError, match=r"[Mm]ask|bytes"):
        run(tmp_path / "again", *all_three(), ckpt_path=path)


FOREIGN = {
    "of something else": lambda state: {"something": "else"},
    "no rows": lambda state: {**state, "curves": {**state["curves"], "rows": "none"}},
    "rows of another length": lambda state: {**state, "curves": {**state["curves"], "rows": torch.ones(2, 3)}},
    "no forecast": lambda state: {**state, "tracker": 3},
    "half a forecast": lambda state: {**state, "tracker": {"initial": state["tracker"]["initial"]}},
    "no settings": lambda state: {key: value for key, value in state.items() if key != "settings"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_state_of_the_monitor_is_left_with_a_word(name, tmp_path, caplog):
    path = saved(tmp_path, *all_three())
    rewrite(path, lambda states: states.update({"LossDecayMonitor": FOREIGN[name](states["LossDecayMonitor"])}))
    prune, graphons, losses = all_three()
    with caplog.at_level(logging.WARNING, logger="lightning_graphon"):
        logger = run(tmp_path / "again", prune, graphons, losses, ckpt_path=path)
    assert caplog.text.count("LossDecayMonitor starts anew") == 1
    assert list(logger.series("loss_decay/observed")) == list(range(3, STEPS + 1))
    assert logger.series("loss_decay/predicted")


@pytest.mark.parametrize("build", [MLP.build, Gan], ids=["mlp", "gan"])
def test_a_callback_of_the_user_that_raises_leaves_the_module_clean(build, tmp_path):
    class Raises(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                raise ZeroDivisionError("mine")

    callbacks, model = all_three(), build()
    with pytest.raises(ZeroDivisionError, match="mine"):
        make_trainer(*callbacks, Raises(), default_root_dir=tmp_path).fit(model, loader(48))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    make_trainer(*all_three(), default_root_dir=tmp_path).fit(model, loader(48))


@pytest.mark.parametrize("part", ["begin", "advance", "look", "agreement"])
def test_whatever_breaks_in_the_loss_monitor_is_reported(part, tmp_path, monkeypatch, caplog):
    prune, graphons, losses = all_three()
    losses.raise_errors = False

    def broken(*args):
        raise RuntimeError("broken part")

    monkeypatch.setattr(LossSession, part, broken)
    with caplog.at_level(logging.ERROR, logger="lightning_graphon"):
        _, trainer, _ = fit(MLP, prune, graphons, losses, default_root_dir=tmp_path)
    assert trainer.global_step == 3
    assert caplog.text.count("LossDecayMonitor failed") == 1
    assert "broken part" in caplog.text


def test_an_error_in_pruning_ends_the_fit(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("broken score")

    monkeypatch.setattr("lightning_graphon.callbacks._module.scoring.compute_masks", broken)
    with pytest.raises(RuntimeError, match="broken score"):
        fit(MLP, *all_three(), default_root_dir=tmp_path)


def test_the_trainer_of_the_other_package_is_refused():
    other = pytest.importorskip("pytorch_lightning")
    trainer = other.Trainer(callbacks=[quiet("snip")], accelerator="cpu", logger=False, enable_checkpointing=False)

    class Model(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)

        def training_step(self, batch):
            return self.layer(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match="the Trainer comes from pytorch_lightning.*import lightning.pytorch as pl"):
        trainer.fit(Model(), loader())
