"""Masks that change: against plain loops, and with every guarantee of PruneAtInit."""

import copy
import csv

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

from lightning_graphon.callbacks import DynamicSparsity, GraphonMonitor
from lightning_graphon.pruning import prune
from tests.callbacks.test_checkpoints import SAFELY, strategy
from tests.callbacks.test_precisions import half_with_scaler
from tests.helpers import growth_oracles as oracles
from tests.helpers.modules import (
    Classifier,
    Gan,
    Probe,
    Recorder,
    UserNetwork,
    cnn,
    digits,
    loader,
    make_trainer,
    mlp,
    pruned_max,
    quiet,
)

# Lightning has had this argument since 2.6.

METHODS = ["set", "rigl", "snfs", "srigl", "graphon", "gmp"]
PRODUCT = {"graphons": {"family": "product"}}
CLEAN = {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}


def moving(method, sparsity=0.8, **kwargs):
    """A DynamicSparsity that prints nothing and updates every second step."""
    own = {"every_n_steps": 2, "fraction": 0.5, "options": PRODUCT if method == "graphon" else {}, "verbose": False}
    return DynamicSparsity(method, sparsity, **{**own, **kwargs})


class History(Callback):
    """The masks after every step."""

    def __init__(self, pruner):
        self.pruner, self.masks = pruner, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.masks.append({name: mask.clone() for name, mask in self.pruner.masks.items()})


@pytest.mark.parametrize("net", [oracles.mlp64, oracles.cnn64])
@pytest.mark.parametrize("method", oracles.STEPS)
def test_masks_are_those_of_plain_loops_over_twenty_updates(method, net):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)

    model = Classifier(net, sgd)
    start = Classifier(net).net
    pruner = moving(method, 0.92, every_n_steps=oracles.EVERY, fraction=oracles.FRACTION, stop=oracles.LAST)
    history = History(pruner)
    trainer = make_trainer(
        pruner, history, max_epochs=7, limit_train_batches=6, limit_val_batches=0, precision="64-true"
    )
    begin = BeginningMasks(pruner)
    trainer.callbacks.insert(1, begin)
    trainer.fit(model, loader(96))
    x, y = digits(96)
    batches = list(zip(x.double().split(16), y.split(16), strict=True)) * 7
    masks = {name.removeprefix("net."): mask for name, mask in begin.masks.items()}
    budget = quiet("random", 0.92, allocation="erk", seed=3)
    make_trainer(budget, precision="64-true").fit(Classifier(net), loader(96))
    room = {name.removeprefix("net."): int(mask.sum()) for name, mask in budget.masks.items()}
    expected, weights = oracles.run(method, start, masks, room, batches, lr=0.2, momentum=0.9)
    found = history.masks[oracles.EVERY - 1 : oracles.LAST : oracles.EVERY]
    assert len(found) == len(expected) == oracles.UPDATES
    moved = 0
    for update, (ours, theirs) in enumerate(zip(found, expected, strict=True), 1):
        for name, mask in theirs.items():
            assert torch.equal(ours[f"net.{name}"], mask), (update, name)
            moved += int((mask != masks[name]).sum())
    assert moved > 100, "masks must move for this test to say anything"
    if method == "srigl":
        ablated = [int((~mask.flatten(1).any(1)).sum()) for masks in expected for mask in masks.values()]
        assert max(ablated) > 0, "units must be ablated for this test to say anything"
    for name, weight in weights.items():
        # Sums of the two ways differ in their order; 42 steps of float64.
        torch.testing.assert_close(model.net.get_parameter(name).detach(), weight, rtol=1e-9, atol=1e-12)


class BeginningMasks(Callback):
    def __init__(self, pruner):
        self.pruner = pruner

    def on_train_start(self, trainer, pl_module):
        self.masks = {name: mask.clone() for name, mask in self.pruner.masks.items()}


def counts(masks):
    return [{name: int(mask.sum()) for name, mask in now.items()} for now in masks]


