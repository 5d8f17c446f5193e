"""Checkpoints: dense keys, packed masks, the very same masks after resuming, clear refusals."""

import subprocess
import sys
from inspect import signature
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from lightning_graphon.callbacks import LossDecayMonitor, PruneAtInit
from lightning_graphon.pruning import Masks, register_method
from tests.helpers.modules import (
    METHODS,
    Classifier,
    Gan,
    Probe,
    Recorder,
    cnn,
    loader,
    make_trainer,
    mlp,
    pruned_max,
    quiet,
)

# Lightning has had this argument since 2.6.
SAFELY = {"weights_only": True} if "weights_only" in signature(pl.Trainer.fit).parameters else {}
calls = []


@register_method("counted-snip", needs="loss")
def counted(context):
    """SNIP that counts how often it is asked."""
    from lightning_graphon.pruning.scoring.first_order import snip

    calls.append(1)
    return snip(context)


class RestoresAfterSetup(SingleDeviceStrategy):
    """Restores checkpoints after on_fit_start, as the sharded strategies do."""

    @property
    def restore_checkpoint_after_setup(self):
        return True


def strategy(late):
    return RestoresAfterSetup(device="cpu") if late else "auto"


def train(path, *callbacks, model=None, epochs=2, **kwargs):
    """Train and save at the end; the path of the checkpoint."""
    trainer = make_trainer(*callbacks, max_epochs=epochs, **kwargs)
    trainer.fit(model or Classifier(), loader())
    trainer.save_checkpoint(path / "last.ckpt")
    return path / "last.ckpt"


@pytest.mark.parametrize("method", METHODS)
def test_keys_are_those_of_the_dense_model(method, tmp_path):
    state = torch.load(train(tmp_path, quiet(method), epochs=1, model=Classifier(cnn)), weights_only=True)
    dense = Classifier(cnn)
    assert list(state["state_dict"]) == list(dense.state_dict())
    assert {k: v.shape for k, v in state["state_dict"].items()} == {k: v.shape for k, v in dense.state_dict().items()}
    dense.load_state_dict(state["state_dict"], strict=True)


PLAIN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lightning_graphon":
            raise ImportError("not installed here")
