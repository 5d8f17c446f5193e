"""The finite-probe correction, and the band around networks trained on more than the probe."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_graphon.dynamics import LossBand, LossDecayPredictor, finite_probe_kernel
from lightning_graphon.ntk import DenseOperator, KroneckerKernel, empirical_ntk


def test_weights():
    n, c, d = 4, 2, 100
    ones, f = torch.ones(n, n), torch.zeros(n, c)
    weight = finite_probe_kernel(ones, f, d)
    torch.testing.assert_close(weight.diagonal(), torch.full((n,), n / d).double())
    torch.testing.assert_close(weight.sum(1), torch.full((n,), float(n)).double())  # a row's weight stays
    per_output = finite_probe_kernel(torch.ones(c, n, n), f, d)
    full = finite_probe_kernel(torch.ones(n, c, n, c), f, d).reshape(n, c, n, c)
    for k in range(c):
        torch.testing.assert_close(per_output[k], weight)
        torch.testing.assert_close(full[:, k, :, 1 - k], weight)  # one sample's outputs are one block
    torch.testing.assert_close(finite_probe_kernel(DenseOperator(ones.double()), f, d), weight)
    torch.testing.assert_close(finite_probe_kernel(ones, f, n), ones.double())
    assert finite_probe_kernel(torch.ones(1, 1), torch.zeros(1, 2), 10).tolist() == [[0.1]]
    with pytest.raises(ValueError, match="at least the 4"):
        finite_probe_kernel(ones, f, 3)


@pytest.mark.parametrize("positive", [False, True])
def test_weights_of_a_kronecker_product(positive):
    n, c, d = 5, 3, 60
    factor, gram = torch.randn(n, 2).double(), torch.randn(c, c).double()
    kernel, f = KroneckerKernel(factor @ factor.T, gram @ gram.T), torch.zeros(n, c)
    mine = finite_probe_kernel(kernel, f, d, positive=positive)
    assert isinstance(mine, KroneckerKernel), "the structure stays, and with it the price of a step"
    truth = finite_probe_kernel(kernel.to_dense(), f, d, positive=positive)
    torch.testing.assert_close(mine.to_dense(), truth)
    lowest = float(torch.linalg.eigvalsh(truth)[0]) / float(truth.trace())
    assert (lowest < -0.01) is not positive, "the correction takes a kernel of low rank below zero"


def test_band_is_the_two_predictors():
    kernel, f0, y = torch.eye(4) + 0.5, torch.randn(4, 3), torch.randint(3, (4,))
    band = LossBand(kernel, f0, y, F.cross_entropy, dataset_size=40, momentum=0.5)
    plain = LossDecayPredictor(kernel, f0, y, F.cross_entropy, momentum=0.5)
    corrected = LossDecayPredictor(finite_probe_kernel(kernel, f0, 40), f0, y, F.cross_entropy, momentum=0.5)
    both = torch.stack([p.run([0.1] * 5) for p in (plain, corrected)])
    lower, upper = band.run([0.1] * 5)
    torch.testing.assert_close(lower, both.amin(0), rtol=0, atol=0)
    torch.testing.assert_close(upper, both.amax(0), rtol=0, atol=0)
    assert lower[0] == upper[0]
    assert band.lower == float(lower[-1]) < band.upper == float(upper[-1])
    closed = LossBand(kernel, f0, y, F.cross_entropy, dataset_size=4)
    lower, upper = closed.run([0.1] * 5)
    torch.testing.assert_close(lower, upper)


def clusters(n):
    """Ten noisy classes in 20 dimensions, so that a probe point mostly learns from itself."""
    labels = torch.randint(10, (n,))
    return torch.randn(10, 20).double()[labels] + 0.7 * torch.randn(n, 20).double(), labels


@pytest.mark.parametrize("batch", [512, 64])
def test_the_band_brackets_training_on_the_whole_set(batch):
    d, n, lr, steps = 512, 96, 0.005, 100
    x, y = clusters(d)
    model = nn.Sequential(nn.Linear(20, 1024), nn.ReLU(), nn.Linear(1024, 10)).double()
    probe, labels = x[:n], y[:n]
    band = LossBand(empirical_ntk(model, probe, reduce=None), model(probe), labels, F.cross_entropy, dataset_size=d)
    lower, upper = band.run([lr] * steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        rows = torch.randperm(d)[:batch]
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    observed = float(F.cross_entropy(model(probe), labels).detach())
    print(lower[0], lower[-1], observed, upper[-1])
    assert lower[-1] < observed < upper[-1] < upper[0]
