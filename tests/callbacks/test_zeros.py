"""Pruned weights are exactly zero after every step of any optimizer, and stay the same parameters."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.helpers.modules import (
    METHODS,
    Autoencoder,
    Classifier,
    Gan,
    Probe,
    cnn,
    loader,
    make_trainer,
    mlp,
    pruned_max,
    quiet,
    sgd,
)


@pytest.mark.parametrize("net", [mlp, cnn])
@pytest.mark.parametrize("method", METHODS)
def test_trains_sparse_from_the_first_step(method, net, tmp_path):
    pruner = quiet(method)
    probe, model = Probe(pruner), Classifier(net)
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(pruner, probe, saved, enable_checkpointing=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.fit(model, loader(), loader(32))

    masks = pruner.masks
    assert list(masks) == [n for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1]
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(total / 10)
    assert masks.sparsity == pytest.approx(0.9, abs=0.5 / total)
    assert probe.worst == {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}
    assert min(probe.seen.values()) > 0
    assert pruned_max(model, masks) == 0.0
    moved = [n for n in masks if not torch.equal(model.get_parameter(n)[masks[n]], before[n][masks[n]])]
    assert moved, "the kept weights must train"
    checkpoints = list(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 3
    for path in checkpoints:
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(state[name][~mask].count_nonzero() == 0 for name, mask in masks.items())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum decay": sgd,
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw foreach off": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("history", [False, True], ids=["fresh", "dense history"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=[o.replace(" ", "-") for o in OPTIMIZERS])
def test_any_optimizer(optimizer, history):
    class WithHistory(Classifier):
        """Its optimizer remembers five steps of a dense life."""

        def configure_optimizers(self):
            made = super().configure_optimizers()
            for batch, _ in zip(loader(), range(5 if history else 0), strict=False):
                made.zero_grad()
                Classifier.training_step(self, batch, 0).backward()
                made.step()
            made.zero_grad()
            return made

    pruner = quiet("snip")
    probe, model = Probe(pruner), WithHistory(optimizer=OPTIMIZERS[optimizer])
    make_trainer(pruner, probe, limit_train_batches=6, max_epochs=2).fit(model, loader(), loader(32))
    assert probe.worst == {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}
    assert probe.seen["step"] > 0
    assert probe.seen["validation"] > 0


def test_optimizer_of_ones_own_may_do_anything():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(torch.randn_like(p), alpha=0.01)
            return loss

    pruner = quiet("magnitude")
    probe = Probe(pruner)
    make_trainer(pruner, probe).fit(Classifier(optimizer=lambda p: Noisy(p, lr=0.1)), loader())
    assert probe.worst["step"] == 0.0
    assert probe.seen["step"] > 0


@pytest.mark.parametrize("lr", [0.05, 0.0])
def test_lbfgs(lr):
    pruner = quiet("magnitude")
    probe = Probe(pruner)
    model = Classifier(optimizer=lambda p: torch.optim.LBFGS(p, lr=lr, max_iter=3))
    make_trainer(pruner, probe).fit(model, loader())
    assert pruned_max(model, pruner.masks) == 0.0
    assert probe.worst["batch"] == 0.0


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_sees_masked_gradients(algorithm):
    class Norms(Callback):
        """The gradient's norm that clipping sees, against the norm of the kept weights' gradient alone."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            named = dict(pl_module.named_parameters())
            self.grads = {n: named[n].grad.clone() for n in pruner.masks}

    pruner, norms = quiet("snip"), Norms()
    model = Classifier(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    trainer = make_trainer(
        pruner, norms, limit_train_batches=1, gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm
    )
    before = Classifier()
    trainer.fit(model, loader())
    # The step that a clipped, masked gradient gives, worked out by hand.
    pruner.masks.apply_(before)
    before.training_step(next(iter(loader())), 0).backward()
    for name, p in before.named_parameters():
        if name in pruner.masks:
            p.grad.mul_(pruner.masks[name])
    if algorithm == "norm":
        torch.nn.utils.clip_grad_norm_(before.parameters(), 1e-3)
    else:
        torch.nn.utils.clip_grad_value_(before.parameters(), 1e-3)
    for (name, p), (_, q) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(p.detach() - 0.1 * p.grad, q.detach(), msg=name)
    assert all(norms.grads[n][~m].count_nonzero() == 0 for n, m in pruner.masks.items())


@pytest.mark.parametrize("accumulate", [2, 3])
def test_gradient_accumulation(accumulate):
    pruner = quiet("snip")
    probe, model = Probe(pruner), Classifier()
    trainer = make_trainer(pruner, probe, accumulate_grad_batches=accumulate, limit_train_batches=6, max_epochs=2)
    trainer.fit(model, loader())
    assert trainer.global_step == 12 // accumulate
    assert probe.worst == {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}


@pytest.mark.parametrize("method", METHODS)
def test_manual_optimisation_with_two_optimizers(method):
    pruner = quiet(method, batches=2)
    probe, model = Probe(pruner), Gan()
    trainer = make_trainer(pruner, probe, max_epochs=2)
    trainer.fit(model, loader(shuffle=True))
    assert trainer.global_step == 12  # two optimizers, three batches, two epochs: scoring took no step
    assert {name.split(".")[0] for name in pruner.masks} == {"generator", "discriminator"}
    assert probe.seen["gradient"] > 0
    assert probe.worst == {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}
    assert pruner.masks.sparsity == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_keep_their_identity(method):
    pruner, model, seen = quiet(method), Classifier(cnn), {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen["optimizer"] = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}

    ids, keys = {id(p) for p in model.parameters()}, list(model.state_dict())
    make_trainer(pruner, Look()).fit(model, loader())
    assert {id(p) for p in model.parameters()} == ids == seen["optimizer"]
    assert list(model.state_dict()) == keys == list(Classifier(cnn).state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in Classifier(cnn).named_buffers()]


def test_sparsity_of_every_module_that_is_selected_and_of_no_other():
    pruner = quiet("magnitude", 0.5, include="encoder.*")
    model = Autoencoder()
    make_trainer(pruner).fit(model, loader())
    assert list(pruner.masks) == ["encoder.0.weight", "encoder.2.weight"]
    assert pruned_max(model, pruner.masks) == 0.0
    assert all(p.count_nonzero() == p.numel() for n, p in model.named_parameters() if n.startswith("decoder"))


def test_frozen_and_normalisation_and_bias_untouched_by_pruning():
    model = Classifier(cnn, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    model.net[1].weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pruner = quiet("snip")
    make_trainer(pruner).fit(model, loader())
    assert list(pruner.masks) == ["net.4.weight", "net.9.weight"]
    for name, p in model.named_parameters():
        expected = before[name] * pruner.masks[name] if name in pruner.masks else before[name]
        assert torch.equal(p.detach(), expected), name


def test_gradients_written_by_hand_do_not_bring_weights_back():
    class GradientNoise(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for p in pl_module.parameters():
                p.grad.add_(torch.randn_like(p))

    pruner, after = quiet("magnitude"), []

    class After(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            after.append(pruned_max(pl_module, pruner.masks))

    make_trainer(pruner, GradientNoise(), After()).fit(Classifier(), loader())
    assert after == [0.0, 0.0, 0.0]
