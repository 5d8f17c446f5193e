"""Fit twice, tune, validate, copy, average, compile: the masks stay, and nothing of the callback lingers."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner

from lightning_graphon.callbacks import LossDecayMonitor
from tests.helpers.modules import METHODS, Classifier, Gan, Probe, cnn, loader, make_trainer, pruned_max, quiet, sgd

CLEAN = {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}


def hooks(model):
    """How many hooks of any sort hang on a module and its parameters."""
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return count + sum(len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_fit_twice_keeps_the_masks(method):
    pruner, model = quiet(method), Classifier()
    probe = Probe(pruner)
    make_trainer(pruner).fit(model, loader())
    first = pruner.masks
    make_trainer(pruner, probe).fit(model, loader(shuffle=True), loader(32))
    assert pruner.masks is first
    assert probe.worst == CLEAN


def test_another_module_is_pruned_anew():
    pruner, a, b = quiet("magnitude"), Classifier(seed=1), Classifier(seed=2)
    make_trainer(pruner).fit(a, loader())
    first = pruner.masks
    make_trainer(pruner).fit(b, loader())
    assert pruner.masks != first
    assert pruned_max(b, pruner.masks) == 0.0
    alone = quiet("magnitude")
    make_trainer(alone).fit(Classifier(seed=2), loader())
    assert pruner.masks == alone.masks


def test_fit_validate_test_fit():
    pruner, model = quiet("snip"), Classifier()
    trainer = make_trainer(pruner, Probe(pruner))
    trainer.fit(model, loader(), loader(32))
    first = pruner.masks
    trainer.validate(model, loader(32), verbose=False)
    trainer.test(model, loader(32), verbose=False)
    assert pruned_max(model, first) == 0.0
    trainer.fit_loop.max_epochs = 2
    probe = trainer.callbacks[1]
    trainer.fit(model, loader(), loader(32))
    assert trainer.global_step == 6
    assert pruner.masks is first
    assert probe.worst == CLEAN
    assert pruned_max(model, first) == 0.0


def test_validate_and_test_alone_prune_nothing():
    pruner, model = quiet("snip"), Classifier()
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(pruner)
    trainer.validate(model, loader(32), verbose=False)
    trainer.test(model, loader(32), verbose=False)
    assert pruner.masks is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class WithRate(Classifier):
    lr = 1e-3

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def test_learning_rate_finder(tmp_path):
    pruner, model = quiet("snip"), WithRate()
    probe = Probe(pruner)
    trainer = make_trainer(pruner, probe, limit_train_batches=6, default_root_dir=tmp_path)
    found = Tuner(trainer).lr_find(model, loader(), num_training=10, early_stop_threshold=None)
    assert len(found.results["lr"]) >= 6
    trainer.fit(model, loader(), loader(32))
    assert probe.worst == CLEAN
    alone = quiet("snip")
    make_trainer(alone).fit(WithRate(), loader())
    assert pruner.masks == alone.masks
    assert trainer.global_step == 6


def test_fast_dev_run():
    pruner, model = quiet("snip"), Classifier()
    trainer = make_trainer(pruner, fast_dev_run=True)
    trainer.fit(model, loader(), loader(32))
    assert trainer.global_step == 1
    assert pruned_max(model, pruner.masks) == 0.0


def test_barebones_and_overfit_batches():
    for kwargs in ({"barebones": True, "enable_checkpointing": None, "logger": None}, {"overfit_batches": 2}):
        pruner, model = quiet("snip"), Classifier()
        extra = {"enable_progress_bar": False, "enable_model_summary": False} if "barebones" in kwargs else {}
        make_trainer(pruner, **kwargs, **extra).fit(model, loader())
        assert pruned_max(model, pruner.masks) == 0.0
        assert pruner.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_overfit_batches_are_the_only_data_that_is_looked_at():
    pruner, same = quiet("snip"), quiet("snip", batches=list(loader())[:2])
    monitor = LossDecayMonitor(
        predict="kernel", probe_size=64, every_n_steps=1, figure=False, verbose=False, raise_errors=True
    )
    trainer = make_trainer(pruner, monitor, overfit_batches=2, limit_train_batches=None, max_epochs=2)
    trainer.fit(Classifier(), loader(shuffle=True))
    make_trainer(same).fit(Classifier(), loader())
    assert pruner.masks == same.masks
    forecast = monitor._session.tracker.initial
    assert len(forecast.outputs) == 32
    assert forecast.pool is None


@pytest.mark.parametrize("make", [Classifier, Gan])
def test_nothing_hangs_on_the_module_after_fit(make):
    model = make()
    before, attributes = hooks(model), set(model.__dict__)
    trainer = make_trainer(quiet("snip"))
    trainer.fit(model, loader())
    assert hooks(model) == before
    assert set(model.__dict__) <= attributes | {"_hparams"}
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_load_state_dict_post_hooks


def test_nothing_hangs_on_the_module_after_an_exception():
    class Fails(Callback):
        def on_train_batch_end(self, *args):
            raise ZeroDivisionError

    model, pruner = Classifier(), quiet("snip")
    before = hooks(model)
    with pytest.raises(ZeroDivisionError):
        make_trainer(pruner, Fails()).fit(model, loader())
    assert hooks(model) == before
    # And the same callback goes on afterwards, with its masks.
    masks = pruner.masks
    make_trainer(pruner).fit(model, loader())
    assert pruner.masks is masks
    assert pruned_max(model, masks) == 0.0


@pytest.mark.parametrize("order", range(3))
def test_any_order_with_checkpoints_gives_the_same(order, tmp_path):
    def run(folder, order):
        pruner = quiet("snip")
        others = [pruner, ModelCheckpoint(folder, filename="end"), Probe(pruner)]
        callbacks = others[order:] + others[:order]
        make_trainer(*callbacks, enable_checkpointing=True).fit(Classifier(), loader(), loader(32))
        return torch.load(folder / "end.ckpt", weights_only=True), pruner

    (state, pruner), (expected, reference) = run(tmp_path / "a", order), run(tmp_path / "b", 0)
    assert pruner.masks == reference.masks
    for name, value in expected["state_dict"].items():
        assert torch.equal(state["state_dict"][name], value)
    assert all(state["state_dict"][name][~mask].count_nonzero() == 0 for name, mask in pruner.masks.items())


@pytest.mark.skipif(not hasattr(lightning_callbacks, "WeightAveraging"), reason="this lightning has no WeightAveraging")
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_have_the_same_zeros(first, tmp_path):
    pruner, model = quiet("snip"), Classifier()
    average = lightning_callbacks.WeightAveraging(multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    callbacks = [pruner, average] if first else [average, pruner]
    trainer = make_trainer(*callbacks, max_epochs=2)
    trainer.fit(model, loader(), loader(32))
    trainer.save_checkpoint(tmp_path / "ema.ckpt")
    assert pruned_max(model, pruner.masks) == 0.0
    assert pruned_max(average._average_model.module, pruner.masks) == 0.0
    dense = Classifier()
    make_trainer(quiet("snip"), max_epochs=2).fit(dense, loader(), loader(32))
    assert not torch.equal(dense.net[0].weight, model.net[0].weight), "the average must have been taken"


def test_stochastic_weight_averaging():
    pruner, model = quiet("snip"), Classifier()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    make_trainer(pruner, swa, max_epochs=4).fit(model, loader(), loader(32))
    assert pruned_max(model, pruner.masks) == 0.0


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_copies_and_pickles(when):
    pruner, model, made = quiet("snip"), Classifier(), {}

    def copies():
        made["callback"] = copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))
        made["model"] = copy.deepcopy(model.net), pickle.loads(pickle.dumps(model.net))

    class During(Callback):
        def on_train_batch_end(self, *args):
            copies()

    if when == "before":
        copies()
    make_trainer(pruner, *([During()] if when == "during" else [])).fit(model, loader())
    if when == "after":
        copies()
    for other in made["callback"]:
        assert other.state_key == pruner.state_key
        assert other.masks == (None if when == "before" else pruner.masks)
        fresh = Classifier()
        make_trainer(other).fit(fresh, loader())
        assert other.masks == pruner.masks
        assert pruned_max(fresh, other.masks) == 0.0
    for net in made["model"]:
        assert hooks(net) == 0
        if when != "before":
            masks = {name.removeprefix("net."): mask for name, mask in pruner.masks.items()}
            assert pruned_max(net, masks) == 0.0


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
@pytest.mark.parametrize("net", [None, cnn])
def test_compiled_module(method, net):
    torch._dynamo.reset()
    make = Classifier if net is None else (lambda: Classifier(net))
    eager, compiled = quiet(method), quiet(method)
    plain, model = make(), make()
    make_trainer(eager).fit(plain, loader())
    probe = Probe(compiled)
    make_trainer(compiled, probe).fit(torch.compile(model, backend="eager"), loader())
    assert compiled.masks == eager.masks
    assert probe.worst["step"] == 0.0
    assert list(model.state_dict()) == list(plain.state_dict())
    torch._dynamo.reset()


def test_compiled_network_inside_the_module_has_no_graph_break():
    torch._dynamo.reset()
    eager, pruner, plain, model = quiet("snip"), quiet("snip"), Classifier(), Classifier()
    model.net.compile(backend="aot_eager", fullgraph=True)
    make_trainer(eager).fit(plain, loader())
    make_trainer(pruner).fit(model, loader())
    assert pruner.masks == eager.masks
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_gan_twice():
    pruner, model = quiet("snip"), Gan()
    make_trainer(pruner).fit(model, loader())
    first, probe = pruner.masks, Probe(pruner)
    make_trainer(pruner, probe).fit(model, loader())
    assert pruner.masks is first
    assert probe.worst == CLEAN


@pytest.mark.parametrize("first", [True, False], ids=["finder first", "pruner first"])
def test_learning_rate_finder_as_a_callback(first, tmp_path):
    def run(*callbacks):
        trainer = make_trainer(*callbacks, limit_train_batches=6, default_root_dir=tmp_path, limit_val_batches=0)
        trainer.fit(model := WithRate(), loader())
        return model, trainer.global_step

    def finder():
        return LearningRateFinder(num_training_steps=5, early_stop_threshold=None)

    pruner = quiet("snip")
    probe = Probe(pruner)
    model, steps = run(finder(), pruner, probe) if first else run(pruner, finder(), probe)
    assert steps == run(finder())[1]  # 6; lightning 2.4 ends after the first one
    assert probe.worst == CLEAN
    assert pruned_max(model, pruner.masks) == 0.0


@pytest.mark.parametrize("first", [True, False], ids=["finder first", "pruner first"])
def test_batch_size_finder_as_a_callback(first, tmp_path):
    class Data(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

        def val_dataloader(self):
            return loader(32)

    pruner, model = quiet("snip"), Classifier(optimizer=sgd)
    probe = Probe(pruner)
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=2)
    callbacks = [finder, pruner, probe] if first else [pruner, finder, probe]
    trainer = make_trainer(*callbacks, limit_train_batches=6, default_root_dir=tmp_path, limit_val_batches=0)
    trainer.fit(model, datamodule=Data())
    assert probe.worst == CLEAN
    assert pruned_max(model, pruner.masks) == 0.0
