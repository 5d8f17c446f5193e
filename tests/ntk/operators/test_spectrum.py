"""Spectral summary: known spectra, degenerate cases, matrix against operator."""

import math

import pytest
import torch
from torch import nn

from lightning_graphon.ntk import (
    DenseOperator,
    EmpiricalNTK,
    empirical_ntk,
    kernel_target_alignment,
    spectral_summary,
    top_eigenpairs,
)
from tests.helpers.ntk_oracles import jacobian_kernel


def with_spectrum(values, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    return q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_power_law(alpha):
    values = 3.0 * torch.arange(1, 41, dtype=torch.float64) ** -alpha
    s = spectral_summary(with_spectrum(values))
    torch.testing.assert_close(s.eigenvalues, values)
    assert s.decay_rate == pytest.approx(alpha)
    assert math.exp(s.decay_offset) == pytest.approx(3.0)
    assert s.effective_rank == pytest.approx(float(values.sum() / values[0]))
    assert s.spectral_gap == pytest.approx(2**alpha)
    assert s.energy_concentration == pytest.approx(float(values[:5].sum() / values.sum()))
    assert s.condition_number == pytest.approx(40**alpha)
    assert s.trace == pytest.approx(float(values.sum()))


def test_exact_zeros_stay_finite_and_out_of_the_fit():
    values = torch.tensor([8.0, 4.0, 2.0, 0.0, 0.0])
    s = spectral_summary(torch.diag(values))
    assert math.isfinite(s.decay_rate)
    assert s.decay_rate == pytest.approx(spectral_summary(torch.diag(values[:3])).decay_rate)
    assert s.condition_number == math.inf
    assert s.lambda_min == 0.0


@pytest.mark.parametrize("kernel", [torch.zeros(3, 3), torch.ones(1, 1), torch.zeros(1, 1), torch.ones(4, 4)])
def test_degenerate_kernels_give_no_nan(kernel):
    s = spectral_summary(kernel, labels=torch.arange(len(kernel)))
    assert all(not math.isnan(v) for v in s.scalars().values())
    assert torch.isfinite(s.eigenvalues).all()


def test_negative_eigenvalues_are_reported_with_a_warning():
    kernel = with_spectrum([2.0, 1.0, -0.5])
    with pytest.warns(UserWarning, match="smallest eigenvalue is -0.5"):
        s = spectral_summary(kernel)
    assert s.lambda_min == pytest.approx(-0.5)
    assert s.trace == pytest.approx(2.5)


def test_alignment():
    labels = torch.tensor([0, 0, 1, 1])
    block = (labels[:, None] == labels).double()
    assert kernel_target_alignment(block, labels) == pytest.approx(1.0)
    assert kernel_target_alignment(torch.eye(4), labels) == pytest.approx(4 / (2 * 8**0.5))
    y = torch.tensor([1.0, 1, -1, -1])
    assert kernel_target_alignment(torch.outer(y, y), y) == pytest.approx(1.0)
    assert spectral_summary(block, labels).alignment == pytest.approx(1.0)


def test_refuses_what_is_no_kernel():
    with pytest.raises(ValueError, match=r"must be \[N, N\]"):
        spectral_summary(torch.ones(2, 3))
    with pytest.raises(ValueError, match="symmetric"):
        spectral_summary(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="not finite"):
        spectral_summary(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="3 labels for a kernel of 2"):
        spectral_summary(torch.eye(2), torch.zeros(3).long())


def model_and_data():
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 3)).double()
    masks = {"0.weight": torch.rand(9, 5) < 0.5}
    return model, torch.randn(7, 5, dtype=torch.float64), masks


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("reduce", [None, "mean"])
def test_operator_is_the_kernel(reduce, batch):
    model, x, masks = model_and_data()
    operator = EmpiricalNTK(model, x, masks=masks, reduce=reduce, batch=batch)
    truth = jacobian_kernel(model, x, masks)
    truth = truth.reshape(21, 21) if reduce is None else torch.einsum("ncmc->nm", truth) / 3
    torch.testing.assert_close(operator.to_dense(), truth)
    assert operator.trace() == pytest.approx(float(truth.trace()))
    v = torch.randn(len(truth), 2, dtype=torch.float64)
    torch.testing.assert_close(operator @ v, truth @ v)
    with pytest.raises(ValueError, match="cannot multiply"):
        operator @ torch.ones(4)


def test_operator_of_a_layer_without_forward_mode_derivatives():
    model, x, _ = model_and_data()
    nn.utils.parametrizations.weight_norm(model[0])
    torch.testing.assert_close(EmpiricalNTK(model, x).to_dense(), jacobian_kernel(model, x, {}).reshape(21, 21))


def test_summary_from_operator_and_from_matrix():
    model, x, masks = model_and_data()
    a = spectral_summary(EmpiricalNTK(model, x, masks=masks))
    b = spectral_summary(empirical_ntk(model, x, masks=masks, reduce=None))
    for name, value in b.scalars().items():
        assert getattr(a, name) == pytest.approx(value, rel=1e-6), name  # ratios over the smallest eigenvalue


def test_lanczos_and_its_summary(monkeypatch):
    values = torch.arange(1, 201, dtype=torch.float64) ** -1.5
    kernel = with_spectrum(values)
    before = torch.get_rng_state()
    found, vectors = top_eigenpairs(kernel, 6)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(found, values[:6], rtol=1e-7, atol=0)  # ARPACK's tolerance is 1e-8
    torch.testing.assert_close(kernel @ vectors, vectors * found, rtol=0, atol=1e-6)
    monkeypatch.setattr("lightning_graphon.ntk.operators.spectrum._DENSE", 100)
    s = spectral_summary(DenseOperator(kernel), k=20)
    assert s.decay_rate == pytest.approx(1.5, rel=1e-5)
    assert s.energy_concentration == pytest.approx(float(values[:5].sum() / values.sum()))
    assert s.lambda_min is None
    assert s.condition_number is None
    with pytest.raises(ValueError, match="at least 1"):
        top_eigenpairs(kernel, 0)


def test_a_notebook_shows_the_numbers_and_not_every_eigenvalue():
    assert repr(spectral_summary(torch.eye(200))).startswith("SpectralSummary(decay_rate=")
