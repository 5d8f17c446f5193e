"""Gaussian processes against matrix formulas, descent of linear models, scikit-learn, and an ensemble of networks."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

from lightning_graphon.dynamics import LossDecayPredictor, gp_posterior
from lightning_graphon.ntk import graphon_ntk_from_model

N, M, C = 6, 4, 3
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def kernel(seed, *lead, rank=12, points=N + M):
    factor = torch.randn(*lead, points, rank, generator=torch.Generator().manual_seed(seed)).double()
    return factor @ factor.mT / rank


def problem(*lead):
    targets = torch.randn(N, C, generator=torch.Generator().manual_seed(9)).double()
    return kernel(0, *lead), kernel(1, *lead), targets


def from_formula(nngp, ntk, y, t, ridge=0.0, curvature=2 / (N * C)):
    """Equations 15 and 16 of Lee et al. (2019) with scipy's matrix exponential and solver."""
    K, T, y = (v.numpy() for v in (nngp, ntk, y))
    system = T[:N, :N] + ridge * np.eye(N)
    learned = np.eye(N) - (0 if np.isinf(t) else scipy.linalg.expm(-curvature * t * system))
    G = T[N:, :N] @ scipy.linalg.solve(system, learned)
    cross = G @ K[:N, N:]
    return torch.tensor(G @ y), torch.tensor(K[N:, N:] - cross - cross.T + G @ K[:N, :N] @ G.T)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_ensembles_are_the_papers_formula(ridge):
    nngp, ntk, y = problem()
    times = [0.0, 0.7, 30.0, 1e4, torch.inf]
    found = gp_posterior(nngp, y, ntk=ntk, times=times, ridge=ridge)
    for i, t in enumerate(times):
        mean, covariance = from_formula(nngp, ntk, y, t, ridge)
        torch.testing.assert_close(found.mean[i], mean, **CLOSE)
        torch.testing.assert_close(found.covariance[i], covariance, **CLOSE)
        alone = gp_posterior(nngp, y, ntk=ntk, times=t, ridge=ridge)
        torch.testing.assert_close(alone.covariance, covariance, **CLOSE)
    torch.testing.assert_close(found.covariance[0], nngp[N:, N:], **CLOSE)  # the prior
    torch.testing.assert_close(found.variance, found.covariance.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("which", ["nngp", "ntk", "both"])
def test_outputs_with_kernels_of_their_own(which):
    nngp, ntk, y = problem(C)
    nngp = nngp if which != "ntk" else nngp[0]
    ntk = ntk if which != "nngp" else ntk[0]
    found = gp_posterior(nngp, y, ntk=ntk, times=[2.0, 9.0])
    assert found.covariance.shape == (2, C, M, M)
    for c in range(C):
        K, T = (k if k.ndim == 2 else k[c] for k in (nngp, ntk))
        mean, covariance = from_formula(K, T, y[:, c : c + 1], 9.0)
        torch.testing.assert_close(found.mean[1, :, c], mean[:, 0], **CLOSE)
        torch.testing.assert_close(found.covariance[1, c], covariance, **CLOSE)


@pytest.mark.parametrize("ridge", [0.0, 0.4])
def test_bayes_is_scikit_learns(ridge):
    x = torch.randn(N + M, 2, generator=torch.Generator().manual_seed(3)).double().numpy()
    y = np.sin(x[:N, 0])
    rule = kernels.RBF(0.7)
    model = GaussianProcessRegressor(rule, alpha=max(ridge, 1e-14), optimizer=None).fit(x[:N], y)
    mean, covariance = model.predict(x[N:], return_cov=True)
    found = gp_posterior(torch.tensor(rule(x)), torch.tensor(y), ridge=ridge)
    assert found.mean.shape == (M,)
    torch.testing.assert_close(found.mean, torch.tensor(mean), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.covariance, torch.tensor(covariance), rtol=1e-7, atol=1e-8)


def test_training_the_last_layer_for_long_is_bayes():
    nngp, _, y = problem()
    bayes, trained = gp_posterior(nngp, y), gp_posterior(nngp, y, ntk=nngp)
    torch.testing.assert_close(trained.mean, bayes.mean, **CLOSE)
    torch.testing.assert_close(trained.covariance, bayes.covariance, **CLOSE)


# ---- linear models, whose outputs are a Gaussian process at all times


@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_descent_of_a_linear_ensemble_step_by_step(ridge):
    """Mean and covariance of the weights carried through each step of descent on the loss itself."""
    random = torch.Generator().manual_seed(5)
    features = torch.randn(N + M, 15, generator=random).double()
    spread = torch.randn(15, 15, generator=random).double()  # of the initial weights, spread @ spreadᵀ
    y = torch.randn(N, generator=random).double()
    train, lr, c = features[:N], 0.1, 2 / N
    # Weights are A w_0 + b: the gradient of the loss is linear in w and in w_0.
    A, b = torch.eye(15).double(), torch.zeros(15).double()
    found = gp_posterior(
        features @ spread @ spread.T @ features.T, y, ntk=features @ features.T, times=range(41), lr=lr, ridge=ridge
    )
    for step in range(41):
        torch.testing.assert_close(found.mean[step], features[N:] @ b, **CLOSE)
        root = features[N:] @ A @ spread
        torch.testing.assert_close(found.covariance[step], root @ root.T, **CLOSE)
        A = A - lr * c * (train.T @ train @ A + ridge * (A - torch.eye(15).double()))
        b = b - lr * c * (train.T @ (train @ b - y) + ridge * b)


def test_a_drawn_ensemble_descends_as_predicted():
    """20,000 linear models with autograd's own gradients and torch's own optimizer."""
    random = torch.Generator().manual_seed(6)
    features, members = torch.randn(N + M, 8, generator=random).double() / 8**0.5, 20_000
    y = torch.randn(N, 1, generator=random).double()
    weights = torch.randn(8, members, generator=random).double().requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        ((features[:N] @ weights - y).square().mean(0).sum()).backward()
        optimizer.step()
    outputs = (features[N:] @ weights).detach()
    K = features @ features.T
    found = gp_posterior(K, y, ntk=K, times=30, lr=0.5)
    error = 5 / members**0.5  # five standard errors of entries of order one
    torch.testing.assert_close(found.mean[:, 0], outputs.mean(1), rtol=0, atol=error)
    torch.testing.assert_close(found.covariance, outputs.cov(), rtol=0, atol=2 * error)


# ---- numbers


def test_singular_kernels_stay_finite_and_positive():
    nngp, ntk = kernel(0, rank=3), kernel(1, rank=2)
    y = torch.randn(N, C).double()
    for result in (gp_posterior(nngp, y), gp_posterior(nngp, y, ntk=ntk, times=[0, 5.0, 1e12, torch.inf])):
        assert result.mean.isfinite().all()
        assert result.covariance.isfinite().all()
        assert (result.variance >= 0).all()
        assert torch.linalg.eigvalsh(result.covariance).min() > -1e-12
    doubled = torch.cat([nngp[:N], nngp[:M]])[:, [*range(N), *range(M)]]  # test points that are train points
    assert gp_posterior(doubled, y).variance.max() < 1e-12
    zero = gp_posterior(torch.zeros(N + M, N + M), y, ntk=torch.zeros(N + M, N + M), times=[1.0, torch.inf])
    assert not zero.mean.any()
    assert not zero.covariance.any()


@pytest.mark.parametrize("lr", [None, 0.25])
def test_slow_modes_keep_their_digits(lr):
    """Features in powers of ten, against 60 digits: 1 - exp(-λt) in float64 would leave nine of them."""
    mpmath = pytest.importorskip("mpmath")  # comes with torch
    mpmath.mp.dps = 60
    random = torch.Generator().manual_seed(2)
    train = torch.linalg.qr(torch.randn(4, 4, generator=random).double()).Q * 10.0 ** -(torch.arange(4).double() ** 1.2)
    features = torch.cat(
        [train, torch.tensor([[0, 0, 0, 1e-3]]).double()]
    )  # a point that only the slowest mode reaches
    K, y = features @ features.T, torch.randn(4, generator=random).double()
    found = gp_posterior(K, y, ntk=K, times=4, lr=lr).mean
    T, c = mpmath.matrix(K.tolist()), mpmath.mpf(2) / 4
    A = T[:4, :4]
    left = mpmath.expm(-4 * c * A) if lr is None else (mpmath.eye(4) - lr * c * A) ** 4
    truth = T[4:, :4] * mpmath.inverse(A) * (mpmath.eye(4) - left) * mpmath.matrix(y.tolist())
    torch.testing.assert_close(found, torch.tensor([float(v) for v in truth], dtype=torch.float64), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": torch.ones(N, N)}, "prior must be"),
        ({"prior": torch.ones(2, N + M, N + M)}, "prior must be"),
        ({"prior": -torch.eye(N + M)}, "positive semi-definite"),
        ({"prior": torch.full((N + M, N + M), torch.nan)}, "prior has entries that are not finite"),
        ({"prior": torch.triu(torch.ones(N + M, N + M))}, "symmetric"),
        ({"ntk": -torch.eye(N + M)}, "ntk must be positive semi-definite"),
        ({"ntk": torch.eye(N)}, "ntk must be"),
        ({"targets": torch.zeros(N, dtype=torch.int64)}, "one_vs_rest_targets"),
        ({"targets": torch.full((N, C), torch.inf)}, "targets must be finite"),
        ({"ridge": -1.0}, "ridge"),
        ({"times": -1.0}, "times must be 0 or more"),
        ({"times": [0.5], "lr": 0.1}, "whole steps"),
        ({"lr": 1e6}, "lr must be below"),
        ({"ntk": None, "times": 3.0}, "no times"),
        ({"ntk": None, "lr": 0.1}, "no times"),
        ({"loss_fn": F.l1_loss}, "squared error"),
    ],
)
def test_what_is_refused(change, message):
    nngp, ntk, y = problem()
    arguments = {"prior": nngp, "targets": y, "ntk": ntk, **change}
    with pytest.raises(ValueError, match=message):
        gp_posterior(**arguments)


