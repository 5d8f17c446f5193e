"""Closed form by modes: against steps, against a matrix exponential, at zero, infinity and λ = 0."""

import pytest
import torch
import torch.nn.functional as F

from lightning_graphon.dynamics import LossDecayPredictor
from tests.helpers.dynamics_cases import half_mse

SGD = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.8, "dampening": 0.3}]


def problem(n=7, c=3, rank=None, **sgd):
    factor = torch.randn(n, rank or n).double()
    f0, y = torch.randn(n, c).double(), torch.randn(n, c).double()
    return LossDecayPredictor(factor @ factor.T, f0, y, F.mse_loss, **sgd), factor @ factor.T, f0, y


@pytest.mark.parametrize("sgd", SGD, ids=str)
def test_steps_compose_to_the_closed_form(sgd):
    predictor, *_ = problem(**sgd)
    lr = 0.3 * predictor.max_learning_rate()
    closed = predictor.predict(range(31), lr)
    outputs = predictor.predict_outputs([30], lr)[0]
    torch.testing.assert_close(predictor.run([lr] * 30), closed)
    torch.testing.assert_close(predictor.outputs, outputs)
    torch.testing.assert_close(predictor.predict(range(31), lr), closed)  # stepping does not move it


def test_flow_is_the_matrix_exponential():
    predictor, kernel, f0, y = problem()
    for t in (0.0, 0.7, 12.5):
        truth = y + torch.linalg.matrix_exp(-0.1 * t * 2 / 21 * kernel) @ (f0 - y)
        torch.testing.assert_close(predictor.predict_outputs(t, 0.1, flow=True)[0], truth)
    small = 1e-4
    torch.testing.assert_close(  # descent with a small rate is the flow
        predictor.predict([20000], small), predictor.predict([20000], small, flow=True), rtol=1e-2, atol=0
    )
    torch.testing.assert_close(  # only lr × t counts: a schedule is a time axis
        predictor.predict([3.0], 0.2, flow=True), predictor.predict([0.6], 1.0, flow=True)
    )


