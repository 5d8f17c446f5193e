"""Layers that skip zeros give what dense ones give."""

import copy

import pytest
import torch
from torch import nn

from lightning_graphon.compact import CSRLinear, to_sparse
from lightning_graphon.pruning import Masks, prune
from tests.helpers.compact_cases import chain, random_masks


@pytest.mark.parametrize("layout", ["csr", "auto", "dense"])
@pytest.mark.parametrize("masked", [True, False])
def test_same_outputs(layout, masked):
    model = chain().double()
    masks = random_masks(model)
    dense = copy.deepcopy(model)
    Masks(masks).apply_(dense)
    before = copy.deepcopy(model.state_dict())
    found = to_sparse(model if masked else dense, masks if masked else None, torch.rand(5, 6).double(), layout=layout)
    x = torch.rand(7, 3, 6).double()  # with tokens
    torch.testing.assert_close(found.model(x), dense(x), rtol=1e-12, atol=1e-12)
    assert {choice.layout for choice in found.layers.values()} <= ({layout} if layout != "auto" else {"csr", "dense"})
    assert found.layers.keys() == {"0", "2", "4"}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_auto_takes_what_was_faster():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    masks = {"0.weight": torch.rand(1024, 1024) > 0.99}
    found = to_sparse(model, masks, torch.rand(64, 1024))
    assert found.layers["0"].layout == "csr"
    assert found.layers["0"].seconds < 0.9 * found.layers["0"].dense_seconds
    assert found.layers["2"].layout == "dense"
    assert type(found.model[2]) is nn.Linear


def test_subclasses_stay_dense():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean())

    model = nn.Sequential(Centred(4, 4), nn.Linear(4, 2))
    assert to_sparse(model, None, torch.rand(2, 4), layout="csr").layers.keys() == {"1"}


def test_a_file_keeps_it(tmp_path):
    layer, x = CSRLinear(torch.eye(3)[:2] * 2, torch.ones(2)), torch.rand(4, 3)
    torch.save(layer, tmp_path / "layer.pt")
    again = torch.load(tmp_path / "layer.pt", weights_only=False)
    torch.testing.assert_close(again(x), 2 * x[:, :2] + 1)
    assert "kept=2" in repr(again)


def test_semi_structured_needs_a_gpu():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    masks = prune(model, "magnitude", allocation="2:4")
    with pytest.raises(ValueError, match=r"layer '0' cannot be 2:4: it takes a GPU"):
        to_sparse(model, masks, torch.rand(2, 64), layout="2:4")
