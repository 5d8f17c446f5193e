"""Products of outputs, and their mean over networks."""

import pytest
import torch
from torch import nn

from lightning_graphon.ntk import empirical_nngp, graphon_ntk_from_model, sampled_ntk

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()


def network(width=128, outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, outputs)).double()


def test_products_of_the_masked_networks_outputs():
    model = network()
    masks = {"0.weight": torch.rand(128, 4) < 0.5}
    pruned = network()
    pruned[0].weight.data *= masks["0.weight"]
    f = pruned.eval()(X).detach()
    torch.testing.assert_close(empirical_nngp(model, X, masks=masks), f @ f.T / 3)
    torch.testing.assert_close(empirical_nngp(model, X, masks=masks, x2=X[:2]), f @ f[:2].T / 3)
    full = empirical_nngp(model, X, masks=masks, reduce=None)
    assert full.shape == (5, 3, 5, 3)
    torch.testing.assert_close(full[1, 2, 3, 0], f[1, 2] * f[3, 0])
    own = empirical_nngp(model, X, masks=masks, reduce="per_output")
    torch.testing.assert_close(own, full.diagonal(dim1=1, dim2=3).movedim(-1, 0))
    assert model.training
    assert torch.linalg.matrix_rank(own).tolist() == [1, 1, 1]


def test_many_samples_and_frozen_networks():
    model = network().requires_grad_(requires_grad=False)
    x = torch.randn(600, 4).double()
    f = model.eval()(x)
    torch.testing.assert_close(empirical_nngp(model, x), f @ f.T / 3)


def test_signs_of_a_linear_layer_give_its_exact_covariance():
    """E over signs of (w·x)(w·x') is Σ w² x x'."""
    torch.manual_seed(1)
    model = nn.Linear(4, 2, bias=False).double()
    mean, error = sampled_ntk(model, X, draws=400, get="nngp")
    exact = (X * model.weight.detach().square().mean(0)) @ X.T
    # Four standard errors for each of 15 entries.
    assert ((mean - exact).abs() < 4 * error).all()
    assert float(error.norm()) < 0.2 * float(exact.norm())


@pytest.mark.parametrize("reduce", ["mean", "per_output"])
def test_the_mean_over_signs_is_near_the_limit(reduce):
    model = network(512, outputs=8)
    masks = {"0.weight": torch.rand(512, 4) < 0.5, "3.weight": torch.rand(8, 512) < 0.3}
    mean, error = sampled_ntk(model, X, masks, draws=256, get="nngp", reduce=reduce)
    limit = graphon_ntk_from_model(model, X, masks, get="nngp", reduce=reduce)
    # Three standard errors, and 5 % for the width.
    assert float((mean - limit).norm()) < 3 * float(error.norm()) + 0.05 * float(limit.norm())
    assert float(error.norm()) < 0.2 * float(limit.norm())


def test_an_unknown_kernel():
    with pytest.raises(ValueError, match="unknown get"):
        sampled_ntk(network(), X, get="nnpg")