def test_flow_with_momentum_is_what_slow_modes_do():
    predictor, *_ = problem(momentum=0.9)
    lr = 1e-3 * predictor.max_learning_rate()
    torch.testing.assert_close(
        predictor.predict([4000], lr), predictor.predict([4000], lr, flow=True), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("t", [4, torch.inf])
def test_test_points_with_a_singular_kernel(t):
    factor = torch.randn(9, 3).double()
    joint, y = factor @ factor.T, torch.randn(6, 2).double()
    predictor = LossDecayPredictor(
        joint[:6, :6], torch.zeros(6, 2), y, F.mse_loss,
        test_kernel=joint[6:, :6], test_outputs=torch.zeros(3, 2), test_targets=torch.zeros(3, 2),
    )  # fmt: skip
    found = predictor.predict_test_outputs(t, 0.2)[0]
    fit = predictor.predict_outputs(t, 0.2)[0]  # linear in 3 features: the fit on the train points gives them
    torch.testing.assert_close(found, factor[6:] @ torch.linalg.lstsq(factor[:6], fit).solution)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("sgd", SGD, ids=str)
def test_zero_eigenvalues_and_infinity(sgd, flow):
    predictor, kernel, f0, y = problem(rank=3, **sgd)
    lr = 0.5 * predictor.max_learning_rate()
    losses = predictor.predict([0, 1, 1000, torch.inf], lr, flow=flow)
    assert torch.isfinite(losses).all()
    assert losses[0] == pytest.approx(predictor.loss)
    null = torch.eye(7).double() - kernel @ torch.linalg.pinv(kernel, rtol=1e-10)
    rest = float((null @ (f0 - y)).square().mean())  # what no kernel of this rank can learn
    assert float(losses[3]) == pytest.approx(rest)
    outputs = predictor.predict_outputs(torch.inf, lr, flow=flow)[0]
    torch.testing.assert_close(outputs, y + null @ (f0 - y), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("flow", [False, True])
def test_zero_kernel_and_perfect_fit(flow):
    y = torch.ones(3, 2)
    still = LossDecayPredictor(torch.zeros(3, 3), torch.zeros(3, 2), y, F.mse_loss)
    assert still.predict([0, 5, torch.inf], 0.1, flow=flow).tolist() == pytest.approx([1.0] * 3)
    assert still.max_learning_rate() == float("inf")
    still.step(0.1)
    assert still.loss == 1.0
    done = LossDecayPredictor(torch.eye(3), y, y, F.mse_loss)
    assert done.predict([0, torch.inf], 0.1, flow=flow).tolist() == [0.0, 0.0]
    assert done.modes.shares.tolist() == [0.0, 0.0, 0.0]


def test_zero_rate_at_infinity():
    predictor, *_ = problem()
    assert float(predictor.predict(torch.inf, 0.0, flow=True)) == pytest.approx(predictor.loss)


def test_test_points_at_infinity_are_kernel_regression():
    factor = torch.randn(9, 12).double()
    joint = factor @ factor.T
    f0, y = torch.zeros(6, 2).double(), torch.randn(6, 2).double()
    predictor = LossDecayPredictor(
        joint[:6, :6], f0, y, F.mse_loss,
        test_kernel=joint[6:, :6], test_outputs=torch.zeros(3, 2), test_targets=torch.zeros(3, 2),
    )  # fmt: skip
    truth = joint[6:, :6] @ torch.linalg.solve(joint[:6, :6], y)
    torch.testing.assert_close(predictor.predict_test_outputs(torch.inf, 1.0, flow=True)[0], truth)
    lr = 0.4 * predictor.max_learning_rate()
    predictor.run([lr] * 10)
    torch.testing.assert_close(predictor.predict_test_outputs(10, lr)[0], predictor.test_outputs)


def test_modes():
    vectors = torch.linalg.qr(torch.randn(4, 4).double()).Q
    values = torch.tensor([8.0, 4.0, 2.0, 0.0]).double()
    kernel = vectors @ torch.diag(values) @ vectors.T
    y = vectors @ torch.tensor([[3.0], [1.0], [0.0], [2.0]]).double()
    modes = LossDecayPredictor(kernel, torch.zeros(4, 1), y, F.mse_loss).modes
    torch.testing.assert_close(modes.eigenvalues, values)
    torch.testing.assert_close(modes.rates, 2 * values * 2 / 4)
    torch.testing.assert_close(modes.shares, torch.tensor([9.0, 1.0, 0.0, 4.0]).double() / 14)
    assert modes.top_share(2) == pytest.approx(10 / 14)


@pytest.mark.parametrize(
    ("loss_fn", "curvature"),
    [
        (F.mse_loss, 2 / 8),
        (half_mse, 1 / 8),
        (lambda f, y: F.mse_loss(f, y, reduction="sum"), 2.0),
        (lambda f, y: F.mse_loss(f, y) + 5.0, 2 / 8),
    ],
)
def test_the_convention_is_read_from_the_loss(loss_fn, curvature):
    f0, y = torch.randn(4, 2), torch.randn(4, 2)
    predictor = LossDecayPredictor(torch.eye(4), f0, y, loss_fn)
    assert predictor.modes.rates[0].item() == pytest.approx(2 * curvature)
    start = loss_fn(f0.double(), y.double())
    assert float(predictor.predict(0, 0.1)) == pytest.approx(float(start))
    floor = loss_fn(y.double(), y.double())
    assert float(predictor.predict(torch.inf, 0.1)) == pytest.approx(float(floor))


def test_refuses_times_that_are_none():
    predictor, *_ = problem()
    with pytest.raises(ValueError, match="0 or more"):
        predictor.predict(-1, 0.1)
    with pytest.raises(ValueError, match="whole steps"):
        predictor.predict(0.5, 0.1)
    assert predictor.predict([], 0.1).shape == (0,)


def test_negative_eigenvalues_are_named():
    predictor = LossDecayPredictor(
        torch.diag(torch.tensor([1.0, -0.5])), torch.zeros(2, 1), torch.ones(2, 1), F.mse_loss
    )
    with pytest.warns(UserWarning, match="smallest eigenvalue is -0.5"):
        assert float(predictor.predict(torch.inf, 0.1)) == pytest.approx(0.5)
