"""Which axis of a weight belongs to its outputs."""

import pytest
import torch
from torch import nn

from lightning_graphon._shared.weight_layout import layout_of, swap_sides


@pytest.mark.parametrize("groups", [0, 1, 2, 3])
def test_there_and_back(groups):
    weight = torch.rand(6, 2, 5)
    assert torch.equal(swap_sides(swap_sides(weight, groups), groups), weight)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_are_the_outputs_of_a_transposed_convolution(groups):
    layer = nn.ConvTranspose1d(4, 6, 3, groups=groups, bias=False)
    by_output = torch.zeros(6, 4 // groups, 3)
    by_output[5] = 1
    layer.weight.data = swap_sides(by_output, groups)
    out = layer(torch.ones(1, 4, 7))[0]
    assert out.abs().sum(1).nonzero().flatten().tolist() == [5]


def test_only_transposed_convolutions_are_transposed():
    net = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(4, 4, 1, groups=2), nn.ConvTranspose1d(4, 4, 1, groups=2))
    assert [layout_of(net, f"{i}.weight")[:2] for i in range(3)] == [(False, 1), (False, 2), (True, 2)]
