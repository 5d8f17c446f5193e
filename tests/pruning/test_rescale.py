"""Rescaled weights: the second moment of pre-activations, and the energy graphon, of the dense network."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_graphon.graphon import layer_graphons
from lightning_graphon.ntk import graphon_ntk_from_model
from lightning_graphon.pruning import Masks, prune, rescale_
from tests.helpers.networks import CASES, mlp

pytestmark = pytest.mark.filterwarnings("ignore::lightning_graphon.pruning.LayerCollapseWarning")
METHODS = ["random", "magnitude", "snip", "synflow"]


def he_mlp(width: int, depth: int = 4, inputs: int = 64, outputs: int = 10) -> nn.Sequential:
    """He's initialisation: pre-activations keep their second moment through the layers."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise([inputs, *[width] * (depth - 1), outputs]):
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


def masks_in_use(net: nn.Module, method: str, sparsity: float = 0.8) -> Masks:
    batch = (torch.randn(64, 64), torch.arange(64) % 10)
    return prune(net, method, sparsity=sparsity, batches=[batch], steps=5 if method == "synflow" else None)


def by_units(layer: Any, weight: Tensor) -> Tensor:
    """[out, the rest] of a weight, by hand."""
    if not getattr(layer, "transposed", False):
        return weight.flatten(1)
    blocks = weight.chunk(layer.groups)  # [in / groups, out / groups, *taps] each
    return torch.cat([block[:, unit].reshape(1, -1) for block in blocks for unit in range(block.shape[1])])


LAYERS = [
    lambda: nn.Linear(20, 7),
    lambda: nn.Conv1d(4, 6, 3),
    lambda: nn.Conv2d(4, 6, 3, groups=2),
    lambda: nn.ConvTranspose1d(4, 6, 3),
    lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2),
]


@pytest.mark.parametrize("by", ["unit", "layer"])
@pytest.mark.parametrize("build", LAYERS)
def test_the_sum_of_squares_is_that_before(build: Any, by: str) -> None:
    layer = build().double()
    masks = prune(layer, "random", sparsity=0.8, seed=1)
    dense, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    parameter = layer.weight
    rescale_(layer, masks, by)
    assert layer.weight is parameter
    assert torch.equal(layer.bias, bias)
    assert (layer.weight[~masks["weight"]] == 0).all()
    before, after = by_units(layer, dense).square().sum(1), by_units(layer, layer.weight.detach()).square().sum(1)
    alive = by_units(layer, masks["weight"]).any(1)
    if by == "unit":
        torch.testing.assert_close(after[alive], before[alive])
    else:
        torch.testing.assert_close(after.sum(), before.sum())
        factors = (layer.weight / dense)[masks["weight"]]
        torch.testing.assert_close(factors, factors[:1].expand_as(factors))
        assert factors[0] > 1
    assert (layer.weight.detach().sign() * dense.sign())[masks["weight"]].eq(1).all()


def test_units_without_inputs_stay_zero_and_others_do_not_pay_for_them() -> None:
    net = nn.Linear(6, 3)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1] = False
    for by in ("unit", "layer"):
        layer = copy.deepcopy(net)
        rescale_(layer, Masks({"weight": mask}), by)
        assert (layer.weight[1] == 0).all()
        assert layer.weight.isfinite().all()
        assert torch.equal(layer.weight[[0, 2]], net.weight[[0, 2]]) == (by == "unit")
    empty = copy.deepcopy(net)
    rescale_(empty, Masks({"weight": torch.zeros(3, 6, dtype=torch.bool)}), "layer")
    assert (empty.weight == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_dense_layer_does_not_change_and_twice_is_once(dtype: torch.dtype) -> None:
    net = mlp().to(dtype)
    dense = copy.deepcopy(net.state_dict())
    rescale_(net, Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters()}))
    for name, value in net.state_dict().items():
        assert torch.equal(value, dense[name]), name
    masks = prune(net, "magnitude", sparsity=0.7)
    rescale_(net, masks)
    once = copy.deepcopy(net.state_dict())
    rescale_(net, masks)
    for name, value in net.state_dict().items():
        assert torch.equal(value, once[name]), name


