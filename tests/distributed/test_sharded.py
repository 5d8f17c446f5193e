"""Strategies that flatten weights and cut them into shards are refused before the first step."""

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_graphon.callbacks import LossDecayMonitor
from tests.helpers.modules import Classifier, loader, make_trainer, quiet

KINDS = ["FSDPStrategy", "DeepSpeedStrategy"]


def fake(name, *bases):
    """A strategy of that name that trains on one device."""
    return type(name, bases or (SingleDeviceStrategy,), {})


@pytest.mark.parametrize("derived", [False, True], ids=["itself", "a subclass"])
@pytest.mark.parametrize("name", KINDS)
def test_refused_with_the_name_and_the_way_out(name, derived):
    kind = fake("MyStrategy", fake(name)) if derived else fake(name)
    model = Classifier()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = make_trainer(quiet("magnitude"), strategy=kind(device="cpu"))
    with pytest.raises(
        RuntimeError, match=rf"does not support {kind.__name__}.*shards.*ModelParallelStrategy.*strategy='ddp'"
    ):
        trainer.fit(model, loader())
    assert trainer.global_step == 0
    assert all((p == before[n]).all() for n, p in model.named_parameters())


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_not_watched_and_a_sentence_says_so(name, caplog):
    watch = LossDecayMonitor(raise_errors=True)
    make_trainer(watch, strategy=fake(name)(device="cpu")).fit(Classifier(), loader())
    assert [r.getMessage().split(":")[0] for r in caplog.records if r.name.startswith("lightning_graphon")] == [
        f"LossDecayMonitor does nothing under {name}"
    ]
    assert watch.curves["step"].numel() == 0


def test_others_are_not_refused():
    pruner = quiet("magnitude")
    make_trainer(pruner, strategy=fake("Mine")(device="cpu")).fit(Classifier(), loader())
    assert pruner.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_testing_under_a_sharded_strategy_is_fine():
    trainer = make_trainer(quiet("magnitude"), strategy=fake("FSDPStrategy")(device="cpu"))
    assert trainer.validate(Classifier(), loader(32), verbose=False)[0]["val_loss"] > 0
