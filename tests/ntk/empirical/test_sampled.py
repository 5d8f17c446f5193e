"""The mean over redrawn signs."""

import copy

import pytest
import torch
from torch import nn

from lightning_graphon.ntk import empirical_ntk, graphon_ntk_from_model, sampled_ntk


def images(n=6):
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def convolutional(*middle, width=48):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), *middle, nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2),
    ).double()  # fmt: skip


def test_is_near_the_limit_where_there_is_one():
    model, x = convolutional(), images()
    masks = {"2.weight": torch.rand(48, 48, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.3}
    mean, error = sampled_ntk(model, x, masks)
    limit = graphon_ntk_from_model(model, x, masks)
    # Three standard errors, and 5 % for the width.
    assert float((mean - limit).norm()) < 3 * float(error.norm()) + 0.05 * float(limit.norm())
    assert float(error.norm()) < 0.1 * float(mean.norm())


def test_the_standard_error_is_that_of_the_mean():
    """Means of 8 draws scatter by it."""
    model, x = convolutional(width=16), images(3)
    found = [sampled_ntk(model, x, draws=8, seed=seed) for seed in range(12)]
    means, errors = (torch.stack(part) for part in zip(*found, strict=True))
    assert 0.7 < float(means.std(0).norm() / errors.mean(0).norm()) < 1.4


def test_same_seed_same_draws_and_the_model_as_before():
    model, x = convolutional(), images(3)
    before = copy.deepcopy(model.state_dict())
    first, again, other = (sampled_ntk(model, x, draws=2, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norm_is_calibrated_anew():
    """Statistics of other signs do not fit: with them a mean would be far off."""
    model, x = convolutional(nn.BatchNorm2d(48)), 3 * images() + 1
    model.train()
    with torch.no_grad():
        for _ in range(60):
            model(x)
    model.eval()
    statistics = model[1].running_mean.clone()
    mean, error = sampled_ntk(model, x, draws=8)
    assert torch.equal(model[1].running_mean, statistics)
    # The network itself is one such draw: its kernel is as far from the mean as one draw may be.
    assert float((empirical_ntk(model, x) - mean).norm()) < 2 * 8**0.5 * float(error.norm())
    with pytest.raises(ValueError, match="sampled_ntk"):
        graphon_ntk_from_model(model, x)


def test_one_draw_has_no_error():
    with pytest.raises(ValueError, match="at least 2"):
        sampled_ntk(convolutional(), images(2), draws=1)
