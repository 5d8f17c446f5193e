"""Masks that somebody else made."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from lightning_graphon.pruning.read_masks import read_masks


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))


def test_dense_models_keep_everything():
    masks = read_masks(net())
    assert list(masks) == ["0.weight", "2.weight"]
    assert masks.sparsity == 0


def test_zeros_are_pruned_weights():
    model = net()
    with torch.no_grad():
        model[2].weight[1] = 0
    assert read_masks(model)["2.weight"].tolist() == [[True] * 5, [False] * 5, [True] * 5, [True] * 5]


def test_torch_pruning_is_read_from_its_buffers_in_network_order():
    model = net()
    torch_prune.random_unstructured(model[0], "weight", amount=0.5)
    masks = read_masks(model)
    assert list(masks) == ["0.weight", "2.weight"]
    assert torch.equal(masks["0.weight"], model[0].weight_mask.bool())
    torch_prune.random_unstructured(model[2], "weight", amount=0.5)
    assert set(read_masks(model)) == {"0.weight", "2.weight"}


def test_nothing_to_read():
    with pytest.raises(ValueError, match="no weight to prune"):
        read_masks(nn.BatchNorm1d(3))