def test_a_tied_weight_is_scaled_once() -> None:
    model = CASES["tied"].model()
    masks = prune(model, "random", sparsity=0.5)
    dense = model.lm_head.weight.detach().clone()
    rescale_(model, masks)
    assert model.lm_head.weight is model.embedding.weight
    torch.testing.assert_close(model.lm_head.weight.norm(dim=1), dense.norm(dim=1))


@pytest.mark.parametrize("method", METHODS)
def test_monte_carlo_over_inputs_each_unit_has_the_dense_second_moment(method: str) -> None:
    """For independent inputs of zero mean it is Σ w², whatever the method chose by."""
    net = he_mlp(48, depth=2).double()
    masks = masks_in_use(copy.deepcopy(net).float(), method)
    x = torch.randn(20_000, 64, dtype=torch.float64)
    before = net[0](x).detach().square().mean(0)
    masks.apply_(pruned := copy.deepcopy(net))
    rescale_(net, masks)
    after, alive = net[0](x).detach().square().mean(0), masks["0.weight"].any(1)
    ratio = (after / before)[alive]
    # Each mean of 20000 squares is off by √(2 / 20000) = 1 %, their ratio by 1.4 %; four times that for 48 units.
    assert (ratio - 1).abs().max() < 0.06
    assert (pruned[0](x).detach().square().mean(0) / before)[alive].mean() < 0.8


@pytest.mark.parametrize("by", ["unit", "layer"])
@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_a_deep_network_keeps_its_signal(method: str, by: str) -> None:
    """Within 10 % of the dense network at every hidden layer; the last one's ten outputs fluctuate by more."""
    x, found = torch.randn(256, 64), []
    for seed in range(4):
        torch.manual_seed(seed)
        net = he_mlp(384)
        dense = moments(net, x)
        masks = prune(net, method, sparsity=0.8, seed=seed)
        masks.apply_(faded := copy.deepcopy(net))
        assert moments(faded, x)[-1] < 0.4 * dense[-1]
        rescale_(net, masks, by)
        found.append(moments(net, x) / dense)
    torch.testing.assert_close(torch.stack(found).mean(0)[:-1], torch.ones(3), atol=0.1, rtol=0)


def moments(net: nn.Sequential, x: Tensor) -> Tensor:
    """Mean square of every Linear layer's outputs."""
    found = []
    for layer in net:
        x = layer(x).detach()
        if isinstance(layer, nn.Linear):
            found.append(x.square().mean())
    return torch.stack(found)


@pytest.mark.parametrize("method", METHODS)
def test_the_energy_graphon_has_the_integrals_of_the_dense_one(method: str) -> None:
    net = he_mlp(32, depth=3)
    masks = masks_in_use(net, method, 0.6)
    net = net.double()
    everything = {name: torch.ones_like(mask) for name, mask in masks.items()}
    dense = layer_graphons(everything, model=net, order="none", bins=10_000)
    rescale_(net, masks, "unit")
    sparse = layer_graphons(masks, model=net, order="none", bins=10_000)
    for name, mask in masks.items():
        rows = [graphon[name].energy.mean(1)[mask.any(1)] for graphon in (sparse, dense)]
        torch.testing.assert_close(*rows)


def test_of_a_random_mask_the_kernel_falls_by_the_density_alone() -> None:
    """Only the fraction of weights that move is left of it: Θ = c Θ_dense, where it was c⁴ without rescaling."""
    net = he_mlp(256).double()
    x = torch.randn(8, 64, dtype=torch.float64)
    dense = graphon_ntk_from_model(net, x)
    masks = prune(net, "random", sparsity=0.8)
    masks.apply_(faded := copy.deepcopy(net))
    rescale_(net, masks)
    ratio = graphon_ntk_from_model(net, x, masks) / dense
    # The masks fluctuate: 0.1975 and 0.0015 were measured.
    torch.testing.assert_close(ratio.mean(), torch.tensor(0.2, dtype=torch.float64), atol=0.01, rtol=0)
    torch.testing.assert_close(
        (graphon_ntk_from_model(faded, x, masks) / dense).mean(),
        torch.tensor(0.2**4, dtype=torch.float64),
        atol=2e-4,
        rtol=0,
    )


def test_what_is_wrong_is_refused() -> None:
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    masks = prune(net, "magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match=r"unknown rescale 'units'.*'unit'"):
        rescale_(net, masks, "units")
    with pytest.raises(ValueError, match="made for another model"):
        rescale_(nn.Linear(2, 2), masks)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