def exchanged(history):
    """Entries that differ between the first and the last masks."""
    return sum(int((history[0][name] != history[-1][name]).sum()) for name in history[0])


@pytest.mark.parametrize("net", [mlp, cnn])
@pytest.mark.parametrize("method", METHODS)
def test_dropped_weights_are_zero_and_counts_exact_at_every_step(method, net):
    pruner, model = moving(method), Classifier(net, torch.optim.AdamW)
    history, probe = History(pruner), Probe(pruner)
    trainer = make_trainer(pruner, history, probe, max_epochs=6, gradient_clip_val=0.5)
    trainer.fit(model, loader(shuffle=True), loader(32))
    assert probe.worst == CLEAN
    assert len(history.masks) == 18
    assert probe.seen["step"] > 0
    assert exchanged(history.masks) > 50, "masks must move for this test to say anything"
    total = sum(mask.numel() for mask in pruner.masks.values())
    kept = [sum(now.values()) for now in counts(history.masks)]
    if method == "gmp":  # updates after steps 2, 4, ..., 12 of 18; the last count of the cubic is the final one
        final = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
        sizes = {name: mask.numel() for name, mask in pruner.masks.items()}
        for step, now in enumerate(counts(history.masks), 1):
            left = (1 - min(6, step // 2) / 6) ** 3
            assert now == {n: final[n] + int(round(left, 12) * (sizes[n] - final[n]) + 1e-9) for n in sizes}
        assert kept[-1] == round(0.2 * total)
    elif method == "srigl":
        for now in history.masks:
            for mask in now.values():
                fans = set(mask.flatten(1).sum(1).tolist()) - {0}
                assert len(fans) == 1, "every unit has the same fan-in"
        assert max(kept) <= round(0.2 * total)
    else:
        assert set(kept) == {round(0.2 * total)}
        assert all(now == counts(history.masks)[0] for now in counts(history.masks))


@pytest.mark.parametrize("method", ["set", "rigl", "snfs"])
def test_counts_move_between_layers_with_the_same_total_and_above_their_floors(method):
    pruner, model = moving(method, 0.9, redistribute=True, min_density=0.05), Classifier(optimizer=torch.optim.Adam)
    history = History(pruner)
    make_trainer(pruner, history, max_epochs=6).fit(model, loader())
    seen = counts(history.masks)
    assert seen[-1] != seen[0]
    assert {sum(now.values()) for now in seen} == {round(0.1 * pruner.masks.total)}
    for now in seen:
        assert all(count >= 0.05 * pruner.masks[name].numel() for name, count in now.items())


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


class States(Callback):
    """At each update: optimizer states of grown, of dropped and of staying weights, and Adam's step counts."""

    def __init__(self, pruner):
        self.pruner, self.before, self.seen = pruner, None, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: mask.clone() for name, mask in self.pruner.masks.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        for name, mask in self.pruner.masks.items():
            if not torch.equal(mask, self.before[name]):
                parameter = pl_module.get_parameter(name)
                state, changed = optimizer.state[parameter], mask != self.before[name]
                stays = mask & self.before[name]
                for key, value in state.items():
                    if value.shape == mask.shape:
                        assert not value[changed].any(), key
                        assert value[stays].any(), key
                assert not parameter[changed].any()
                assert not parameter.grad[~mask].any()
                self.seen.append(float(state.get("step", trainer.global_step)))


@pytest.mark.parametrize(
    "optimizer",
    [
        adam,
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
        torch.optim.Adadelta,
    ],
    ids=["adam", "sgd", "rmsprop", "adadelta"],
)
def test_optimizer_states_of_grown_and_dropped_weights_are_zero_and_steps_go_on(optimizer):
    pruner, model = moving("rigl"), Classifier(optimizer=optimizer)
    states = States(pruner)
    make_trainer(pruner, states, max_epochs=5).fit(model, loader())
    assert sorted(set(states.seen)) == [2, 4, 6, 8, 10]


def test_grown_weights_train():
    pruner, model = moving("rigl", stop=3), Classifier(optimizer=adam)
    history = History(pruner)
    make_trainer(pruner, history, max_epochs=2).fit(model, loader())
    for name, mask in history.masks[-1].items():
        grown = mask & ~history.masks[0][name]
        assert grown.any()
        assert (model.get_parameter(name)[grown] != 0).float().mean() > 0.5


class Stop(Exception):  # noqa: N818
    pass


class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Stop


@pytest.mark.parametrize("late", [False, True], ids=["restored before", "restored after"])
@pytest.mark.parametrize("method", [*METHODS, "redistributed"])
def test_killed_between_two_updates_and_resumed_equals_uninterrupted(method, late, tmp_path):
    data = DataLoader([next(iter(loader()))] * 4, batch_size=None)  # lightning takes up an epoch from its first batch
    options = {"max_epochs": 5, "limit_train_batches": 4}
    own = {"every_n_steps": 3, "redistribute": method == "redistributed"}
    own |= {"options": {"momentum": 0.8}} if method == "snfs" else {}
    method = "rigl" if method == "redistributed" else method
    whole, through, expected = Recorder(), moving(method, **own), Classifier(optimizer=adam)
    history = History(through)
    make_trainer(through, whole, history, **options).fit(expected, data)
    first = moving(method, **own)
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1, filename="{step}")
    trainer = make_trainer(first, saved, Kill(10), enable_checkpointing=True, **options)
    with pytest.raises(Stop):
        trainer.fit(Classifier(optimizer=adam), data)
    rest, pruner, model = Recorder(), moving(method, seed=0, **own), Classifier(optimizer=adam, seed=77)
    after, probe = History(pruner), Probe(pruner)
    trainer = make_trainer(pruner, rest, after, probe, strategy=strategy(late), **options)
    trainer.fit(model, data, ckpt_path=tmp_path / "step=8.ckpt", **SAFELY)
    assert rest.losses == whole.losses[8:]
    for found, wanted in zip(after.masks, history.masks[8:], strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert probe.worst == CLEAN
    assert exchanged(history.masks[8:]) > 0, "masks must move after the resume for this test to say anything"


def test_checkpoints_load_into_the_plain_model_with_weights_only(tmp_path):
    pruner, model = moving("snfs"), Classifier(cnn)
    trainer = make_trainer(pruner, max_epochs=2)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain = Classifier(cnn)
    assert list(state["state_dict"]) == list(plain.state_dict())
    plain.load_state_dict(state["state_dict"], strict=True)
    assert pruned_max(plain, pruner.masks) == 0.0
    allowed = (torch.Tensor, str, int, float, bool, list, dict, type(None))
    assert all(type(leaf) in allowed for leaf in torch.utils._pytree.tree_leaves(state["callbacks"]))


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path):
    trainer = make_trainer(moving("rigl"))
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"fraction=0\.5 but this DynamicSparsity has fraction=0\.2"):
        make_trainer(moving("rigl", fraction=0.2)).fit(Classifier(), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_accumulated_gradients_are_those_of_the_whole_batch():
    def double(batch_size, **kwargs):
        pruner, model = moving("rigl", every_n_steps=1), Classifier(optimizer=adam)
        history = History(pruner)
        trainer = make_trainer(pruner, history, precision="64-true", limit_train_batches=1.0, max_epochs=4, **kwargs)
        trainer.fit(model, loader(96, batch_size=batch_size))
        return pruner, trainer, history

    whole, trainer, history = double(48)
    parts, other, _ = double(12, accumulate_grad_batches=4)
    assert trainer.global_step == other.global_step == 8
    assert exchanged(history.masks) > 50
    assert parts.masks == whole.masks


def scaled(**scaler):
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))}