def test_kernels_of_different_scale_are_refused():
    """A test block in another parameterisation is no kernel together with the train block."""
    nngp, ntk, y = problem()
    ntk[N:, :N] *= 3
    ntk[:N, N:] *= 3
    with pytest.raises(ValueError, match="same kernel"):
        gp_posterior(nngp, y, ntk=ntk)


# ---- the predictor's own variance


def predictor(ntk, y, **options):
    test = torch.zeros(M, *y.shape[1:])
    return LossDecayPredictor(
        ntk[..., :N, :N], torch.zeros_like(y), y, F.mse_loss,
        test_kernel=ntk[..., N:, :N], test_outputs=test, test_targets=test, **options,
    )  # fmt: skip


@pytest.mark.parametrize("flow", [False, True])
def test_variances_beside_predicted_outputs(flow):
    nngp, ntk, y = problem()
    found = predictor(ntk, y)
    outputs, variance = found.predict_test_outputs([0, 7], 0.3, flow=flow, initial_covariance=nngp)
    torch.testing.assert_close(outputs, found.predict_test_outputs([0, 7], 0.3, flow=flow))
    truth = gp_posterior(nngp, y, ntk=ntk, times=[0, 2.1] if flow else [0, 7], lr=None if flow else 0.3)
    torch.testing.assert_close(outputs, truth.mean)
    torch.testing.assert_close(variance, truth.variance[:, :, None].expand(2, M, C))


