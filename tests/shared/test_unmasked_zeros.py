"""The word of warning where a pruned network comes without its masks."""

import warnings

import pytest
import torch
from torch import nn

from lightning_graphon.ntk import EmpiricalNTK, empirical_ntk, graphon_ntk_from_model, ntk_layer_shares
from lightning_graphon.pruning import prune


def chain(pruned):
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    masks = prune(net, "magnitude", sparsity=0.5)
    if pruned:
        masks.apply_(net)
    return net, masks


X = torch.ones(2, 6)
KERNELS = [empirical_ntk, graphon_ntk_from_model, ntk_layer_shares, EmpiricalNTK]


@pytest.mark.parametrize("kernel", KERNELS)
def test_pruned_without_masks(kernel):
    net, _ = chain(pruned=True)
    with pytest.warns(UserWarning, match=r"exactly zero: '0.weight' \(\d+%\), '2.weight'.*masks="):
        kernel(net, X)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_word_otherwise(kernel):
    pruned, masks = chain(pruned=True)
    dense, _ = chain(pruned=False)
    nn.init.zeros_(dense[2].weight)  # a way to initialise, not a mask
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel(pruned, X, masks=masks)
        kernel(pruned, X, masks={})
        kernel(dense, X)


def test_frozen_zeros_are_no_matter():
    net, masks = chain(pruned=False)
    net[0].weight.data *= masks["0.weight"]
    net[0].weight.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empirical_ntk(net, X)


def test_the_line_that_is_blamed_is_the_callers():
    net, _ = chain(pruned=True)
    with pytest.warns(UserWarning, match="exactly zero") as caught:
        empirical_ntk(net, X)
    assert caught[0].filename == __file__
