"""A layer's part of the kernel from the factors of its gradients, against its gradients."""

import pytest
import torch
from torch import nn

from lightning_graphon.ntk import empirical_ntk
from tests.helpers.ntk_oracles import jacobian_kernel, relative


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_two_groups_at_one_position(groups):
    """A kernel as large as the image: one position like a linear layer, but several groups."""
    model = nn.Sequential(nn.Conv2d(6, 12, 3, groups=groups, bias=False), nn.Flatten(), nn.Tanh()).double()
    x = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    assert relative(empirical_ntk(model, x, reduce=None), jacobian_kernel(model, x)) < 1e-12


@pytest.mark.parametrize("size", [3, 4, 9])
def test_every_way_of_summing_gives_the_same_kernel(size):
    """By Gram matrices of positions or by gradients, whichever is cheaper for so many positions."""
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(5 * (size - 2) ** 2, 3)).double()
    x = torch.randn(4, 2, size, size, dtype=torch.float64)
    full = empirical_ntk(model, x, reduce=None)
    per_output = torch.einsum("ncmc->cnm", full)
    assert relative(full, jacobian_kernel(model, x)) < 1e-12
    assert relative(empirical_ntk(model, x, reduce="per_output"), per_output) < 1e-12
    assert relative(empirical_ntk(model, x), per_output.mean(0)) < 1e-12