def test_a_full_kernel_between_outputs():
    """Against per-output kernels of which it is built, and against mixed ones by the formula on N·C points."""
    nngp, ntk, y = problem(C)
    eye = torch.eye(C).double()
    full = torch.einsum("cnm,cd->ncmd", ntk, eye)
    test = torch.zeros(M, C)
    found = LossDecayPredictor(
        full[:N, :, :N], torch.zeros_like(y), y, F.mse_loss,
        test_kernel=full[N:, :, :N], test_outputs=test, test_targets=test,
    )  # fmt: skip
    _, variance = found.predict_test_outputs([5], 0.3, initial_covariance=nngp)
    covariance = found.predict_test_covariance([5], 0.3, nngp)
    truth = gp_posterior(nngp, y, ntk=ntk, times=[5], lr=0.3)
    torch.testing.assert_close(variance, truth.variance.mT)
    torch.testing.assert_close(covariance, torch.einsum("tcnm,cd->tncmd", truth.covariance, eye))


def test_momentum_carries_over():
    """The linear ensemble under torch's own SGD with momentum, its spread carried through each step."""
    random = torch.Generator().manual_seed(5)
    features = torch.randn(N + M, 15, generator=random).double()
    weights = torch.eye(15).double().requires_grad_()  # one column for each direction of the initial weights
    optimizer = torch.optim.SGD([weights], lr=0.05, momentum=0.8)
    K, y = features @ features.T, torch.zeros(N).double()
    steps = 12
    for _ in range(steps):
        optimizer.zero_grad()
        (features[:N] @ weights).square().mean(0).sum().backward()
        optimizer.step()
    root = (features[N:] @ weights).detach()
    _, variance = predictor(K, y, momentum=0.8).predict_test_outputs([steps], 0.05, initial_covariance=K)
    torch.testing.assert_close(variance[0], root.square().sum(1), **CLOSE)


