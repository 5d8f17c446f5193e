"""Weights that are frozen, thaw, are replaced, or are copied from others while a network trains sparse."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import nn
from torch.nn import functional as F

from lightning_graphon.callbacks import LossDecayMonitor, PruneAtInit
from lightning_graphon.pruning import Masks, prune
from tests.helpers.modules import Classifier, Probe, loader, make_trainer, pruned_max, quiet, sgd

METHODS = ("magnitude", "snip", "grasp", "synflow")


class Transfer(Classifier):
    """A backbone that a `BackboneFinetuning` thaws."""

    def __init__(self):
        super().__init__(nn.Identity)
        torch.manual_seed(3)
        self.backbone, self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.backbone(x))

    def configure_optimizers(self):
        return sgd([p for p in self.parameters() if p.requires_grad])


@pytest.mark.parametrize("method", METHODS)
def test_a_backbone_that_thaws_later_trains_sparse(method):
    pruner = quiet(method, include=["backbone", "head"], min_density=0.02)
    model = Transfer()
    make_trainer(pruner, BackboneFinetuning(1, lambda epoch: 1.0), max_epochs=3).fit(model, loader())
    assert list(pruner.masks) == ["backbone.0.weight", "head.weight"]
    assert pruned_max(model, pruner.masks) == 0.0
    assert model.backbone[0].weight.requires_grad
    start = Transfer().backbone[0].weight
    assert not torch.equal(
        model.backbone[0].weight[pruner.masks["backbone.0.weight"]], start[pruner.masks["backbone.0.weight"]]
    )


def test_by_default_it_stays_dense_and_is_told():
    model = Transfer()
    with pytest.warns(UserWarning, match=r"backbone\.0\.weight \(frozen\); include=\['\*', 'backbone'\]"):
        make_trainer(quiet("magnitude"), BackboneFinetuning(1, lambda epoch: 1.0), max_epochs=3).fit(model, loader())
    assert model.backbone[0].weight.count_nonzero() == 64 * 32


def test_scoring_leaves_flags_as_they_were():
    model = Transfer()
    model.backbone.requires_grad_(False)
    pruner = quiet("snip", include=["backbone", "head"], min_density=0.02)
    make_trainer(pruner).fit(model, loader())
    assert not model.backbone[0].weight.requires_grad
    assert pruned_max(model, pruner.masks) == 0.0


class Alternating(pl.LightningModule):
    """Freezes the discriminator for the generator's step, as pix2pix does."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.made, self.judge = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        x, (of_made, of_judge) = batch[0], self.optimizers()
        fake = self.made(x)
        self.judge.requires_grad_(True)
        of_judge.zero_grad()
        self.manual_backward(self.judge(fake.detach()).square().mean() + (self.judge(x) - 1).square().mean())
        of_judge.step()
        self.judge.requires_grad_(False)
        of_made.zero_grad()
        self.manual_backward((self.judge(fake) - 1).square().mean())
        of_made.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.made.parameters(), 1e-3), torch.optim.Adam(self.judge.parameters(), 1e-3)]


@pytest.mark.parametrize("method", METHODS[1:])
def test_flags_toggled_in_the_step(method):
    pruner, model = quiet(method, 0.5), Alternating()
    make_trainer(pruner).fit(model, loader())
    assert len(pruner.masks) == 3
    assert pruned_max(model, pruner.masks) == 0.0


def test_toggled_flags_change_no_score():
    """The losses of both networks as one sum, by hand."""
    model = Alternating()
    x = loader(32).dataset.tensors[0][:16]
    frozen = copy.deepcopy(model.judge).requires_grad_(False)
    fake = model.made(x)
    loss = model.judge(fake.detach()).square().mean() + (model.judge(x) - 1).square().mean()
    (loss + (frozen(fake) - 1).square().mean()).backward()
    scores = torch.cat([(p * p.grad).abs().flatten() for n, p in model.named_parameters() if n.endswith("weight")])
    pruner = PruneAtInit("snip", 0.5, batches=[(x,)], verbose=False)
    make_trainer(pruner).fit(Alternating(), loader())
    kept = torch.cat([mask.flatten() for mask in pruner.masks.values()])
    assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-4)


class NewHead(Callback):
    """Puts another head in its place at the second epoch."""

    def __init__(self, width):
        self.width = width

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.net[4] = nn.Linear(24, self.width)
            trainer.optimizers[0].add_param_group({"params": pl_module.net[4].parameters()})


