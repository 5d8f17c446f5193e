"""`PruneAtInit` with N:M patterns and with rescaled weights: once, recorded, and not again on resuming."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_graphon.callbacks import PruneAtInit, prune_at_init
from lightning_graphon.pruning import prune, rescale_
from tests.callbacks.test_late_restore import RestoresAfterSetup
from tests.helpers.modules import METHODS, Classifier, Probe, Recorder, loader, make_trainer, pruned_max, quiet

NOTHING_SEEN = {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}


class Start(Callback):
    """The weights that the first step starts from."""

    def on_train_start(self, trainer, pl_module):
        self.weights = copy.deepcopy(pl_module.state_dict())


def same(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in weights.items())


@pytest.mark.parametrize("method", METHODS)
def test_two_of_four_in_training(method):
    pruner, model = quiet(method, None, allocation="2:4"), Classifier()
    make_trainer(pruner, probe := Probe(pruner)).fit(model, loader(), loader(32))
    for mask in pruner.masks.values():
        assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert probe.worst == NOTHING_SEEN
    assert pruned_max(model, pruner.masks) == 0.0
    if method in ("random", "magnitude"):
        assert pruner.masks == prune(Classifier(), method, allocation="2:4")


def test_a_pattern_is_named_in_the_table_and_in_the_checkpoint(tmp_path, capsys):
    trainer = make_trainer(PruneAtInit("magnitude", allocation="2:4"))
    trainer.fit(Classifier(), loader())
    assert "PruneAtInit: magnitude, sparsity 0.5 (2:4)" in capsys.readouterr().out
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = quiet("magnitude", 0.5, allocation="2:4")
    make_trainer(again, max_epochs=2).fit(Classifier(seed=5), loader(), ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"allocation='2:4' but.*allocation='global'"):
        make_trainer(quiet("magnitude", 0.5), max_epochs=2).fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "snip", "sparsity": 0.9, "allocation": "2:4"}, ValueError, "leave sparsity out"),
        ({"method": "snip", "allocation": "4:2"}, ValueError, "0 < N < M"),
        ({"method": "snip", "sparsity": 0.9, "rescale": "fan_in"}, ValueError, "unknown rescale 'fan_in'"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        PruneAtInit(**arguments)


@pytest.mark.parametrize("late", [False, True], ids=["restored before", "restored after"])
@pytest.mark.parametrize("by", ["unit", "layer"])
def test_the_network_starts_from_rescaled_weights_under_the_same_masks(by, late):
    expected, plain = Classifier(), quiet("snip")
    make_trainer(plain).fit(Classifier(), loader())
    rescale_(expected, plain.masks, by)
    pruner, start = quiet("snip", rescale=by), Start()
    strategy = RestoresAfterSetup(device="cpu") if late else "auto"
    make_trainer(pruner, start, probe := Probe(pruner), strategy=strategy).fit(Classifier(), loader())
    assert pruner.masks == plain.masks
    assert same(start.weights, expected.state_dict())
    assert probe.worst == NOTHING_SEEN


def test_by_default_weights_keep_their_values():
    pruner, start = quiet("snip"), Start()
    make_trainer(pruner, start).fit(model := Classifier(), loader())
    pruner.masks.apply_(expected := Classifier())
    assert same(start.weights, expected.state_dict())
    assert not same(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("late", [False, True], ids=["restored before", "restored after"])
def test_a_resumed_run_does_not_rescale_again(late, tmp_path, monkeypatch):
    whole = Recorder()
    make_trainer(quiet("snip", rescale="unit"), whole, max_epochs=4).fit(Classifier(), loader())
    trainer = make_trainer(quiet("snip", rescale="unit"), max_epochs=2)
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    monkeypatch.setattr(prune_at_init, "rescale_", lambda *a: pytest.fail("rescaled again"))
    strategy, rest = RestoresAfterSetup(device="cpu") if late else "auto", Recorder()
    make_trainer(quiet("snip", rescale="unit"), rest, max_epochs=4, strategy=strategy).fit(
        Classifier(seed=7), loader(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert rest.losses == whole.losses[6:]


def test_a_second_fit_goes_on_from_where_the_first_ended():
    pruner, model = quiet("snip", rescale="layer"), Classifier()
    make_trainer(pruner).fit(model, loader())
    ended = copy.deepcopy(model.state_dict())
    make_trainer(pruner, start := Start()).fit(model, loader())
    assert same(start.weights, ended)
    make_trainer(pruner, start).fit(Classifier(seed=4), loader())
    rescale_(expected := Classifier(seed=4), pruner.masks, "layer")
    assert same(start.weights, expected.state_dict()), "another model is pruned and rescaled anew"


def test_it_is_recorded_and_another_one_is_refused(tmp_path):
    trainer = make_trainer(pruner := quiet("snip", rescale="unit"))
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"][pruner.state_key]
    assert state["rescale"] == "unit"
    with pytest.raises(ValueError, match=r"rescale='unit' but.*rescale=None"):
        make_trainer(quiet("snip"), max_epochs=2).fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_states_of_before_the_argument_existed_are_resumed():
    first = quiet("snip")
    make_trainer(first).fit(Classifier(), loader())
    state = {name: value for name, value in first.state_dict().items() if name != "rescale"}
    again = quiet("snip")
    again.load_state_dict(state)
    assert again.masks == first.masks


def test_given_masks_are_rescaled_and_a_network_that_was_is_not_again():
    masks = prune(Classifier(), "random", sparsity=0.8)
    rescale_(rescaled := Classifier(), masks)
    expected = copy.deepcopy(rescaled.state_dict())
    for model in (Classifier(), rescaled):
        make_trainer(PruneAtInit.from_masks(masks, rescale="unit", verbose=False), start := Start()).fit(
            model, loader()
        )
        assert same(start.weights, expected)
