"""The published methods and scores of other weights, in a Trainer: the masks of `prune`, and where masks begin."""

import pytest
import torch

from lightning_graphon.callbacks import DynamicSparsity, PruneAtInit
from tests.callbacks.test_same_masks import ByLayers, ByNet, direct
from tests.helpers.modules import PUBLISHED, Classifier, cnn, disagreement, loader, make_trainer, mlp, pruned_max

MASKS = {"verbose": False, "sparsity": 0.9, "steps": 5}


def found(pruner, model):
    make_trainer(pruner).fit(model, loader())
    assert pruned_max(model, pruner.masks) == 0.0
    return {k.removeprefix("net."): v for k, v in pruner.masks.items()}


@pytest.mark.parametrize("kind", [Classifier, ByNet, ByLayers])
@pytest.mark.parametrize("method", PUBLISHED)
def test_equals_prune_however_the_network_is_called(method, kind):
    model = kind(mlp)
    expected = direct(model.net, method, steps=5)
    assert disagreement(found(PruneAtInit(method, **MASKS), model), expected) < 1e-3


@pytest.mark.parametrize("method", PUBLISHED)
def test_with_batch_norm(method):
    model = Classifier(cnn)
    expected = direct(model.net.eval(), method, steps=5)
    model.net.train()
    assert disagreement(found(PruneAtInit(method, eval_mode=True, **MASKS), model), expected) < 1e-3


@pytest.mark.parametrize("method", ["snip", "magnitude", "px"])
def test_rescored_masks_do_not_depend_on_the_weights_that_train(method):
    masks = [found(PruneAtInit(method, rescore="redrawn", **MASKS), Classifier(mlp, seed=seed)) for seed in (1, 2)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    expected = direct(Classifier(mlp, seed=3).net, method, steps=5, rescore="redrawn")
    assert disagreement(masks[0], expected) < 1e-3


@pytest.mark.parametrize("start", [*PUBLISHED, "snip"])
def test_masks_that_move_begin_with_them(start):
    rescore = "redrawn" if start == "snip" else None
    pruner = DynamicSparsity("set", sparsity=0.9, start=start, rescore=rescore, every_n_steps=2, stop=4, verbose=False)
    assert pruner.config.rescore == rescore
    make_trainer(pruner, max_steps=3).fit(model := Classifier(mlp), loader())
    assert pruned_max(model, pruner.masks) == 0.0
    assert pruner.masks.sparsity == pytest.approx(0.9, abs=1e-3)