def test_a_new_head_of_the_same_shape_has_the_mask(tmp_path):
    pruner, model = quiet("magnitude", min_density=0.05), Classifier()
    trainer = make_trainer(pruner, NewHead(10), max_epochs=3)
    trainer.fit(model, loader())
    assert pruned_max(model, pruner.masks) == 0.0
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_a_new_head_of_another_shape_is_dense_and_told():
    pruner, model = quiet("magnitude", min_density=0.05), Classifier()
    with pytest.warns(UserWarning, match=r"dense from now on, .* replaced: net\.4\.weight"):
        make_trainer(pruner, NewHead(12), max_epochs=3).fit(model, loader())
    assert list(pruner.masks) == ["net.0.weight", "net.2.weight"]
    assert pruned_max(model, pruner.masks) == 0.0


class Restless(torch.optim.SGD):
    """Moves every weight at every step."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(0.125)


class NewOptimizer(Callback):
    """Sets the optimizers up anew, as for another phase of training."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.strategy.optimizers = [Restless(pl_module.parameters(), lr=0.01)]


def test_new_optimizers_are_followed():
    pruner, model = quiet("magnitude", min_density=0.05), Classifier()
    probe = Probe(pruner)
    make_trainer(pruner, NewOptimizer(), probe, max_epochs=3).fit(model, loader())
    assert probe.worst["step"] == probe.worst["batch"] == 0.0


class Followed(Classifier):
    """A copy of the network that follows it, or does not.

    Args:
        kind: How.
        frozen: Whether the copy's flags say that it is not trained; the optimizer does not have it anyway.
    """

    def __init__(self, kind, frozen=True):
        super().__init__()
        self.kind, self.teacher = kind, copy.deepcopy(self.net).requires_grad_(not frozen)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y) + 0.0 * self.teacher(x).sum()

    def configure_optimizers(self):
        return sgd(self.net.parameters())

    @torch.no_grad()
    def on_train_batch_end(self, *args):
        for theirs, ours in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            if self.kind == "average":
                theirs.lerp_(ours, 0.01)
            elif self.kind == "data":
                theirs.data = 0.99 * theirs.data + 0.01 * ours.data
            elif self.kind == "target" and self.trainer.current_epoch == 1:
                theirs.copy_(ours)


@pytest.mark.parametrize("kind", ["average", "data", "target"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("method", ["snip", "given"])
def test_a_copy_that_follows_is_as_sparse(kind, frozen, method):
    model = Followed(kind, frozen)
    pruner = (
        quiet("snip")
        if method == "snip"
        else PruneAtInit.from_masks(prune(Classifier(), "magnitude", sparsity=0.9), verbose=False)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "not pruned")
        make_trainer(pruner, max_epochs=3).fit(model, loader())
    assert list(pruner.masks) == ["net.0.weight", "net.2.weight", "net.4.weight"]
    teacher = Masks({name.replace("net", "teacher"): mask for name, mask in pruner.masks.items()})
    assert pruned_max(model, teacher) == 0.0
    assert all(model.get_parameter(name)[mask].all() for name, mask in teacher.items())


def test_a_reference_that_nobody_writes_to_stays_dense():
    model = Followed("reference")
    before = copy.deepcopy(model.teacher.state_dict())
    make_trainer(quiet("snip"), max_epochs=3).fit(model, loader())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.teacher.state_dict().items())


def test_predictions_go_on_when_groups_are_added():
    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                trainer.optimizers[0].add_param_group({"params": pl_module.net[4].parameters()})

    model = Classifier(optimizer=lambda p: torch.optim.SGD(list(p)[:4], lr=0.01))
    options = {"time_budget": float("inf"), "figure": False, "verbose": False, "raise_errors": True}
    watch = LossDecayMonitor(every_n_steps=1, probe_size=16, **options)
    make_trainer(watch, Unfreeze(), limit_train_batches=1.0).fit(model, loader())
    refreshed, step = watch.curves["refreshed"], watch.curves["step"]
    assert step.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert watch.curves["predicted"].isfinite().tolist() == (step < 4).tolist()
    assert refreshed.isfinite().tolist() == (step > 4).tolist()
    assert watch.invalid_from == 4
    assert (refreshed / watch.curves["observed"] - 1)[step > 4].abs().max() < 0.01
