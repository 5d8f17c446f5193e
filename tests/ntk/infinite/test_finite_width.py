"""How far one network's kernel is from its limit, against kernels of networks."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_graphon.ntk import empirical_ntk, expected_error


def network(width, seed):
    torch.manual_seed(seed)
    sides = (8, width, width, width, 10)
    layers = [nn.Linear(a, b, bias=False, dtype=torch.float64) for a, b in pairwise(sides)]
    for layer in layers:
        nn.init.normal_(layer.weight, 0.0, (2 / layer.in_features) ** 0.5)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3])


def masks(width, heard):
    """Layers that read only the first units of the one before."""
    model, found = network(width, 0), {}
    for name, weight in model.named_parameters():
        found[name] = torch.zeros_like(weight, dtype=torch.bool)
        found[name][:, : heard if weight.shape[1] == width else None] = True
    return found


@pytest.mark.parametrize(("width", "heard"), [(32, 32), (128, 128), (128, 24)])
def test_kernels_of_networks_scatter_by_it(width, heard):
    """24 kernels tell their scatter to 15 %, 1 / √48; the law holds within a factor of 1.25: 1.25 · 1.3 for both."""
    x = torch.rand(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kernels = torch.stack([empirical_ntk(network(width, s), x, masks=masks(width, heard)) for s in range(24)])
    scatter = float(kernels.var(0).sum().sqrt() / kernels.mean(0).norm())
    found = expected_error(masks(width, heard))
    assert 1 / 1.6 < scatter / found.error < 1.6
    assert (round(found.units), found.fan_in) == (heard, heard)


def test_units_that_are_heard_more_count_for_fewer():
    hubs = torch.ones(40, 100, dtype=torch.bool)
    hubs[8:, 10:] = False  # ten units are read 40 times, ninety 8 times
    given = {"in": torch.ones(100, 3), "hubs": hubs, "out": torch.ones(10, 40)}
    total = 10 * 40 + 90 * 8
    units = total**2 / (10 * 40**2 + 90 * 8**2)
    assert expected_error(given).error == pytest.approx(1.85 * (1 / units + 1 / 40) ** 0.5)
    assert expected_error(given).layer == "out"
    assert expected_error(given).error == expected_error(given | {"in": torch.zeros(100, 3)}).error


def test_nothing_is_said_of_one_layer_or_an_empty_one():
    assert expected_error({"only": torch.ones(3, 4)}) is None
    assert expected_error({"in": torch.ones(3, 4), "out": torch.zeros(2, 3)}) is None
