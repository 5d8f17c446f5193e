"""Dual activations against nested quadrature whose panels end at the kinks."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_graphon.ntk import HermiteDual, ReLULike, dual_activation, register_activation, unregister_activation
from lightning_graphon.ntk.activations.gaussian import bivariate_cdf, owens_t
from tests.helpers.ntk_oracles import gaussian_pair, relative

CENTRED = [(0, 0, 1.0, 2.0, 0.7), (0, 0, 1.5, 1.4, -1.2), (0, 0, 1.0, 1.0, 0.99)]
SHIFTED = [(0.7, -0.4, 1.0, 0.5, 0.4), (0.3, 0.3, 1.0, 1.0, 0.98), (-1.0, 2.0, 0.3, 2.0, -0.5)]
# Around the kink finer and finer, for correlations near 1, where the oracle's inner integral turns sharply there.
FINE = (-0.4, -0.1, -0.02, -0.005, 0.0, 0.005, 0.02, 0.1, 0.4)
KNOTS = dict.fromkeys(("elu", "selu", "celu", "softsign"), FINE) | {
    "hardtanh": (-1.0, 1.0),
    "relu6": (0.0, 6.0),
    "hardsigmoid": (-3.0, 3.0),
}
SMOOTH = ["identity", "erf", "gelu", "sin", "cos", "square", "gaussian", "tanh", "sigmoid", "silu", "softplus", "mish"]
PIECEWISE = ["relu", "leaky_relu", "abs", "hardtanh", "relu6", "hardsigmoid"]


def scalar(value):
    return torch.tensor([value], dtype=torch.float64)


def both(name, case):
    """The library's two expectations and the oracle's."""
    dual = dual_activation(name)
    mx, my, qx, qy, k = map(scalar, case)
    mine = dual.shifted(mx, my, qx, qy, k) if case[0] or case[1] else dual.covariance(qx, qy, k)
    functions = [lambda z, g=g: g(torch.from_numpy(z)).numpy() for g in (dual.forward, dual.derivative)]
    return [m.item() for m in mine], [gaussian_pair(f, *case, knots=KNOTS.get(name, (0.0,))) for f in functions]


@pytest.mark.parametrize("case", CENTRED + SHIFTED)
@pytest.mark.parametrize("name", SMOOTH + PIECEWISE)
def test_equals_quadrature(name, case):
    mine, truth = both(name, case)
    # 1e-10: the quadrature cuts |t| at 9 and the Hermite series has 96 terms; both are far below it.
    np.testing.assert_allclose(mine, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rho", [0.5, 0.79, 0.81, 0.99, 0.99999, -0.9, -0.999])
@pytest.mark.parametrize("name", ["elu", "selu", "celu", "softsign"])
def test_kinked_and_centred_equals_quadrature(name, rho):
    """On both sides of the correlation 0.8, where the series hands over to the sectors."""
    for qx, qy in ((1.0, 1.5), (4.0, 0.1)):
        mine, truth = both(name, (0, 0, qx, qy, rho * (qx * qy) ** 0.5))
        # 1e-10 for the ELU family; softsign's poles at |z| = -1 slow the radial rule down, its docstring says 5e-9.
        np.testing.assert_allclose(mine, truth, rtol=0, atol=5e-9 if name == "softsign" else 1e-10)


@pytest.mark.parametrize("case", SHIFTED)
@pytest.mark.parametrize("name", ["elu", "selu", "softsign"])
def test_kinked_series_with_means_is_as_accurate_as_it_says(name, case):
    mine, truth = both(name, case)
    # A kink makes Hermite coefficients decay like a power; the docstring states these figures.
    np.testing.assert_allclose(mine[0], truth[0], atol=1e-4)
    np.testing.assert_allclose(mine[1], truth[1], atol=5e-3)


@pytest.mark.parametrize(
    "module", [nn.ELU(0.7), nn.CELU(1.7), nn.SELU(), nn.Softsign()], ids=lambda m: type(m).__name__
)
def test_kinked_modules_with_their_settings(module):
    dual = dual_activation(module)
    z = torch.linspace(-3, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(dual.forward(z), module(z), rtol=1e-14, atol=1e-14)
    mine = dual.covariance(scalar(1.0), scalar(2.0), scalar(1.3))
    f, g = (lambda z, h=h: h(torch.from_numpy(z)).numpy() for h in (dual.forward, dual.derivative))
    truth = [gaussian_pair(h, 0, 0, 1.0, 2.0, 1.3) for h in (f, g)]
    np.testing.assert_allclose([m.item() for m in mine], truth, atol=1e-9)


@pytest.mark.parametrize("name", ["elu", "selu", "softsign"])
def test_kinked_is_finite_for_equal_opposite_and_zero_rows(name):
    q = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    d = torch.tensor([0.0, 4.0, 1.0, 0.0, 1e-12], dtype=torch.float64, requires_grad=True)
    out = dual_activation(name).squared_distance(q, p, d)
    sum(t.sum() for t in out).backward()
    for t in (*out, q.grad, p.grad, d.grad):
        assert torch.isfinite(t).all()
    assert out[0][0].abs() < 1e-14  # equal rows stay equal, up to rounding


@pytest.mark.parametrize("name", SMOOTH + PIECEWISE + ["elu"])
def test_means_of_one_gaussian(name):
    dual = dual_activation(name)
    m, q = scalar(0.6), scalar(0.8)
    value, slope = dual.shifted_mean(m, q)
    one = lambda f: (  # noqa: E731
        gaussian_pair(lambda z: f(torch.from_numpy(z)).numpy(), 0.6, 0.6, 0.8, 0.8, 0.0, KNOTS.get(name, (0.0,)))
    )
    # With zero covariance the pair's expectation is the square of the mean; 1e-4: kinked ones by plain quadrature.
    tolerance = 1e-4 if name == "elu" else 1e-10
    np.testing.assert_allclose(
        [value.item() ** 2, slope.item() ** 2], [one(dual.forward), one(dual.derivative)], atol=tolerance
    )


@pytest.mark.parametrize("name", SMOOTH + PIECEWISE)
def test_shifted_at_zero_mean_is_centred(name):
    dual = dual_activation(name)
    qx, qy, k, zero = scalar(1.3), scalar(0.4), scalar(-0.5), scalar(0.0)
    for a, b in zip(dual.shifted(zero, zero, qx, qy, k), dual.covariance(qx, qy, k), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SMOOTH + PIECEWISE)
def test_pair_is_the_squared_distance(name):
    dual = dual_activation(name)
    qx, qy, k = scalar(1.3), scalar(0.9), scalar(0.8)
    distance, slope = dual.squared_distance(qx, qy, qx + qy - 2 * k)
    kappa, kappa_dot = dual.covariance(qx, qy, k)
    torch.testing.assert_close(distance, dual.second_moment(qx) + dual.second_moment(qy) - 2 * kappa)
    torch.testing.assert_close(slope, kappa_dot)


def test_relu_is_finite_for_equal_opposite_and_zero_rows():
    relu = dual_activation("relu")
    q = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    d = torch.tensor([0.0, 4.0, 1.0, 0.0, 1e-30], dtype=torch.float64, requires_grad=True)
    out = relu.squared_distance(q, p, d)
    sum(t.sum() for t in out).backward()
    for t in (*out, q.grad, p.grad, d.grad):
        assert torch.isfinite(t).all()
    torch.testing.assert_close(out[1].detach()[:2], torch.tensor([0.5, 0.0], dtype=torch.float64))  # exact angles 0, π
    torch.testing.assert_close(out[1].detach()[2:4], torch.tensor([0.25, 0.25], dtype=torch.float64))  # zero rows
    torch.testing.assert_close(out[0].detach()[:3], torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))


def test_relu_keeps_the_digits_of_near_duplicates():
    """Squared distances after the activation stay accurate relative to themselves, down to 1e-12 of the variance."""
    one = scalar(1.0)
    for d in (1e-4, 1e-8, 1e-12):
        after, _ = dual_activation("relu").squared_distance(one, one, scalar(d))
        theta = 2 * np.arcsin(d**0.5 / 2)
        exact = d / 2 - (theta**3 / 3 - theta**5 / 30) / np.pi  # series of d/2 - (sin θ - θ cos θ)/π
        np.testing.assert_allclose(after.item(), exact, rtol=1e-9)


def test_owens_t_and_bivariate_cdf_against_scipy():
    from scipy.special import owens_t as reference
    from scipy.stats import multivariate_normal

    rng = np.random.default_rng(0)
    h, k = rng.normal(size=200) * 3, rng.normal(size=200) * 10
    np.testing.assert_allclose(owens_t(torch.from_numpy(h), torch.from_numpy(k)).numpy(), reference(h, k), atol=1e-14)
    for a, b, rho in [(0.3, -0.2, 0.5), (0.0, 0.0, -0.9), (1.0, 1.0, 0.999), (0.0, 1.2, 0.1), (-2.0, 0.0, 0.7)]:
        truth = multivariate_normal(cov=[[1, rho], [rho, 1]]).cdf([a, b])
        mine = bivariate_cdf(scalar(a), scalar(b), scalar(rho), scalar(1 - rho**2)).item()
        assert mine == pytest.approx(truth, abs=1e-7)  # scipy's own integration stops there


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("mean", [0.0, 0.4, -0.7])
@pytest.mark.parametrize("name", ["relu", "hardtanh"])
def test_nearly_equal_samples_keep_their_digits(name, mean, sign):
    """∂κ/∂k = κ̇. Rounding of 1e-10 in κ here would be one of 1e-5 in the next layer's κ̇."""
    q, m = scalar(1.3), scalar(mean)
    for gap in (1e-15, 1e-13, 1e-11, 1e-9):
        covariance = sign * q * torch.tensor([1.0, 1 - gap], dtype=torch.float64)
        value, slope = dual_activation(name).shifted(m, sign * m, q, q, covariance)
        fall, straight = sign * (value[0] - value[1]).item(), (slope.mean() * q).item() * gap
        # κ̇ is curved like the root of the gap; 2e-15: a few roundings of κ, which is about 1.
        assert fall == pytest.approx(straight, abs=2e-15 + gap**1.5)


