"""Batch norm that has seen little data is read with the statistics of what it has seen, or of the probe."""

import pytest
import torch
from torch import nn

from lightning_graphon._shared.batch_norm import batch_norms, settle_batch_norms, unused_batch_norms
from lightning_graphon.dynamics import ProbedNetwork
from lightning_graphon.ntk import empirical_ntk


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
    )


def data(count=32):
    return 5 + 3 * torch.randn(count, 4, generator=torch.Generator().manual_seed(1))


def test_without_data_the_statistics_are_those_of_the_probe():
    """As a pass in train mode normalises, layer after layer."""
    net, x = network(), data()
    expected = net.train()(x).detach()
    net = network().eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    probed = ProbedNetwork(net, x, lambda outputs: outputs.sum())
    with probed.evaluated(), torch.no_grad():
        torch.testing.assert_close(probed.outputs(), expected)
    with probed.first(3).selected(torch.tensor([1])).evaluated(), torch.no_grad():
        torch.testing.assert_close(net(x)[:3], expected[:3])  # of all samples, not of three
    assert {k: v.tolist() for k, v in net.state_dict().items()} == {k: v.tolist() for k, v in before.items()}


@pytest.mark.parametrize(("batches", "measured"), [(1, True), (60, True), (70, False)])
def test_statistics_are_measured_until_the_initial_ones_no_longer_count(batches, measured):
    net, x = network(), data()
    assert unused_batch_norms(net) == {"1", "4"}
    for _ in range(batches):
        net.train()(x + 0.1 * torch.randn_like(x))
    before = net.eval()[1].running_mean.clone()
    settle_batch_norms(batch_norms(net).values(), lambda: net(x))
    expected = net[0](x).mean(0) if measured else before
    torch.testing.assert_close(net[1].running_mean, expected)


def test_settled_and_loaded_statistics_are_left():
    net = network()
    net[1].running_mean.fill_(0.5)  # loaded, perhaps without the number of batches
    assert unused_batch_norms(net) == {"4"}
    assert not unused_batch_norms(nn.BatchNorm1d(3, track_running_stats=False))


def test_the_kernel_does_not_move_because_statistics_arrive():
    """With means of 0 and variances of 1 the kernel grows with the square of the data."""
    net, x = network(), 30 * data()
    probed = ProbedNetwork(net, x, lambda outputs: outputs.sum())
    start = probed.empirical(empirical_ntk).trace()
    net.train()(x)
    torch.testing.assert_close(probed.empirical(empirical_ntk).trace(), start, rtol=0.1, atol=0)
    raw = empirical_ntk(network(), x).trace()
    assert raw > 3 * start
