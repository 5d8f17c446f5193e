"""Predictions of the loss of trainings whose masks change."""

import pytest
import torch

from lightning_graphon.callbacks import DynamicSparsity, LossDecayMonitor
from lightning_graphon.ntk import empirical_ntk
from tests.helpers.modules import Classifier, loader, make_trainer

STEPS = 24


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def run(*, first=True, method="rigl", optimizer=sgd, every=6, sparsity=0.5, **arguments):
    """Masks change after every sixth step, nine tenths of each layer at first."""
    sparse = DynamicSparsity(method, sparsity, every_n_steps=every, fraction=0.9, stop=STEPS, verbose=False)
    own = {"probe_size": 24, "pool_size": 48, "every_n_steps": 1, "raise_errors": True, "time_budget": None}
    monitor = LossDecayMonitor(**{**own, "verbose": False, "figure": False, **arguments})
    model = Classifier(optimizer=optimizer)
    pair = (sparse, monitor) if first else (monitor, sparse)
    trainer = make_trainer(*pair, max_epochs=4, limit_train_batches=6, limit_val_batches=0)
    trainer.fit(model, loader(shuffle=True))
    return monitor, sparse, model, trainer


@pytest.mark.parametrize("first", [True, False])
def test_the_kernel_is_computed_again_after_each_update(first):
    monitor, *_ = run(first=first, predict="kernel")
    steps, refreshed = (monitor.curves[key] for key in ("step", "refreshed"))
    # At the look of the update, which comes after it or before; a refreshed prediction is compared from the next on.
    expected = 7 if first else 8
    assert int(steps[refreshed.isfinite()][0]) == expected
    assert monitor._session.tracker.refreshed.start == (18 if first else 19)


def test_of_masks_that_stay_it_is_not():
    monitor, *_ = run(predict="kernel", every=STEPS)
    assert not monitor.curves["refreshed"].isfinite().any()


def test_the_kernel_after_an_update_is_that_of_the_new_masks():
    """Against a kernel of its own of a plain network, at the step of the update."""
    found = {}

    class Look(LossDecayMonitor):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            if trainer.global_step == 6:
                network = self._session.tracker.network
                masks = {name.removeprefix("net."): mask.clone() for name, mask in sparse.masks.items()}
                found["own"] = empirical_ntk(pl_module.net, network.inputs, masks=masks)
                found["theirs"] = network.empirical(lambda module, x, masks: empirical_ntk(module, x, masks=masks))

    sparse = DynamicSparsity("rigl", 0.5, every_n_steps=6, fraction=0.9, stop=STEPS, verbose=False)
    monitor = Look(
        predict="kernel", probe_size=24, pool_size=48, every_n_steps=1, raise_errors=True, time_budget=None,
        verbose=False, figure=False,
    )  # fmt: skip
    trainer = make_trainer(sparse, monitor, max_epochs=4, limit_train_batches=6, limit_val_batches=0)
    trainer.fit(Classifier(optimizer=sgd), loader(shuffle=True))
    torch.testing.assert_close(found["theirs"], found["own"])


@pytest.mark.parametrize("first", [True, False])
def test_copies_change_their_masks_and_the_kernel_does_not(first, capsys):
    monitor, *_ = run(first=first, predict=("kernel", "replay", "rehearsal", "sibling"), verbose=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "Masks change from step 6 on, which kernel and sibling leave out; rehearsal and replay change them" in said
    until = {name: made.until for name, made in monitor.predictions.items()}
    assert until["rehearsal"] == until["replay"] == STEPS
    assert until["sibling"] == 5, "no update is known to a network of another width"


def test_a_rehearsal_is_near_where_one_without_updates_is_far(monkeypatch):
    """Of a dense start one weight in fifty is left at the last update: the loss jumps, and a rehearsal knows of it."""
    adam = {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01), "pool_size": 72}
    arguments = {"predict": "rehearsal", "method": "gmp", "sparsity": 0.98, **adam}
    monitor, *_ = run(**arguments)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_graphon.callbacks._analysis.copies_ahead.planned_updates", lambda *_: [])
        static, *_ = run(**arguments)
    errors = []
    for found in (monitor, static):
        rehearsed = found.predictions["rehearsal"].mean
        errors.append(float((rehearsed.log() - found.curves["observed"].log())[7:].abs().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_a_resumed_run_knows_when_masks_move(tmp_path):
    monitor, *_ = run(predict="rehearsal")
    again = type(monitor._session.ahead).from_state(monitor._session.ahead.state_dict())
    assert again.masks_move == 6
    old = {key: value for key, value in monitor._session.ahead.state_dict().items() if key != "masks_move"}
    assert type(again).from_state(old).masks_move is None
