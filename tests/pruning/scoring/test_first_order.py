"""Random and magnitude."""

import random

import pytest
import torch
from torch import nn

from lightning_graphon.pruning import prune
from tests.helpers.networks import CASES, mlp
from tests.helpers.pruning_oracles import scores_of


def test_random_depends_on_the_seed_alone() -> None:
    masks = prune(mlp(), "random", sparsity=0.8, seed=4)
    torch.manual_seed(99)
    torch.rand(17)
    random.random()
    assert prune(mlp(), "random", sparsity=0.8, seed=4) == masks  # other weights, another global generator
    assert prune(mlp(), "random", sparsity=0.8, seed=5) != masks
    torch.manual_seed(4)
    assert prune(mlp(), "random", sparsity=0.8) != masks


def test_random_keeps_the_same_mask_over_any_number_of_rounds() -> None:
    net = mlp(width=40)
    assert prune(net, "random", sparsity=0.9, steps=7) == prune(net, "random", sparsity=0.9)


def test_random_masks_are_nested_in_the_sparsity() -> None:
    net = mlp(width=40)
    dense, sparse = (prune(net, "random", sparsity=s) for s in (0.5, 0.9))
    assert all(not (sparse[name] & ~dense[name]).any() for name in dense)


def test_random_is_uniform() -> None:
    """Every layer gets its share, and every weight its turn."""
    net = mlp(width=100, inputs=100, outputs=100)
    masks = prune(net, "random", sparsity=0.8)
    for row in masks.table():
        # 2000 of 10000 expected; five standard deviations of 40, and the seed is fixed
        assert abs(row["kept"] - 2000) < 200
    small = mlp(depth=1, inputs=5, outputs=4)
    turns = sum(prune(small, "random", sparsity=0.5, seed=s)["0.weight"].float() for s in range(400))
    # 200 of 400 expected; five standard deviations of 10
    assert (turns - 200).abs().max() < 50


@pytest.mark.parametrize("name", ["mlp", "batchnorm", "grouped"])
def test_magnitude_is_the_absolute_raw_weight(name: str) -> None:
    model = CASES[name].model()
    scores = scores_of("magnitude", model)
    assert all(torch.equal(scores[n], model.get_parameter(n).detach().abs()) for n in scores)


def test_magnitude_does_not_depend_on_the_rounds() -> None:
    net = mlp(width=40)
    assert prune(net, "magnitude", sparsity=0.9, steps=10) == prune(net, "magnitude", sparsity=0.9)


@pytest.mark.parametrize("init", ["default", "normal"])
def test_random_masks_do_not_repeat_the_numbers_that_made_the_weights(init: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(400, 400, bias=False)
    if init == "normal":
        torch.manual_seed(0)
        nn.init.normal_(layer.weight)
    weight = layer.weight.detach() / layer.weight.detach().std()
    kept = weight[prune(layer, "random", sparsity=0.9, seed=0)["weight"]]
    # 16000 independent weights: the mean has a standard error of 0.008, the mean square of at most 0.011.
    assert abs(float(kept.mean())) < 0.04
    assert abs(float(kept.square().mean()) - 1) < 0.055
