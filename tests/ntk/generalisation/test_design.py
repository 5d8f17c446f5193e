"""Designed graphons: exact densities, the right gradient, a target that rises, masks that follow them."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

import lightning_graphon.ntk.generalisation.design as module
from lightning_graphon.graphon import (
    StepGraphon,
    constant,
    estimate_graphon,
    input_path_density,
    values_at_density,
)
from lightning_graphon.ntk import design_graphons, graphon_ntk, kernel_target_alignment, spectral_summary
from lightning_graphon.ntk.generalisation.design_targets import centred_targets, kernel_objective
from lightning_graphon.ntk.operators.spectrum import energy_share
from lightning_graphon.pruning import prune
from tests.helpers.ntk_oracles import digits

X = digits(24)
LABELS = torch.arange(24) % 3
SMALL = {"density": 0.2, "outputs": 3, "hidden": (3, 2), "labels": LABELS, "steps": 12}


def random_graphons(*sides, seed=0):
    source = torch.Generator().manual_seed(seed)
    pairs = pairwise(sides)
    return [torch.rand(b, a, generator=source, dtype=torch.float64) for a, b in pairs]


@pytest.mark.parametrize("target", ["fit", "speed", "alignment", "energy"])
def test_the_gradient_through_kernel_and_target_is_that_of_finite_differences(target):
    """Relu, three positions, inputs with an equal pair of samples and a zero sample."""
    x = torch.cat([X[:6, 20:25], X[:1, 20:25], torch.zeros(1, 5)])
    # Of the seven eigenvalues the five largest are nearly all; the two largest have a gradient to speak of.
    objective = partial(energy_share, count=2) if target == "energy" else kernel_objective(target, LABELS[:8], 0.05)

    def value(first, second, third):
        graphons = [StepGraphon(values_at_density(t, 0.3)) for t in (first, second, third)]
        return objective(graphon_ntk(x, graphons))

    logits = [torch.logit(0.1 + 0.8 * t).requires_grad_() for t in random_graphons(5, 3, 2, 2)]
    # Relative error of central differences with steps of 1e-6 in float64: 1e-6 and better.
    assert torch.autograd.gradcheck(value, logits, eps=1e-6, atol=1e-7, rtol=1e-4)


def test_equal_positions_have_their_own_gradients():
    """Positions with equal rows share one row of the kernel's recursion, but not when they are to be moved."""
    values = [torch.full((4, 64), 0.3).double(), torch.full((1, 4), 0.3).double()]
    moving = [v.clone().requires_grad_() for v in values]
    graphon_ntk(X, [StepGraphon(v) for v in moving]).sum().backward()
    for v in moving:
        torch.testing.assert_close(v.grad, v.grad[:1, :].expand_as(v) if len(v) > 1 else v.grad[:, :1].expand_as(v))
        assert float(v.grad.abs().amax(0 if len(v) == 1 else 1).min()) > 0


def test_the_kernel_that_autograd_follows_is_the_kernel():
    values = random_graphons(64, 3, 3, 2)
    plain = graphon_ntk(X, [StepGraphon(v) for v in values])
    tracked = graphon_ntk(X, [StepGraphon(v.requires_grad_()) for v in values])
    torch.testing.assert_close(tracked.detach(), plain)


@pytest.mark.parametrize("form", ["block", "product"])
@pytest.mark.parametrize("target", ["fit", "speed", "alignment", "energy"])
def test_the_target_rises_at_the_exact_density(form, target):
    design = design_graphons(X, target=target, form=form, **SMALL)
    assert [g.shape for g in design.graphons] == [(3, 64), (2, 3), (3, 2)]
    assert [g.density for g in design.graphons] == pytest.approx([0.2] * 3, abs=1e-13)
    assert len(design.history) == 13
    assert design.value == max(design.history) > design.history[0]
    assert not any(g.values.requires_grad for g in design.graphons)


def test_the_value_is_that_of_the_graphons_by_the_public_functions():
    design = design_graphons(X, target="alignment", **SMALL)
    kernel = graphon_ntk(X, design.graphons)
    assert design.value == pytest.approx(kernel_target_alignment(kernel, LABELS, centred=True), rel=1e-12)
    design = design_graphons(X, target="energy", **SMALL)
    kernel = graphon_ntk(X, design.graphons)
    assert design.value == pytest.approx(spectral_summary(kernel).energy_concentration, rel=1e-10)


def test_fit_and_speed_against_eigenvectors():
    kernel = graphon_ntk(X, [constant(0.3)] * 3)
    Y = centred_targets(LABELS)
    values, vectors = torch.linalg.eigh(kernel)
    share = (vectors.T @ Y).square().sum(1) / Y.square().sum()
    fit = kernel_objective("fit", LABELS, 0.02)(kernel)
    assert float(fit) == pytest.approx(float((share * values / (values + 0.02)).sum()), rel=1e-10)
    speed = kernel_objective("speed", LABELS, 0.02)(kernel)
    assert float(speed) == pytest.approx(float((share * values).sum()), rel=1e-10)


def test_a_product_form_has_odds_of_rank_one():
    design = design_graphons(X, **SMALL)
    for g in design.graphons:
        a = torch.logit(g.values)
        torch.testing.assert_close(a + a[0, 0], a[:, :1] + a[:1])