sys.meta_path.insert(0, Blocked())
import torch
from torch import nn
state = torch.load(sys.argv[1], weights_only=True)["state_dict"]
net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
net.load_state_dict({k.removeprefix("net."): v for k, v in state.items()}, strict=True)
assert "lightning_graphon" not in sys.modules
print(sum(int((p == 0).sum()) for p in net.parameters()), float(net(torch.ones(1, 64)).sum()))
"""


def test_loads_where_this_package_is_not_installed(tmp_path):
    pruner, model = quiet("snip"), Classifier()
    path = train(tmp_path, pruner, model=model)
    done = subprocess.run([sys.executable, "-c", PLAIN, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    zeros, total = done.stdout.split()
    assert int(zeros) == sum(int((~m).sum()) for m in pruner.masks.values())
    assert float(total) == pytest.approx(model(torch.ones(1, 64)).sum().item(), rel=1e-5)


def test_callback_state_is_plain_and_packed_to_a_bit_a_weight(tmp_path):
    def net():
        return torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))

    pruner = quiet("magnitude")
    path = train(tmp_path, pruner, model=Classifier(net), epochs=1)
    states = torch.load(path, weights_only=True)["callbacks"]
    assert list(states) == [pruner.state_key]
    allowed = (torch.Tensor, str, int, float, bool, list, dict, type(None))
    leaves = torch.utils._pytree.tree_leaves(states)
    assert all(type(leaf) in allowed for leaf in leaves)
    size = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor))
    assert size == pruner.masks.total // 8
    torch.save(states, tmp_path / "states.pt")
    assert (tmp_path / "states.pt").stat().st_size < pruner.masks.total // 8 + 4096
    restored = Masks({})
    restored.load_state_dict(states[pruner.state_key])
    assert restored == pruner.masks


def test_saved_optimizers_remember_nothing_of_pruned_weights(tmp_path):
    pruner, model = quiet("random"), Classifier(optimizer=torch.optim.Adam)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    train(tmp_path, pruner, keep, model=model, enable_checkpointing=True)
    saved = sorted(path for path in tmp_path.glob("*.ckpt") if path.name != "last.ckpt")
    assert len(saved) > 1
    places = [name for name, _ in model.named_parameters()]
    for path in saved:
        state = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
        for name, mask in pruner.masks.items():
            own = state[places.index(name)]
            assert not own["exp_avg"][~mask].any()
            assert not own["exp_avg_sq"][~mask].any()
            assert own["exp_avg_sq"][mask].any()


@pytest.mark.parametrize("late", [False, True], ids=["restored before", "restored after"])
@pytest.mark.parametrize("method", ["counted-snip", *METHODS])
def test_resumed_run_equals_the_uninterrupted_one(method, late, tmp_path):
    whole, through = Recorder(), quiet(method)
    make_trainer(through, whole, max_epochs=4, strategy=strategy(late)).fit(Classifier(), loader())

    first = quiet(method)
    path = train(tmp_path, first, epochs=2)
    calls.clear()
    rest, pruner, model = Recorder(), quiet(method), Classifier(seed=77)
    probe = Probe(pruner)
    with patch("lightning_graphon.callbacks._module.scoring.compute_masks", side_effect=AssertionError("scored again")):
        trainer = make_trainer(pruner, rest, probe, max_epochs=4, strategy=strategy(late))
        trainer.fit(model, loader(), loader(32), ckpt_path=path, **SAFELY)
    assert calls == []
    assert pruner.masks == first.masks == through.masks
    assert rest.losses == whole.losses[6:]
    assert probe.worst == {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}
    assert pruned_max(model, pruner.masks) == 0.0


@pytest.mark.parametrize("late", [False, True], ids=["restored before", "restored after"])
def test_resumes_in_the_middle_of_an_epoch(late, tmp_path):
    # Lightning takes up an epoch's batches from its first one: let all be the same.
    data = DataLoader([next(iter(loader()))] * 3, batch_size=None)
    whole = Recorder()
    make_trainer(quiet("snip"), whole, max_epochs=3).fit(Classifier(), data)
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    first = quiet("snip")
    make_trainer(first, saved, max_steps=2, enable_checkpointing=True).fit(Classifier(), data)
    rest, pruner = Recorder(), quiet("snip")
    trainer = make_trainer(pruner, rest, max_epochs=2, strategy=strategy(late))
    trainer.fit(Classifier(seed=5), data, ckpt_path=tmp_path / "step=2.ckpt")
    assert trainer.global_step in (6, 7)  # lightning 2.4 repeats a batch
    assert pruner.masks == first.masks
    assert rest.losses == whole.losses[2 : trainer.global_step]


def test_scorer_is_called_when_training_starts_and_never_again(tmp_path):
    calls.clear()
    pruner = quiet("counted-snip")
    path = train(tmp_path, pruner)
    assert len(calls) == 1
    again = quiet("counted-snip", verbose=True)
    with patch("lightning_graphon.callbacks.prune_at_init.rank_zero_info") as said:
        make_trainer(again, max_epochs=3).fit(Classifier(), loader(), ckpt_path=path)
    said.assert_called_once_with(f"PruneAtInit goes on with the checkpoint's {pruner.masks}")
    assert len(calls) == 1
    assert again.masks == pruner.masks


@pytest.mark.parametrize("late", [False, True], ids=["restored before", "restored after"])
def test_manual_optimisation_resumes(late, tmp_path):
    first = quiet("snip")
    path = train(tmp_path, first, model=Gan())
    pruner = quiet("snip")
    probe = Probe(pruner)
    make_trainer(pruner, probe, max_epochs=3, strategy=strategy(late)).fit(Gan(), loader(), ckpt_path=path)
    assert pruner.masks == first.masks
    assert probe.seen["step"] > 0
    assert probe.worst == {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}


@pytest.mark.parametrize("late", [False, True], ids=["restored before", "restored after"])
@pytest.mark.parametrize("method", ["magnitude", "snip"])
def test_checkpoint_of_a_dense_run_is_pruned_with_its_weights_and_momentum(method, late, tmp_path):
    dense = Classifier()
    path = train(tmp_path, model=dense)
    pruner = quiet(method, 0.5)
    probe, seen = Probe(pruner), {}
    expected = Classifier()
    expected.load_state_dict(dense.state_dict())

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})
            seen["momentum"] = {
                n: trainer.optimizers[0].state[p]["momentum_buffer"].clone() for n, p in pl_module.named_parameters()
            }

    trainer = make_trainer(pruner, probe, Look(), max_epochs=4, strategy=strategy(late))
    trainer.fit(Classifier(seed=9), loader(), loader(32), ckpt_path=path)
    assert probe.worst == {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}
    for name, mask in pruner.masks.items():
        assert torch.equal(seen[name], expected.get_parameter(name).detach() * mask)
        assert seen["momentum"][name][~mask].count_nonzero() == 0
        assert seen["momentum"][name][mask].count_nonzero() > 0
    fresh = quiet(method, 0.5)
    make_trainer(fresh).fit(expected, loader())
    assert fresh.masks == pruner.masks


@pytest.mark.parametrize("late", [False, True], ids=["restored before", "restored after"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sparsity": 0.8}, r"sparsity=0\.9 but this PruneAtInit has sparsity=0\.8"),
        ({"method": "synflow"}, r"method='snip' but this PruneAtInit has method='synflow'"),
        ({"allocation": "erk"}, r"allocation='global' but this PruneAtInit has allocation='erk'"),
    ],
)
def test_other_arguments_than_the_checkpoint_are_refused(changed, message, late, tmp_path):
    path = train(tmp_path, quiet("snip"))
    other = quiet(**{"method": "snip", "sparsity": 0.9, **changed})
    with pytest.raises(ValueError, match=message):
        make_trainer(other, max_epochs=3, strategy=strategy(late)).fit(Classifier(), loader(), ckpt_path=path)


def test_other_model_than_the_checkpoint_is_refused(tmp_path):
    first = quiet("snip")
    train(tmp_path, first)
    other = quiet("snip")
    other.load_state_dict(first.state_dict())

    def wider():
        return torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10))

    with pytest.raises(ValueError, match=r"another model: 'net\.0\.weight' has shape \(48, 64\)"):
        make_trainer(other).fit(Classifier(wider), loader())
    other.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"another model: Gan has no parameter 'net\.0\.weight'"):
        make_trainer(other).fit(Gan(), loader())


def test_state_that_is_none_is_refused():
    with pytest.raises(ValueError, match="method"):
        quiet("snip").load_state_dict({"something": "else"})


def test_state_key_depends_on_the_selection_only():
    base = PruneAtInit("snip", 0.9)
    assert PruneAtInit("snip", 0.9, verbose=False, batches=1).state_key == base.state_key
    assert PruneAtInit("snip", 0.9, include="net.0").state_key != base.state_key
    assert PruneAtInit("snip", 0.9, exclude="net.0").state_key != base.state_key


def test_two_on_different_layers_coexist(tmp_path):
    def pair():
        return quiet("snip", 0.9, include="net.0"), quiet("magnitude", 0.5, include=["net.2", "net.4"])

    a, b = pair()
    model = Classifier()
    path = train(tmp_path, a, b, model=model)
    assert list(a.masks) == ["net.0.weight"]
    assert list(b.masks) == ["net.2.weight", "net.4.weight"]
    assert a.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    assert b.masks.sparsity == pytest.approx(0.5, abs=1e-3)
    assert pruned_max(model, {**a.masks, **b.masks}) == 0.0
    c, d = pair()
    model = Classifier(mlp)
    make_trainer(d, c, max_epochs=3).fit(model, loader(), ckpt_path=path)
    assert (c.masks, d.masks) == (a.masks, b.masks)
    assert pruned_max(model, {**c.masks, **d.masks}) == 0.0


def test_checkpoint_before_pruning_has_no_masks():
    assert quiet("snip").state_dict() == {}
    assert quiet("snip").masks is None


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_testing_another_checkpoint_changes_neither_masks_nor_curves(stage, tmp_path):
    def trained(sparsity, seed):
        pruner = quiet("magnitude", sparsity)
        monitor = LossDecayMonitor(every_n_steps=1, probe_size=8, figure=False, verbose=False)
        trainer, model = make_trainer(pruner, monitor), Classifier(seed=seed)
        trainer.fit(model, loader())
        trainer.save_checkpoint(tmp_path / f"{seed}.ckpt")
        return trainer, model, pruner, monitor

    trained(0.9, 2)
    trainer, model, pruner, monitor = trained(0.5, 1)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    observed = monitor.curves["observed"].clone()
    getattr(trainer, stage)(model, loader(), ckpt_path=tmp_path / "2.ckpt", verbose=False)
    assert all(torch.equal(mask, pruner.masks[name]) for name, mask in masks.items())
    assert torch.equal(monitor.curves["observed"], observed)
    assert monitor.curves["observed"].numel() > 1
