"""A network on its probe batch."""

import copy

import pytest
import torch
from torch import nn

from lightning_graphon.dynamics.probed_network import ProbedNetwork
from lightning_graphon.ntk import empirical_ntk


def network(dtype):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)


def probed(net):
    return ProbedNetwork(net, torch.randn(5, 4, dtype=next(net.parameters()).dtype), torch.sum)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)],
)
def test_kernels_are_computed_in_the_networks_own_precision(dtype, expected):
    """But not in half precision, which is too coarse."""
    net = network(dtype)
    kernel = probed(net).empirical(empirical_ntk)
    assert kernel.dtype == expected
    assert {parameter.dtype for parameter in net.parameters()} == {dtype}


def test_a_wider_precision_on_request():
    net = network(torch.float32)
    twin, probe = copy.deepcopy(net).double(), probed(net)
    kernel = probe.empirical(empirical_ntk, torch.float64, reduce=None)
    torch.testing.assert_close(kernel, empirical_ntk(twin, probe.inputs.double(), reduce=None))