@pytest.mark.parametrize("scaler", [{"init_scale": 256.0}, {"init_scale": 1.0, "growth_factor": 4.0}])
@pytest.mark.parametrize("method", ["rigl", "snfs"])
def test_under_a_gradient_scaler_masks_are_those_without(method, scaler):
    """Factors of two change no digit, as long as float16 neither overflows nor underflows."""

    def masks(**kwargs):
        pruner, model = moving(method), Classifier(optimizer=adam)
        probe = Probe(pruner)
        trainer = make_trainer(pruner, probe, max_epochs=2, **scaled(growth_interval=1, **kwargs))
        trainer.fit(model, loader())
        assert probe.worst == CLEAN
        return pruner.masks

    assert masks(**scaler) == masks(init_scale=1.0, growth_factor=1.0 + 1e-9)


@pytest.mark.parametrize("arguments", [{}, {"redistribute": True}])
def test_an_update_with_gradients_that_overflow_is_left_out(arguments):
    pruner, model = moving("rigl", every_n_steps=1, **arguments), Classifier(optimizer=adam)
    history = History(pruner)

    class Overflow(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.handle = pl_module.net[0].weight.register_hook(lambda g: g * torch.inf if batch_idx == 1 else g)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.handle.remove()

    make_trainer(pruner, history, Overflow(), max_epochs=2, **half_with_scaler()).fit(model, loader())
    first, second, third = history.masks[:3]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_two_that_move_and_one_that_stands_still_work_side_by_side():
    encoder, head = moving("rigl", 0.8, include="net.0"), moving("set", 0.5, include="net.2")
    still = quiet("magnitude", 0.7, include="net.4")
    probes, model = [Probe(p) for p in (encoder, head, still)], Classifier(optimizer=adam)
    histories = [History(encoder), History(head)]
    monitor = GraphonMonitor(verbose=False, figure=False, raise_errors=True, spectrum=None)
    trainer = make_trainer(still, encoder, head, monitor, *probes, *histories, max_epochs=4)
    trainer.fit(model, loader(), loader(32))
    assert all(probe.worst == CLEAN for probe in probes)
    assert all(exchanged(history.masks) > 0 for history in histories)
    assert [*encoder.masks, *head.masks, *still.masks] == ["net.0.weight", "net.2.weight", "net.4.weight"]
    removed = sum(p.masks.total - p.masks.kept for p in (encoder, head, still))
    size = sum(p.numel() for p in model.parameters())
    assert trainer.callback_metrics["sparsity/model"].item() == pytest.approx(removed / size)


@pytest.mark.parametrize("first", [True, False])
def test_two_that_share_a_weight_are_refused(first):
    pruners = [moving("rigl", include="net.0"), quiet("snip", include=["net.0", "net.2"])]
    with pytest.raises(ValueError, match=r"both have masks of net\.0\.weight"):
        make_trainer(*(pruners if first else pruners[::-1])).fit(Classifier(), loader())


def test_manual_optimisation_counts_batches():
    pruner = moving("rigl", every_n_steps=2, stop=100)
    probe, history = Probe(pruner), History(pruner)
    make_trainer(pruner, probe, history, max_epochs=2).fit(Gan(), loader())
    assert probe.worst == CLEAN
    changes = [exchanged([a, b]) > 0 for a, b in zip(history.masks, history.masks[1:], strict=False)]
    assert changes == [True, False, True, False, True]


def test_starts_from_a_method_or_from_given_masks():
    model = Classifier()
    begins = {}
    given = prune(Classifier(), "magnitude", sparsity=0.7)
    for start in ("snip", given):
        pruner = moving("rigl", None if start is given else 0.8, start=start, stop=1)
        make_trainer(pruner).fit(model, loader())
        begins[str(start)] = pruner.masks
    snip = quiet("snip", 0.8, allocation="erk")
    make_trainer(snip).fit(model, loader())
    assert begins[str(given)] == given
    assert begins[str(given)]["net.0.weight"] is not given["net.0.weight"]
    assert begins["snip"].kept == snip.masks.kept


@pytest.mark.parametrize("method", ["rigl", "set", "srigl", "gmp"])
def test_nothing_is_compiled_again_at_an_update(method):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    pruner, module = moving(method), Classifier(lambda: UserNetwork(mlp()), adam)
    history = History(pruner)
    module.net.compile(backend=backend, fullgraph=True)
    trainer = make_trainer(pruner, history, limit_train_batches=6, max_epochs=2, limit_val_batches=0)
    trainer.fit(module, loader())
    torch._dynamo.reset()
    assert backend.frame_count == 1
    assert exchanged(history.masks) > 0
    assert pruned_max(module, pruner.masks) == 0.0


def test_logs_churn_at_updates_alone(tmp_path):
    pruner = moving("rigl")
    trainer = make_trainer(pruner, max_epochs=3, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(Classifier(), loader())
    trainer.logger.save()

    with open(next(tmp_path.rglob("metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    updates = [row for row in rows if row.get("growth/churn")]
    assert [int(row["step"]) for row in updates] == [2, 4, 6]
    assert all(0 < float(row["growth/churn"]) <= 0.5 for row in updates)
    assert "growth/net.0.weight/churn" in rows[0]
    assert [row["sparsity/total"] != "" for row in rows].count(True) == 1


def test_gradients_are_collected_at_updates_alone():
    pruner, model = moving("rigl", every_n_steps=3), Classifier()
    seen = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(pruner._enforcer._dense is not None)

    make_trainer(pruner, Look(), max_epochs=2, limit_train_batches=6).fit(model, loader())
    assert seen == [False, False, True] * 2 + [False] * 6  # three quarters of 12 steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "riggl"}, "Did you mean 'rigl'"),
        ({"every_n_steps": 0}, "every_n_steps must be a whole number"),
        ({"fraction": 1.5}, r"fraction must lie in \(0, 1\]"),
        ({"stop": 0.0}, r"stop must lie in \(0, 1\]"),
        ({"method": "gmp", "start": "snip"}, "begins dense"),
        ({"allocation": "2:4"}, "no N:M pattern"),
        ({"method": "srigl", "allocation": "global"}, "no counts of layers"),
        ({"method": "gmp", "redistribute": True}, "counts of its own"),
        ({"start": "snap"}, "Did you mean 'snip'"),
        ({"sparsity": 90}, "must lie in"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynamicSparsity(**{"method": "rigl", "sparsity": 0.9, **arguments})


def test_arguments_without_a_meaning_are_named():
    with pytest.raises(TypeError, match="leave out sparsity, or the masks"):
        DynamicSparsity("rigl", 0.9, start={"net.0.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(TypeError, match="has no option 'share'"):
        DynamicSparsity("rigl", 0.9, options={"share": 1})
    with pytest.raises(TypeError, match="a sparsity are needed"):
        DynamicSparsity("rigl")


def test_a_share_of_a_training_without_an_end_is_refused():
    with pytest.raises(ValueError, match="give a number of steps"):
        make_trainer(moving("rigl"), max_epochs=-1, max_time="00:00:00:05").fit(Classifier(), loader())
    with pytest.raises(ValueError, match="gmp would never prune"):
        make_trainer(moving("gmp", every_n_steps=100)).fit(Classifier(), loader())


def test_the_monitor_sees_how_far_graphons_move():
    pruner, model = moving("rigl"), Classifier(optimizer=adam)
    monitor = GraphonMonitor(verbose=False, figure=False, raise_errors=True, spectrum=None)
    trainer = make_trainer(pruner, monitor, max_epochs=4)
    trainer.fit(model, loader())
    assert trainer.callback_metrics["graphon/net.0.weight/moved"] > 0


class Taught(Classifier):
    """A teacher follows the network by an exponential average."""

    def __init__(self):
        super().__init__(optimizer=lambda p: torch.optim.Adam([q for q in p if q.requires_grad], lr=0.01))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)


def test_a_teacher_loses_what_its_student_drops():
    pruner, model = moving("rigl", include="net"), Taught()
    history = History(pruner)
    make_trainer(pruner, history, max_epochs=4).fit(model, loader())
    assert exchanged(history.masks) > 50
    for name, mask in pruner.masks.items():
        teacher = model.get_parameter(name.replace("net.", "teacher."))
        assert not teacher[~mask].any(), name
        assert (teacher[mask] != 0).float().mean() > 0.5