def test_modules_functions_and_names_agree():
    assert dual_activation(nn.ReLU()) is dual_activation(torch.relu) is dual_activation("ReLU")
    assert dual_activation(nn.GELU()) is dual_activation(nn.functional.gelu)
    leaky = dual_activation(nn.LeakyReLU(0.3))
    z = torch.tensor([-2.0, 1.0])
    torch.testing.assert_close(leaky.forward(z), nn.functional.leaky_relu(z, 0.3))
    assert isinstance(dual_activation(nn.PReLU(init=0.1)), ReLULike)
    assert isinstance(dual_activation(nn.GELU("tanh")), HermiteDual)
    assert isinstance(dual_activation(lambda z: z**3), HermiteDual)


def test_registry_and_messages():
    register_activation("cube", lambda z: z**3)
    try:
        one = scalar(1.0)
        assert dual_activation("cube").covariance(one, one, one)[0].item() == pytest.approx(15.0)  # E[z⁶]
        with pytest.raises(ValueError, match="already registered"):
            register_activation("cube", torch.sin)
    finally:
        unregister_activation("cube")
    with pytest.raises(ValueError, match="Did you mean 'gelu'"):
        dual_activation("gellu")
    with pytest.raises(ValueError, match="3 slopes"):
        dual_activation(nn.PReLU(3))
    with pytest.raises(TypeError, match="must be a name"):
        dual_activation(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["erf", "gelu", "gaussian"])
