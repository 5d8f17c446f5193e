"""Masks drawn from given graphons."""

import pytest
import torch
from torch import nn

from lightning_graphon.graphon import StepGraphon, estimate_graphon, l2_distance, power_law
from lightning_graphon.pruning import prune


def net(side=512):
    return nn.Sequential(nn.Linear(side, side), nn.ReLU(), nn.Linear(side, side))


def draw(graphons, sparsity=0.9, model=None, **kwargs):
    return prune(model or net(), "graphon", sparsity=sparsity, options={"graphons": graphons}, **kwargs)


def test_masks_have_the_graphon_they_were_drawn_from():
    target = power_law(0.1, exponent=0.5, bins=16)
    masks = draw(target)
    for mask in masks.values():
        estimate = estimate_graphon(mask, bins=16, order="none")
        # A cell of 32 x 32 draws has a standard error of at most 0.016; the distance averages 256 cells.
        assert l2_distance(estimate, target, align=False) < 0.016
    assert masks.kept == round(0.1 * masks.total)


def test_draws_are_independent_given_the_graphon():
    mask = draw(0.1)["0.weight"]
    degrees = mask.sum(1).double()
    # Binomial(512, 0.1) has variance 46; its sample variance over 512 rows has a standard error of 2.9.
    assert abs(float(degrees.var()) - 46.1) < 4 * 2.9


def test_certain_cells_are_certain():
    masks = draw({"family": "block", "values": [[1, 0], [0, 0]], "density": 0.25}, sparsity=0.75)
    for mask in masks.values():
        assert bool(mask[:256, :256].all())
        assert mask.sum() == 256**2


def test_families_take_the_density_of_the_plan():
    for family in ({"family": "product"}, {"family": "constant"}, {"family": "block", "values": [[3, 1], [1, 3]]}):
        masks = draw(family, sparsity=0.8, allocation="uniform")
        assert [row["sparsity"] for row in masks.table()] == pytest.approx([0.8, 0.8], abs=1e-5)


def test_a_graphon_for_each_layer_by_name_and_glob():
    masks = draw({"0": 0.3, "2.*": 0.1}, sparsity=0.8)
    densities = [1 - row["sparsity"] for row in masks.table()]
    # Bernoulli counts of 262144 entries: standard error below 0.001; the common tilt is as small.
    assert densities == pytest.approx([0.3, 0.1], abs=0.004)


def test_convolutions_draw_every_tap():
    model = nn.Conv2d(32, 64, 3)
    mask = draw(0.5, sparsity=0.5, model=model)["weight"]
    assert mask.shape == (64, 32, 3, 3)
    assert not torch.equal(mask[..., 0, 0], mask[..., 1, 1])


def test_same_seed_same_mask_whatever_the_global_generator():
    model = net(64)
    torch.manual_seed(1)
    first = draw(0.1, model=model, seed=3)
    torch.manual_seed(2)
    assert draw(0.1, model=model, seed=3) == first
    assert draw(0.1, model=model, seed=4) != first


def test_bad_graphons():
    with pytest.raises(ValueError, match="needs the graphons"):
        prune(net(8), "graphon", sparsity=0.5)
    with pytest.raises(ValueError, match=r"no graphon for layer '2\.weight'"):
        draw({"0": 0.3}, model=net(8))
    with pytest.raises(ValueError, match=r"positive on .* weights only"):
        draw(StepGraphon([[1.0, 0.0], [0.0, 0.0]]), sparsity=0.5, model=net(8))
    with pytest.raises(ValueError, match="power-law"):
        draw({"family": "powerlaw"}, model=net(8))


def test_masks_do_not_depend_on_weights_of_the_same_seed():
    """Weights drawn right after `torch.manual_seed` are other numbers than the mask's, though the seed is the same."""
    model = nn.Linear(200, 200)
    torch.manual_seed(5)
    model.weight.data = torch.rand(200, 200)
    kept = model.weight.detach()[draw(0.5, sparsity=0.5, model=model, seed=5)["weight"]]
    assert float(kept.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / 20_000) ** 0.5)  # four standard errors


def test_units_are_at_the_middle_of_their_intervals():
    """Of three outputs the second is exactly at the edge between two cells, which belongs to the second one."""
    mask = draw(StepGraphon([[1.0], [0.0]]), sparsity=2 / 3, model=nn.Linear(4, 3))["weight"]
    assert mask.any(1).tolist() == [True, False, False]
