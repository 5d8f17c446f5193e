"""Kernels, spectra and predictions on a GPU against the CPU's float64, to the precision of docs/results/gpu.md."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_graphon.dynamics import LossDecayPredictor
from lightning_graphon.graphon import layer_graphons
from lightning_graphon.ntk import (
    EmpiricalNTK,
    empirical_ntk,
    graphon_ntk,
    graphon_ntk_from_model,
    kronecker_ntk,
    spectral_summary,
    top_eigenpairs,
)
from lightning_graphon.pruning import prune
from tests.helpers.networks import CASES, mlp, seeded

# Relative Frobenius distance from the same kernel on the CPU in float64.
PRECISE = {torch.float64: 1e-12, torch.float32: 2e-5}
# Kernels with a drift are sums of a series, whose terms cancel: 3.2e-11 was measured.
PRECISE_WITH_DRIFT = {torch.float64: 1e-10, torch.float32: 2e-5}


def apart(found, expected):
    return float((found.cpu().double() - expected).norm() / expected.norm())


def half_masked(model):
    source = torch.Generator().manual_seed(2)
    return {n: torch.rand(p.shape, generator=source) < 0.5 for n, p in model.named_parameters() if p.ndim > 1}


def inputs_of(case, dtype, count=12):
    x = CASES[case].data()[0][:count]
    return x.to(dtype) if x.is_floating_point() else x


@pytest.fixture(params=["off", "allowed the old way", "allowed the new way"])
def tensorfloat(request):
    """TF32 as a user may have chosen it for training; kernels are computed without it all the same."""
    if request.param == "allowed the old way":
        torch.backends.cuda.matmul.allow_tf32 = True
    if request.param == "allowed the new way":
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            pytest.skip("this torch has the old way only")
        before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield request.param
    if request.param == "allowed the new way":
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("reduce", ["mean", None])
@pytest.mark.parametrize("dtype", PRECISE)
@pytest.mark.parametrize("case", CASES)
def test_exact_kernels_of_every_kind_of_layer(case, dtype, reduce, device):
    model = CASES[case].model().double()
    masks = half_masked(model)
    expected = empirical_ntk(model, inputs_of(case, torch.float64), masks=masks, reduce=reduce)
    twin = copy.deepcopy(model).to(device, dtype)
    x = inputs_of(case, dtype).to(device)
    found = empirical_ntk(twin, x, masks={n: m.to(device) for n, m in masks.items()}, reduce=reduce)
    assert found.device.type == device.type
    assert apart(found, expected) < PRECISE[dtype]


@pytest.mark.parametrize("case", ["mlp", "residual", "transformer"])
def test_float32_kernels_know_no_tensorfloat(case, tensorfloat, device):
    model = CASES[case].model()
    x = inputs_of(case, torch.float32)
    expected = empirical_ntk(copy.deepcopy(model).double(), x.double())
    assert apart(empirical_ntk(model.to(device), x.to(device)), expected) < PRECISE[torch.float32]


def test_what_the_user_chose_of_tensorfloat_comes_back(tensorfloat, device):
    new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn) if new else ()

    def chosen():
        if tensorfloat == "allowed the new way":
            return [part.fp32_precision for part in parts]
        return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]

    before = chosen()
    empirical_ntk(CASES["residual"].model().to(device), inputs_of("residual", torch.float32).to(device))
    assert chosen() == before


@pytest.mark.only_cuda
def test_products_in_tensorfloat_would_be_seen(device):
    """What the tests above could not tell apart would not have been tested."""
    x = torch.randn(64, 1024, dtype=torch.float64)
    torch.backends.cuda.matmul.allow_tf32 = True
    single = x.float().to(device)
    assert apart(single @ single.T, x @ x.T) > 5e-5


@pytest.mark.parametrize("propagate", ["density", "energy", "drift"])
@pytest.mark.parametrize("dtype", PRECISE)
def test_infinite_kernels(propagate, dtype, device):
    net = seeded(lambda: mlp(48, 4, inputs=20, outputs=5)).double()
    masks = prune(net, "synflow", sparsity=0.5, steps=5)
    graphons = layer_graphons(masks, model=net, bins=4, order="joint")
    x, widths = torch.randn(40, 20, dtype=torch.float64), [20, 48, 48, 48]
    for activation in ("relu", "gelu", "erf"):
        options = {"activation": activation, "propagate": propagate, "widths": widths, "bias_variance": 0.1}
        expected = graphon_ntk(x, graphons, **options)
        there = {name: graphon.to(device, dtype) for name, graphon in graphons.items()}
        found = graphon_ntk(x.to(device, dtype), there, **options)
        assert found.device.type == device.type
        assert apart(found, expected) < (PRECISE_WITH_DRIFT if propagate == "drift" else PRECISE)[dtype]


def test_graphon_kernel_read_from_the_model(device):
    net = seeded(lambda: mlp(48, 4, inputs=20, outputs=5)).double()
    masks, x = prune(net, "magnitude", sparsity=0.7), torch.randn(40, 20, dtype=torch.float64)
    for propagate in ("density", "energy", "drift"):
        expected = graphon_ntk_from_model(net.cpu(), x, masks.to("cpu"), bins=8, propagate=propagate)
        found = graphon_ntk_from_model(net.to(device), x.to(device), masks.to(device), bins=8, propagate=propagate)
        assert apart(found, expected) < PRECISE_WITH_DRIFT[torch.float64]


def test_spectra_and_operators(device):
    net, x = CASES["residual"].model().double(), inputs_of("residual", torch.float64)
    expected = spectral_summary(empirical_ntk(net, x))
    there = copy.deepcopy(net).to(device)
    found = spectral_summary(empirical_ntk(there, x.to(device)))
    torch.testing.assert_close(found.eigenvalues.cpu(), expected.eigenvalues, rtol=1e-9, atol=1e-12)
    assert found.effective_rank == pytest.approx(expected.effective_rank, rel=1e-9)
    operator = EmpiricalNTK(there, x.to(device), reduce="mean")
    values, vectors = top_eigenpairs(operator, 3)
    torch.testing.assert_close(values.cpu(), expected.eigenvalues[:3], rtol=1e-8, atol=0.0)
    assert vectors.device.type == "cpu"  # as ARPACK leaves them


def test_predicted_losses(device):
    net, (x, y) = seeded(lambda: mlp(64, 3, inputs=20, outputs=5)).double(), torch.randn(2, 32, 20)
    targets = y[:, 0].abs().mul(7).long() % 5
    losses = []
    for place in ("cpu", device):
        model, samples, classes = net.to(place), x.double().to(place), targets.to(place)
        kernel = kronecker_ntk(model, samples)
        with torch.no_grad():
            outputs = model(samples)
        predictor = LossDecayPredictor(kernel, outputs, classes, F.cross_entropy, momentum=0.9)
        losses.append(predictor.run([0.01] * 50).cpu())
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0.0)


def test_recurrent_networks_have_a_backward_pass_in_eval_mode(device):
    """cuDNN's have none; kernels and SynFlow take another one, and cuDNN is on again afterwards."""
    model = CASES["lstm"].model().to(device)
    x = inputs_of("lstm", torch.float32).to(device)
    assert empirical_ntk(model, x).isfinite().all()
    masks = prune(model, "synflow", sparsity=0.5, include="*weight*", batches=[(x, None)], steps=3)
    assert masks.kept == masks.total // 2
    assert torch.backends.cudnn.enabled
    assert isinstance(model.rnn, nn.LSTM)
