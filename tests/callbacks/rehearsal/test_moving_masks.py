"""Rehearsals of trainings whose masks change: on the very batches of training they are the training, bit for bit."""

import copy

import pytest
import torch
from torch import nn

from lightning_graphon.callbacks import DynamicSparsity, PruneAtInit
from tests.helpers.modules import Classifier, loader, make_trainer, mlp
from tests.helpers.rehearsal_cases import Rehearses


def cnn():
    """Without dropout, whose random numbers a data loader of an epoch would shift."""
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 10))


PRODUCT = {"graphons": {"family": "product"}}


class RehearsesMoving(Rehearses):
    """With what changes the masks; `static` leaves it out."""

    def __init__(self, *pruners, static=False, **arguments):
        super().__init__(**arguments)
        self.pruners, self.static = pruners, static

    def rehearse(self, trainer, pl_module):
        masks = {name: mask for pruner in self.pruners for name, mask in pruner.masks.items()}
        self.pruner = type("Both", (), {"masks": type(self.pruners[0].masks)(masks)})
        plans = [pruner.plan(trainer, pl_module) for pruner in self.pruners]
        self.updaters = [plan for plan in plans if plan is not None]
        before = copy.deepcopy([updater.state_dict() for updater in self.updaters])
        own = {name: mask.clone() for name, mask in masks.items()}
        self.arguments = {"moving": () if self.static else self.updaters}
        super().rehearse(trainer, pl_module)
        assert [updater.state_dict()["steps"] for updater in self.updaters] == [state["steps"] for state in before]
        assert all(torch.equal(mask, own[name]) for name, mask in masks.items()), "the module's masks stay"


def moving(method, **kwargs):
    options = PRODUCT if method == "graphon" else {"momentum": 0.8} if method == "snfs" else {}
    own = {"every_n_steps": 3, "fraction": 0.5, "options": options, "verbose": False}
    return DynamicSparsity(method, 0.8, **{**own, **kwargs})


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def run(*pruners, net=mlp, optimizer=adam, trainer=None, **arguments):
    callback = RehearsesMoving(*pruners, steps=11, **arguments)
    options = {"max_epochs": 5, "limit_train_batches": 4, **(trainer or {})}
    make_trainer(*pruners, callback, **options).fit(Classifier(net, optimizer), loader())
    rehearsed, observed = callback.compare()
    assert len(observed) > 3
    return rehearsed, observed


@pytest.mark.parametrize("net", [mlp, cnn])
@pytest.mark.parametrize("method", ["set", "rigl", "snfs", "srigl", "graphon", "gmp"])
def test_masks_change_in_a_rehearsal_as_they_will(method, net):
    rehearsed, observed = run(moving(method), net=net)
    assert rehearsed == observed


def test_without_the_updates_it_is_another_training():
    rehearsed, observed = run(moving("rigl"), static=True)
    assert rehearsed[:3] == observed[:3]
    assert rehearsed[4:] != observed[4:]


@pytest.mark.parametrize("at", [2, 4, 7])
def test_from_the_middle_of_a_schedule(at):
    rehearsed, observed = run(moving("rigl"), at=at)
    assert rehearsed == observed


def test_beside_masks_that_stay_and_others_that_move():
    parts = (
        moving("rigl", include="net.0"),
        moving("set", include="net.2", every_n_steps=2),
        PruneAtInit("random", 0.5, include="net.4", verbose=False),
    )
    rehearsed, observed = run(*parts)
    assert rehearsed == observed


def test_under_accumulation_and_clipping():
    trainer = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 8}
    rehearsed, observed = run(moving("rigl", every_n_steps=2), trainer=trainer)
    assert rehearsed == observed