def test_the_kernel_of_exact_products_is_the_dense_one_on_scaled_inputs():
    """docs/reference/theory-generalisation.md: c f(u) g(v) in every layer leaves only the first g to the shape."""
    f, f2, g2, g3 = (0.1 + 0.9 * torch.rand(4, generator=torch.Generator().manual_seed(i)).double() for i in range(4))
    g = 0.05 + 0.9 * torch.rand(64, generator=torch.Generator().manual_seed(9)).double()
    one = torch.ones(3).double()
    chain = [StepGraphon(torch.outer(a, b)) for a, b in ((f, g), (f2, g2), (one, g3))]
    sparse = graphon_ntk(X, chain)
    dense = graphon_ntk(X * g.sqrt(), [constant(1.0)] * 3)
    torch.testing.assert_close(sparse / sparse.norm(), dense / dense.norm())
    factor = (g2 @ f / 4) * (g3 @ f2 / 4)  # ∫ g₂ f₁ · ∫ g₃ f₂
    torch.testing.assert_close(sparse, factor * dense)


def test_alignment_finds_the_only_input_that_matters():
    source = torch.Generator().manual_seed(0)
    x = torch.rand(40, 8, generator=source, dtype=torch.float64)
    labels = (x[:, 5] > 0.5).long()
    design = design_graphons(x, density=0.2, outputs=1, hidden=(2,), labels=labels, target="alignment", steps=60)
    paths = input_path_density(design.graphons)
    assert int(paths.argmax()) == 5
    assert float(paths[5]) > 3 * float(paths.mean())


def test_layers_that_are_not_free_stay_constant_and_density_is_by_layer():
    design = design_graphons(X, **{**SMALL, "density": (0.3, 0.1, 1.0)}, free=[0])
    assert [g.density for g in design.graphons] == pytest.approx([0.3, 0.1, 1.0], abs=1e-13)
    assert [bool((g.values == g.values[0, 0]).all()) for g in design.graphons] == [False, True, True]


def test_the_seed_decides_and_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    first, again, other = (design_graphons(X, **SMALL, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert first.graphons == again.graphons
    assert first.graphons != other.graphons


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        assert design_graphons(X, **SMALL).value > 0


def test_masks_drawn_from_a_design_follow_it():
    net = nn.Sequential(nn.Linear(64, 120), nn.ReLU(), nn.Linear(120, 80), nn.ReLU(), nn.Linear(80, 3))
    design = design_graphons(X, **{**SMALL, "steps": 60})
    names = ["0.weight", "2.weight", "4.weight"]
    graphons = dict(zip(names, design.graphons, strict=True))
    masks = prune(net, "graphon", sparsity=0.8, options={"graphons": graphons})
    assert masks.sparsity == pytest.approx(0.8, abs=1e-4)
    first = estimate_graphon(masks["0.weight"], bins=120, order="none")
    drawn = first.rebin([1 / 3] * 3, [1 / 64] * 64)
    # Cells of 40 weights scatter by sqrt(W (1 - W) / 40) each, 0.08 at most.
    assert float((drawn.values - design.graphons[0].values).square().mean().sqrt()) < 0.08


def test_ctrl_c_returns_the_best_so_far(monkeypatch):
    calls = []

    def stop_at_five(x, graphons, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return graphon_ntk(x, graphons, **options)

    monkeypatch.setattr(module, "graphon_ntk", stop_at_five)
    with pytest.warns(UserWarning, match="stopped by Ctrl-C after 4 of 13"):
        design = design_graphons(X, target="speed", **SMALL)
    assert design.interrupted
    assert len(design.history) == 4
    assert design.value == max(design.history)


def test_a_progress_bar_on_request(capsys):
    design_graphons(X, progress=True, **SMALL)
    assert "design 12/12, best 0." in capsys.readouterr().out
    design_graphons(X, **SMALL)
    assert capsys.readouterr().out == ""


def test_a_target_of_your_own():
    design = design_graphons(X, **{**SMALL, "labels": None}, target=lambda K: -K.diagonal().var())
    assert design.value > design.history[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density of layer 0 .* \(0, 1\], got 0"),
        ({"density": [0.2, 0.3]}, "density must be one number or 3"),
        ({"labels": None}, "target='fit' needs the labels"),
        ({"target": "alignmnt"}, "Did you mean 'alignment'"),
        ({"form": "blocks"}, "Did you mean 'block'"),
        ({"hidden": (3, 0)}, "hidden must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"ridge": 0.0}, "ridge must be a finite number > 0"),
        ({"free": [3]}, "free must name some of the layers 0 to 2"),
        ({"target": lambda K: K.sum() / 0}, "one finite number"),
        ({"target": lambda K: K}, "one finite number"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        design_graphons(X, **{**SMALL, **options})


def test_the_search_starts_next_to_the_constant_graphon():
    """Up to the noise of 0.1 in the log-odds, which moves the target by a per cent or two."""
    design = design_graphons(X, target="energy", **{**SMALL, "steps": 0})
    flat = spectral_summary(graphon_ntk(X, [constant(0.2)] * 3)).energy_concentration
    assert design.value == pytest.approx(flat, abs=0.02)


def test_the_best_step_is_kept_where_steps_are_too_long():
    design = design_graphons(X, target="alignment", lr=5.0, **SMALL)
    assert design.history[-1] < design.value
    kernel = graphon_ntk(X, design.graphons)
    assert design.value == pytest.approx(kernel_target_alignment(kernel, LABELS, centred=True), rel=1e-12)
