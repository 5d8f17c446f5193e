"""Just below the stability edge descent converges, just above it diverges, and says so once."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from lightning_graphon.dynamics import LossDecayPredictor, stability_limit

SGD = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.8, "dampening": 0.3}]


def problem(loss_fn=F.mse_loss, n=8, c=3, **options):
    factor = torch.randn(n, n).double()
    y = torch.randn(n, c) if loss_fn is F.mse_loss else torch.randint(c, (n,))
    return LossDecayPredictor(factor @ factor.T, torch.randn(n, c), y, loss_fn, **options)


@pytest.mark.parametrize("sgd", SGD, ids=str)
def test_the_edge(sgd):
    predictor = problem(check_every=0, **sgd)
    edge = predictor.max_learning_rate()
    top = float(predictor.modes.eigenvalues[0]) * 2 / 24
    assert edge == pytest.approx(stability_limit(**sgd) / top, rel=1e-9)
    below, above = (problem_again(predictor, sgd).run([f * edge] * 3000) for f in (0.98, 1.02))
    assert below[-1] < 1e-3 * predictor.loss
    assert above[-1] > 1e6 * predictor.loss
    assert predictor.predict(torch.inf, 1.02 * edge) == torch.inf
    assert predictor.predict(torch.inf, 0.98 * edge) < 1e-9


def problem_again(predictor, sgd):
    return LossDecayPredictor(
        predictor._kernel.kernel, predictor.outputs, predictor._objective.targets, F.mse_loss, check_every=0, **sgd
    )


def test_the_edge_of_cross_entropy_from_its_hessian():
    predictor = problem(F.cross_entropy)
    f, y = predictor.outputs, predictor._objective.targets
    hessian = torch.autograd.functional.hessian(lambda g: F.cross_entropy(g, y), f).reshape(24, 24)
    full = torch.kron(predictor._kernel.kernel, torch.eye(3).double())
    top = torch.linalg.eigvals(full @ hessian).real.max()
    assert predictor.max_learning_rate() == pytest.approx(2 / float(top), rel=1e-8)


def test_warns_once():
    predictor = problem(momentum=0.5)
    edge = predictor.max_learning_rate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.step(0.9 * edge)
    with pytest.warns(UserWarning, match="largest stable") as caught:
        predictor.run([1.1 * edge] * 3)
    assert len(caught) == 1
    silent = problem(check_every=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent.step(2 * silent.max_learning_rate())


def test_the_limit_follows_the_outputs():
    """Confident outputs have a flat cross-entropy: the limit of the first step is not that of the last."""
    predictor = problem(F.cross_entropy, check_every=1)
    first = predictor.max_learning_rate()
    predictor.run([0.5 * first] * 200)
    assert predictor.max_learning_rate() > 1.5 * first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.step(1.4 * first)