def test_equal_rows_of_any_size_keep_their_digits(name, dtype):
    """(1 + 2q)² - 4k² loses 1 + 4q at k = q; both expectations then have a closed form in s = 1 + 4q, or 1 + 2q."""
    q = torch.tensor([1.0, 1e4, 1e8, 1e16], dtype=dtype)
    slope = dual_activation(name).covariance(q, q, q)[1]
    exact = {
        "erf": 4 / torch.pi / (1 + 4 * q).sqrt(),
        "gelu": (k := q / (1 + 2 * q).sqrt()).atan() / (2 * torch.pi) + 0.25
        + k * (3 + 5 * q) / (1 + q) / (1 + 2 * q) / (2 * torch.pi),
        "gaussian": 4 * q * (1 + 4 * q).pow(-1.5),
    }[name]  # fmt: skip
    torch.testing.assert_close(slope, exact)


def test_the_sine_of_small_and_large_variances():
    """E[sin sin'] = exp(-(q + q') / 2) sinh k: the identity's k for small q, and finite for large ones."""
    q = torch.tensor([1e-30, 1e-12, 1e-3, 1.0, 1e4], dtype=torch.float64)
    for rho in (-0.9, 0.0, 0.5):
        k = (rho * q).requires_grad_()
        value = dual_activation("sin").covariance(q, q, k)[0]
        torch.testing.assert_close(value[:4], ((-q).exp() * k.sinh())[:4], rtol=1e-14, atol=0)
        (slope,) = torch.autograd.grad(value.sum(), k)
        torch.testing.assert_close(slope[:4], ((-q).exp() * k.cosh())[:4], rtol=1e-14, atol=0)
        assert torch.isfinite(value[4])
        assert torch.isfinite(slope[4])


def test_truncation_reports_the_mass_beyond_the_series():
    dual = HermiteDual(torch.tanh, degree=5)
    value, _ = dual.truncation(scalar(0.0), scalar(4.0))
    assert 1e-4 < value.item() < 0.1
    full = dual_activation("tanh").truncation(scalar(0.0), scalar(4.0))[0].item()
    assert full < 1e-6
    assert relative(dual.second_moment(scalar(4.0)), dual_activation("tanh").second_moment(scalar(4.0))) < 1e-12


def test_a_series_of_one_term_is_the_mean():
    """E[φ(z)] E[φ(z')] for independent variables; the mass beyond it goes to the correlation."""
    dual = HermiteDual(torch.exp, degree=1)
    value, _ = dual.covariance(scalar(0.5), scalar(0.25), scalar(0.0))
    assert value.item() == pytest.approx(np.exp(0.25) * np.exp(0.125), rel=1e-12)
    with pytest.raises(ValueError, match="at least 1"):
        HermiteDual(torch.exp, degree=0)