def test_descent_that_diverges_has_no_nan():
    nngp, ntk, y = problem()
    found = predictor(ntk, y, check_every=0)
    _, variance = found.predict_test_outputs([3, torch.inf], 1e3, initial_covariance=nngp)
    assert variance[0].isfinite().all()
    assert torch.isinf(variance[1]).all()
    assert torch.isinf(found.predict_test_covariance([torch.inf], 1e3, nngp)).all()


@pytest.mark.parametrize("covariance", [torch.eye(N), torch.eye(N + M).expand(2, -1, -1), -torch.eye(N + M)])
def test_covariances_that_do_not_fit(covariance):
    _, ntk, y = problem()
    with pytest.raises(ValueError, match="initial covariance must be"):
        predictor(ntk, y).predict_test_outputs([1], 0.1, initial_covariance=covariance)


# ---- networks


@pytest.mark.slow
def test_an_ensemble_of_wide_networks():
    """400 networks of width 512 trained by descent: the limit's mean and covariance within sampling and width."""
    torch.manual_seed(0)
    width, members, inputs = 512, 400, 3
    x = F.normalize(torch.randn(N + M, inputs), dim=1).double()
    y = torch.sin(3 * x[:N, 0])
    model = torch.nn.Sequential(torch.nn.Linear(inputs, width, bias=False), torch.nn.ReLU(),
                                torch.nn.Linear(width, 1, bias=False)).double()  # fmt: skip
    options = {"propagate": "density", "parameterization": "ntk", "weight_variance": 2.0}
    nngp, ntk = (graphon_ntk_from_model(model, x, get=get, **options) for get in ("nngp", "ntk"))
    first = torch.randn(members, width, inputs).double().requires_grad_()
    last = torch.randn(members, 1, width).double().requires_grad_()

    def outputs():  # NTK parameterisation
        hidden = ((2 / inputs) ** 0.5 * first @ x.T).relu()
        return ((2 / width) ** 0.5 * last @ hidden)[:, 0]

    start, lr, after = outputs().detach(), 0.5, {}
    for step in range(201):
        out = outputs()
        if step in (20, 200):
            after[step] = out.detach()[:, N:]
        loss = (out[:, :N] - y).square().mean(1).sum()
        grads = torch.autograd.grad(loss, (first, last))
        with torch.no_grad():
            first -= lr * grads[0]
            last -= lr * grads[1]
    assert start.shape == (members, N + M)
    found = gp_posterior(nngp, y, ntk=ntk, times=[0, 20, 200], lr=lr)
    drawn = [start[:, N:], after[20], after[200]]
    for i, sample in enumerate(drawn):
        deviation = found.variance[i].sqrt()
        # Four standard errors of 400 draws, and as much again for a width of 512.
        assert ((found.mean[i] - sample.mean(0)).abs() < 8 * deviation / members**0.5 + 0.02).all()
        ratio = sample.std(0) / deviation
        assert ((ratio - 1).abs() < 8 / (2 * members) ** 0.5).all()
