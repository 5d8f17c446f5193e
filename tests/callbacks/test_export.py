"""A network that was trained sparse is exported as any other: plain weights, zeros among them."""

import pytest
import torch

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor
from tests.helpers.modules import Classifier, loader, make_trainer, quiet


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pruner, model = quiet("snip"), Classifier()
    monitors = (GraphonMonitor(verbose=False), LossDecayMonitor(verbose=False))
    folder = tmp_path_factory.mktemp("export")
    make_trainer(pruner, *monitors, max_epochs=1, default_root_dir=folder).fit(model, loader())
    return model.eval(), pruner.masks


def exported(model, x):
    return torch.export.export(model, (x,)).module()


def traced(model, x):
    return torch.jit.trace(model, x)


@pytest.mark.parametrize("export", [exported, traced])
def test_exported_networks_compute_the_same_with_the_same_zeros(export, trained):
    model, masks = trained
    x = torch.rand(5, 64)
    copy = export(model, x)
    torch.testing.assert_close(copy(x), model(x), rtol=0, atol=0)
    weights = dict(copy.named_parameters())
    assert {name for name in masks if name in weights} == set(masks)
    assert all(weights[name][~mask].count_nonzero() == 0 for name, mask in masks.items())
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
