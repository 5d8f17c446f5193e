"""The Graphon NTK: neural-tangents, the design's own recursion by loops, two laws, sampled networks."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lightning_graphon.graphon import StepGraphon
from lightning_graphon.ntk import empirical_ntk, graphon_ntk
from lightning_graphon.ntk.operators.tiling import tiles
from tests.helpers.ntk_oracles import digits, fixture, graphon_ntk_backward, relative

ONE = StepGraphon(torch.ones(1, 1, dtype=torch.float64))


def constant(c, rows, cols):
    return StepGraphon(torch.full((rows, cols), c, dtype=torch.float64))


def random_chain(sizes=(64, 5, 7, 3), widths=(64, 100, 120, 3), drift=False):
    """Step graphons with uneven cells; inputs and outputs one cell each."""
    g = torch.Generator().manual_seed(3)
    measures = [torch.rand(s, generator=g, dtype=torch.float64) + 0.1 for s in sizes]
    measures[0], measures[-1] = torch.ones(sizes[0]).double(), torch.ones(sizes[-1]).double()
    measures = [m / m.sum() for m in measures]
    chain = []
    for i in range(len(sizes) - 1):
        W = torch.rand(sizes[i + 1], sizes[i], generator=g, dtype=torch.float64)
        E = W * torch.rand(W.shape, generator=g, dtype=torch.float64) * 4 / widths[i]
        chain.append(StepGraphon(W, measures[i + 1], measures[i], energy=E, drift=torch.zeros_like(W)))
    return chain, measures, widths


@pytest.mark.parametrize("which", ["ntk", "nngp"])
@pytest.mark.parametrize("bias", [0, 0.1])
@pytest.mark.parametrize("hidden", [1, 2, 3, 4])
@pytest.mark.parametrize("act", ["relu", "identity"])
def test_dense_equals_neural_tangents(act, hidden, bias, which):
    truth, w, b = fixture(act, hidden, bias, which)
    mine = graphon_ntk(
        digits(), [ONE] * (hidden + 1), activation=act, weight_variance=w**2, bias_variance=b**2, get=which
    )
    assert relative(mine, truth) < 1e-13  # two float64 evaluations of one formula


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("hidden", [1, 3])
def test_constant_graphon_scales_the_dense_kernel(hidden, rows):
    x, c = digits(20), 0.3
    dense = graphon_ntk(x, [ONE] * (hidden + 1))
    chain = [constant(c, rows, 64), *[constant(c, rows, rows)] * (hidden - 1), constant(c, 10, rows)]
    assert relative(graphon_ntk(x, chain), c ** (hidden + 1) * dense) < 1e-12
    assert relative(graphon_ntk(x, chain, parameter_term="all"), c**hidden * dense) < 1e-12  # [P1]: c^L


def test_graphons_of_layers_may_come_by_name():
    x, chain = digits(8), random_chain()[0]
    torch.testing.assert_close(graphon_ntk(x, dict(zip("abc", chain, strict=True))), graphon_ntk(x, chain))


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("energy", [False, True])
@pytest.mark.parametrize("bias", [0.0, 0.2])
def test_equals_the_backward_recursion_by_loops(standard, energy, bias):
    chain, measures, widths = random_chain()
    x = digits(6)
    values = [g.values.numpy() for g in chain]
    if energy:
        energies = [g.energy.numpy() for g in chain]
    else:
        energies = [2.0 * v / n for v, n in zip(values, widths, strict=False)]
    gammas = [1.0 if standard else 2.0 / n for n in widths[:-1]]
    trained = 0.0 if bias == 0 else (1.0 if standard else bias)
    truth = graphon_ntk_backward(x.numpy(), values, measures, energies, widths, gammas, bias, trained)
    mine = graphon_ntk(
        x, chain, reduce=None, widths=widths, bias_variance=bias, propagate="energy" if energy else "density",
        parameterization="standard" if standard else "ntk",
    )  # fmt: skip
    assert mine.shape == (3, 6, 6)
    assert relative(mine, truth) < 1e-7  # the oracle's arccos loses half of its digits on the diagonal
    mean = graphon_ntk(
        x, chain, widths=widths, bias_variance=bias, propagate="energy" if energy else "density",
        parameterization="standard" if standard else "ntk",
    )  # fmt: skip
    assert relative(mean, mine.mean(0)) < 1e-12


@pytest.mark.parametrize("act", ["relu", "tanh", "hardtanh"])
@pytest.mark.parametrize("reduce", ["mean", None])
@pytest.mark.parametrize("parameterization", ["ntk", "standard"])
def test_drift_of_zero_is_the_centred_kernel(act, reduce, parameterization):
    chain, _, widths = random_chain()
    options = {"activation": act, "widths": widths, "reduce": reduce, "bias_variance": 0.3}
    options["parameterization"] = parameterization
    drift = graphon_ntk(digits(8), chain, propagate="drift", **options)
    centred = graphon_ntk(digits(8), chain, propagate="energy", **options)
    # 1e-7: on the diagonal the bivariate formula has correlation 1 only up to rounding, whose square root enters.
    assert relative(drift, centred) < 1e-7


def test_two_sets_tiles_and_per_output():
    chain, _, _ = random_chain()
    x = digits(23)
    full = graphon_ntk(x, chain, reduce=None)
    torch.testing.assert_close(graphon_ntk(x[:9], chain, x2=x[9:], reduce=None), full[:, :9, 9:])
    torch.testing.assert_close(graphon_ntk(x, chain, reduce=None, max_memory=1), full)
    torch.testing.assert_close(full, full.mT, rtol=0, atol=0)  # symmetric by construction


def test_drift_keeps_to_the_memory_and_shares_its_tiles(monkeypatch):
    from lightning_graphon.ntk import TileShard
    from lightning_graphon.ntk.infinite import drift

    chain, _, widths = random_chain()
    x, options = digits(20), {"propagate": "drift", "widths": widths, "reduce": None}
    full = graphon_ntk(x, chain, **options)
    edges = []
    monkeypatch.setattr(drift, "tiles", lambda *args, **named: edges.append(args[2]) or tiles(*args, **named))
    torch.testing.assert_close(graphon_ntk(x, chain, max_memory=1, **options), full)
    assert edges == [8]  # the smallest tile; 20 samples fit one tile without a limit
    monkeypatch.setattr(TileShard, "collect", lambda self, partial: partial)
    parts = [graphon_ntk(x, chain, group=TileShard(r, 3), **options) for r in range(3)]
    torch.testing.assert_close(sum(parts), full)
    assert all(bool(p.any()) and not bool(p.all()) for p in parts)


def test_equal_positions_cost_one():
    from lightning_graphon.ntk.infinite.layer_building import build_layers
    from lightning_graphon.ntk.infinite.layers import merge_positions

    chain = [constant(0.5, 64, 64)] * 3
    layers = build_layers(
        chain, digits(4), propagate="density", parameterization="ntk", widths=None, weight_variance=2.0,
        bias_variance=0.0, parameter_term="kept", train_bias=None,
    )  # fmt: skip
    assert [len(layer.covariance_map) for layer in merge_positions(layers)[:-1]] == [1, 1]


def nasty(x):
    return torch.cat([x, x[:2], -x[:2], 0 * x[:1], x[:2] * (1 + 1e-9), 3 * x[:1]])


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "abs", "tanh", "erf", "gelu"])
def test_finite_with_finite_gradients(act):
    chain, _, _ = random_chain()
    for graphons in (chain, [ONE] * 30):
        x = nasty(digits(4)).requires_grad_()
        kernel = graphon_ntk(x, graphons, activation=act, weight_variance=1.0)
        (gradient,) = torch.autograd.grad(kernel.sum(), x)
        assert torch.isfinite(kernel).all()
        assert torch.isfinite(gradient).all()
        # 1e-7: the angle between rows that are parallel but of other norms is known to the root of the rounding only.
        assert torch.linalg.eigvalsh(kernel.detach()).min() > -1e-7 * kernel.max()


def test_gradient_equals_finite_differences():
    chain, _, _ = random_chain(sizes=(6, 3, 2, 2), widths=(6, 50, 50, 2))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    off = ~torch.eye(3, dtype=torch.bool)  # on the diagonal the distance has a kink
    assert torch.autograd.gradcheck(lambda t: graphon_ntk(t, chain)[off], x, atol=1e-6)


def test_an_empty_graphon_gives_zero():
    kernel = graphon_ntk(digits(5), [constant(0.0, 3, 64), constant(0.5, 3, 3), constant(0.5, 1, 3)])
    assert torch.equal(kernel, torch.zeros(5, 5, dtype=torch.float64))


def test_float32_keeps_the_digits_of_near_duplicates():
    x = digits(40)
    close = torch.cat([x, x + 1e-3 * torch.randn(x.shape, dtype=torch.float64)]).float()
    single, double = (graphon_ntk(t, [ONE] * 5) for t in (close, close.double()))
    assert single.dtype == torch.float32
    # The form with arccos is off by 1e-3 here in float32 (1.2e-3 measured); distances keep it near rounding.
    assert ((single - double).abs() / double).max() < 5e-6


def test_messages_name_the_layer():
    x = digits(3)
    with pytest.raises(ValueError, match="graphon 0 has 7 columns but the samples have 64"):
        graphon_ntk(x, [constant(1.0, 2, 7), constant(1.0, 1, 2)])
    with pytest.raises(ValueError, match="graphon 1 has 3 columns but graphon 0 has 2 rows"):
        graphon_ntk(x, [constant(1.0, 2, 64), constant(1.0, 1, 3)])
    uneven = StepGraphon(torch.ones(1, 2).double(), col_measure=torch.tensor([0.3, 0.7]).double())
    with pytest.raises(ValueError, match="different measures"):
        graphon_ntk(x, [constant(1.0, 2, 64), uneven])
    with pytest.raises(ValueError, match="fan-in of layer 1"):
        graphon_ntk(x, [ONE, ONE], parameterization="standard")
    with pytest.raises(ValueError, match="graphon 0 has no energy"):
        graphon_ntk(x, [ONE, ONE], propagate="energy", widths=[64, 10])
    impossible = [StepGraphon([[0.5] * 7], energy=[[1.0] * 6 + [0.0]], drift=[[1.0] * 7])]
    with pytest.raises(
        ValueError, match=r"graphon 0: the square of the drift 1 .* energy 0 in cell \(0, 6\), one of 1"
    ):
        graphon_ntk(x[:, :7], impossible, propagate="drift", widths=[7])
    with pytest.raises(ValueError, match="Did you mean 'energy'"):
        graphon_ntk(x, [ONE], propagate="energi")
    with pytest.raises(ValueError, match="2 activations for 1 hidden"):
        graphon_ntk(x, [ONE, ONE], activation=["relu", "relu"])
    with pytest.raises(ValueError, match="flatten your samples"):
        graphon_ntk(torch.zeros(2, 3, 3), [ONE])


def sampled_kernel(chain, counts, act, x, seed, drift=0.0):
    """Empirical kernel of one network with masks and weights drawn from block graphons."""
    g = torch.Generator().manual_seed(seed)
    layers, masks = [], {}
    for i, graphon in enumerate(chain):
        W = graphon.values.repeat_interleave(counts[i + 1], 0).repeat_interleave(counts[i], 1)
        layer = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=torch.float64)
        noise = torch.randn(W.shape, generator=g, dtype=torch.float64)
        mask = torch.rand(W.shape, generator=g, dtype=torch.float64) < W
        layer.weight.data = (noise * (2 / W.shape[1]) ** 0.5 + drift / W.shape[1]) * mask
        masks[f"{2 * i}.weight"] = mask
        layers += [layer, act()]
    return empirical_ntk(nn.Sequential(*layers[:-1]), x, masks=masks, parameterization="ntk")


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_is_the_limit_of_sampled_networks(act):
    """Block masks, 2 x 2 communities: the average over networks of growing width comes near the theory."""
    W = torch.tensor([[0.9, 0.1], [0.2, 0.4]], dtype=torch.float64)
    inputs = torch.tensor([[0.8], [0.2]], dtype=torch.float64).repeat(1, 64)
    chain = [StepGraphon(inputs), StepGraphon(W), StepGraphon(torch.tensor([[0.3, 0.9]] * 10, dtype=torch.float64))]
    x = digits(12)
    theory = graphon_ntk(x, chain, activation=act())
    draws = [sampled_kernel(chain, [1, 256, 256, 1], act, x, seed) for seed in range(8)]
    error = float((torch.stack(draws).mean(0) - theory).norm() / theory.norm())
    spread = torch.stack(draws).std(0).norm() / theory.norm() / 8**0.5
    # Three standard errors of the mean of 8 draws, plus 1 % for the bias at width 512.
    assert error < 3 * float(spread) + 0.01
    shuffled = [StepGraphon(inputs), StepGraphon(W.flip(1)), chain[2]]
    wrong = float((torch.stack(draws).mean(0) - graphon_ntk(x, shuffled, activation=act())).norm() / theory.norm())
    assert wrong > 3 * error


@pytest.mark.slow
@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_drift_is_the_limit_of_sampled_networks(act):
    """Kept weights with a mean: the kernel with drift describes them, the centred one does not."""
    W = torch.tensor([[0.9, 0.1], [0.2, 0.4]], dtype=torch.float64)
    widths, d = [64, 1024, 1024, 10], 3.0
    values = [
        torch.tensor([[0.8], [0.2]], dtype=torch.float64).repeat(1, 64),
        W,
        torch.tensor([[0.3, 0.9]] * 10).double(),
    ]
    chain = [
        StepGraphon(v, energy=v * (2 / n + (d / n) ** 2), drift=v * d / n) for v, n in zip(values, widths, strict=False)
    ]
    x = digits(12)
    draws = torch.stack([sampled_kernel(chain, [1, 512, 512, 1], act, x, s, drift=d) for s in range(8)]).mean(0)
    errors = {
        p: float((graphon_ntk(x, chain, activation=act(), propagate=p, widths=widths) - draws).norm() / draws.norm())
        for p in ("drift", "energy")
    }
    assert errors["drift"] < 0.06  # sampling noise of 8 networks of width 1024
    assert errors["energy"] > 3 * errors["drift"]


def test_no_randomness():
    before = torch.get_rng_state()
    np_before = np.random.get_state()[1].copy()
    graphon_ntk(digits(4), [ONE] * 3, activation="silu")
    assert torch.equal(before, torch.get_rng_state())
    assert (np_before == np.random.get_state()[1]).all()


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_drift_with_one_unit_a_position_is_the_network_itself(act):
    """Every cell holds one weight, nothing is random: the theory's forward and backward means are the signals."""
    sizes = [6, 5, 4, 3]
    linears = [nn.Linear(a, b, bias=False, dtype=torch.float64) for a, b in pairwise(sizes)]
    model = nn.Sequential(linears[0], act(), linears[1], act(), linears[2])
    masks = {f"{2 * i}.weight": torch.rand(m.weight.shape) < 0.7 for i, m in enumerate(linears)}
    chain = []
    for (_, mask), m in zip(masks.items(), linears, strict=True):
        kept = m.weight.detach() * mask
        chain.append(StepGraphon(mask.double(), energy=kept.square(), drift=kept))
    x = torch.randn(7, 6, dtype=torch.float64)
    options = {"activation": act(), "propagate": "drift", "parameterization": "standard", "widths": sizes}
    truth = empirical_ntk(model, x, masks=masks, reduce="per_output")
    # 1e-6: the variances are zero up to rounding, and their square roots enter.
    assert relative(graphon_ntk(x, chain, reduce=None, **options), truth) < 1e-6
    assert relative(graphon_ntk(x[:3], chain, x2=x[3:], **options), truth.mean(0)[:3, 3:]) < 1e-6


@pytest.mark.parametrize("act", ["tanh", "sigmoid", "softsign", "silu", "erf", "relu"])
def test_variances_that_the_quadrature_cannot_resolve_are_named(act):
    x = torch.eye(2, dtype=torch.float64)  # variance 1 for both samples
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graphon_ntk(x, [ONE, ONE], activation=act)
        graphon_ntk(100 * x, [ONE, ONE], activation=act)
    poor = [str(w.message) for w in caught if "of hidden layer 1 have variances up to" in str(w.message)]
    assert len(poor) == (act in ("tanh", "sigmoid", "softsign"))  # the others bend at 0 only, or are exact
    assert all("1e+04" in message for message in poor)
