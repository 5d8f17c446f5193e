"""Function-space descent: neural-tangents' curves, linear models trained exactly, wide networks really trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_graphon.dynamics import LossDecayPredictor, stability_limit
from lightning_graphon.ntk import DenseOperator, EmpiricalNTK, KroneckerKernel, empirical_ntk
from tests.helpers.dynamics_cases import digits, error, half_mse, predictor_of, train, wide_network
from tests.helpers.ntk_oracles import FIXTURES

SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.3},
]


def fixture(tag):
    import numpy as np

    z = np.load(FIXTURES / "dynamics.npz")
    return {k.removeprefix(tag + "_"): torch.from_numpy(z[k]) for k in z.files if k.startswith(tag + "_")}


def stored_kernel(tag):
    import numpy as np

    act = tag.split("_")[0]
    v = np.load(FIXTURES / f"kernels_{act}.npz")[f"{tag}_ntk"]
    kernel = np.zeros((64, 64))
    kernel[np.triu_indices(64)] = v
    return torch.from_numpy(kernel + np.triu(kernel, 1).T)


def sines(first):
    n, k = torch.arange(first, first + 64, dtype=torch.float64), torch.arange(1, 11, dtype=torch.float64)
    return 0.1 * torch.sin(n[:, None] * k)


@pytest.mark.parametrize("start", ["zero", "sines"])
@pytest.mark.parametrize("tag", ["relu_L1_b0", "relu_L2_b0.1", "relu_L3_b0.1", "relu_L4_b0"])
def test_neural_tangents(tag, start):
    import numpy as np

    z = np.load(FIXTURES / "inputs.npz")
    y, y_test = (F.one_hot(torch.from_numpy(z[k]).long(), 10).double() - 0.1 for k in ("y_train", "y_test"))
    f0, f0_test = (torch.zeros(64, 10).double(),) * 2 if start == "zero" else (sines(1), sines(65))
    truth = fixture(tag)
    predictor = LossDecayPredictor(
        stored_kernel(tag), f0, y, half_mse,
        test_kernel=truth["ntk_test_train"], test_outputs=f0_test, test_targets=y_test,
    )  # fmt: skip
    times = torch.tensor([0.0, 1, 10, 100, 1000])
    close = {"rtol": 1e-6, "atol": 1e-9}
    if start == "sines":
        losses, few = predictor.predict(times, lr=1.0, flow=True), [1.0, 100.0]
        torch.testing.assert_close(losses, truth["f0sin_loss_train"], **close)
        torch.testing.assert_close(predictor.predict_outputs(few, 1.0, flow=True), truth["f0sin_train"], **close)
        torch.testing.assert_close(predictor.predict_test_outputs(few, 1.0, flow=True), truth["f0sin_test"], **close)
        return
    torch.testing.assert_close(predictor.predict(times, 1.0, flow=True), truth["loss_train"], **close)
    torch.testing.assert_close(predictor.predict_outputs(times, 1.0, flow=True), truth["train"], **close)
    torch.testing.assert_close(predictor.predict_test_outputs(times, 1.0, flow=True), truth["test"], **close)
    torch.testing.assert_close(predictor.predict_test_loss(times, 1.0, flow=True), truth["loss_test"], **close)
    last = predictor.predict_test_outputs(torch.inf, 1.0, flow=True)[0]
    torch.testing.assert_close(last, truth["test_inf"], **close)


def linear(bias=True, n=12):
    model = nn.Linear(5, 3, bias=bias).double()
    return model, torch.randn(n, 5).double(), torch.randint(3, (n,))


@pytest.mark.parametrize("sgd", SGD, ids=str)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_a_linear_model_is_predicted_exactly(loss, sgd):
    """Its kernel does not move, so SGD's own arithmetic must come back to rounding, under a schedule."""
    model, x, labels = linear()
    y = F.one_hot(labels, 3).double() if loss == "mse" else labels
    lrs = [0.05 + 0.04 * (k % 7) for k in range(60)]
    held_out = (torch.randn(7, 5).double(), y[:7])
    loss_fn = F.mse_loss if loss == "mse" else F.cross_entropy
    predictor = predictor_of(model, x, y, loss_fn, test=held_out, **sgd)
    observed, observed_test = train(model, x, y, loss_fn, lrs, test=held_out, **sgd)
    torch.testing.assert_close(predictor.run(lrs), observed, rtol=1e-10, atol=0)
    assert predictor.test_loss == pytest.approx(float(observed_test[-1]), rel=1e-10)
    torch.testing.assert_close(predictor.outputs, model(x).detach())
    torch.testing.assert_close(predictor.test_outputs, model(held_out[0]).detach())
    assert predictor.steps == 60


def test_momentum_that_is_scheduled():
    model, x, labels = linear()
    predictor = predictor_of(model, x, labels, F.cross_entropy, momentum=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for mu in (0.5, 0.9, 0.0, 0.7):
        optimizer.param_groups[0]["momentum"] = mu
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        predictor.step(0.1, momentum=mu)
    torch.testing.assert_close(predictor.outputs, model(x).detach())
    assert predictor.momentum == 0.5  # the schedule's last word is not the predictor's


@pytest.mark.parametrize("sgd", SGD[:3], ids=["sgd", "momentum", "nesterov"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_a_wide_network_really_trained(loss, sgd):
    """Within 2 % over 100 steps; measured: 0.09 % (squared error) and 0.6 % (cross-entropy) at most."""
    x, labels = digits(32)
    y = F.one_hot(labels, 10).double() if loss == "mse" else labels
    loss_fn = F.mse_loss if loss == "mse" else F.cross_entropy
    model = wide_network()
    predictor = predictor_of(model, x, y, loss_fn, **sgd)
    limit = 2 * predictor.max_learning_rate() / stability_limit(**sgd)  # that of plain descent
    share = (0.2 if loss == "mse" else 0.03) * (1 - sgd.get("momentum", 0))
    lrs = [share * limit * (1 + 0.5 * (k % 2)) for k in range(100)]
    observed = train(model, x, y, loss_fn, lrs, **sgd)
    assert observed[-1] < 0.7 * observed[0]  # there is something to predict
    assert error(predictor.run(lrs), observed) < 0.02


def test_test_points_of_a_wide_network():
    x, labels = digits(32)
    others = digits(24, skip=32)
    model = wide_network()
    y, y_other = (F.one_hot(t, 10).double() for t in (labels, others[1]))
    test = (others[0], y_other)
    predictor = predictor_of(model, x, y, F.mse_loss, reduce="per_output", test=test)
    lrs = [0.2 * predictor.max_learning_rate()] * 100
    observed, observed_test = train(model, x, y, F.mse_loss, lrs, test=test)
    assert error(predictor.run(lrs), observed) < 0.02
    assert predictor.test_loss == pytest.approx(float(observed_test[-1]), rel=0.02)
    assert float(predictor.predict_test_loss(100, lrs[0])) == pytest.approx(predictor.test_loss)
    assert float(observed_test[-1]) < 0.9 * float(observed_test[0])


def random_kernel(*shape, rank=None):
    factor = torch.randn(*shape, rank or shape[-1]).double()
    return factor @ factor.mT


def test_every_form_of_one_kernel_agrees():
    n, c = 6, 3
    shared, f0, y = random_kernel(n), torch.randn(n, c).double(), torch.randint(c, (n,))
    eye = torch.eye(c).double()
    full = torch.einsum("nm,cd->ncmd", shared, eye)
    products = [KroneckerKernel(shared, 7 * eye), KroneckerKernel(shared, torch.zeros(c, c).double())]
    forms = [
        shared, shared.expand(c, n, n), full, full.reshape(n * c, n * c),
        DenseOperator(shared), DenseOperator(full.reshape(n * c, n * c)), *products,
    ]  # fmt: skip
    runs = []
    for kernel in forms:
        predictor = LossDecayPredictor(kernel, f0, y, F.cross_entropy, momentum=0.5)
        runs.append(predictor.run([0.02, 0.05, 0.1]))
        square = LossDecayPredictor(kernel, f0, torch.zeros(n, c), F.mse_loss)
        runs[-1] = torch.cat([runs[-1], square.predict([0, 3, 7], 0.1), square.predict([2.5], 0.1, flow=True)])
        assert square.modes.shares.sum() == pytest.approx(1.0)
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0])


@pytest.mark.parametrize("rank", [3, 1])
def test_a_kronecker_product_is_its_matrix(rank):
    n, c = 6, 3
    product = KroneckerKernel(random_kernel(n), random_kernel(c, rank=rank))
    matrix = torch.kron(product.samples, product.outputs)
    torch.testing.assert_close(product.to_dense(), matrix)
    assert product.trace() == pytest.approx(float(matrix.trace()))
    f0, y = torch.randn(n, c).double(), torch.randint(c, (n,))
    left, right = (LossDecayPredictor(k, f0, y, F.cross_entropy, momentum=0.5) for k in (product, matrix))
    assert left.speed == pytest.approx(right.speed)
    assert left.max_learning_rate() == pytest.approx(right.max_learning_rate())
    torch.testing.assert_close(left.fall_by_mode(), right.fall_by_mode())
    torch.testing.assert_close(left.run([0.02, 0.05, 0.1]), right.run([0.02, 0.05, 0.1]))
    left, right = (LossDecayPredictor(k, f0, torch.zeros(n, c), F.mse_loss) for k in (product, matrix))
    for options in ({"flow": True}, {}):
        torch.testing.assert_close(left.predict([0, 3, 7], 0.1, **options), right.predict([0, 3, 7], 0.1, **options))
    torch.testing.assert_close(left.predict_outputs([0, 3], 0.1), right.predict_outputs([0, 3], 0.1))
    torch.testing.assert_close(left.modes.rates, right.modes.rates)
    falls = left.modes.rates > 1e-9  # modes that never fall have any basis
    torch.testing.assert_close(left.modes.shares[falls], right.modes.shares[falls])


def test_outputs_that_differ_and_outputs_that_mix():
    n, c = 5, 2
    f0, y = torch.randn(n, c).double(), torch.randn(n, c).double()
    own = random_kernel(c, n)
    block = torch.zeros(n, c, n, c).double()
    for k in range(c):
        block[:, k, :, k] = own[k]
    mixed = random_kernel(n * c)
    pairs = [(own, block), (mixed.reshape(n, c, n, c), mixed)]
    for a, b in pairs:
        left, right = (LossDecayPredictor(k, f0, y, F.mse_loss) for k in (a, b))
        torch.testing.assert_close(left.run([0.1, 0.2]), right.run([0.1, 0.2]))
        torch.testing.assert_close(left.predict([1, 9], 0.1), right.predict([1, 9], 0.1))
        torch.testing.assert_close(left.modes.rates, right.modes.rates)
    slow = torch.einsum("ncmd,md->nc", mixed.reshape(n, c, n, c), 2 / (n * c) * (f0 - y))
    predictor = LossDecayPredictor(mixed, f0, y, F.mse_loss)
    predictor.step(0.1)
    torch.testing.assert_close(predictor.outputs, f0 - 0.1 * slow)


def test_operator_of_a_network():
    x, y = digits(8)
    model = wide_network(16).float()
    x = x.float()
    dense = LossDecayPredictor(empirical_ntk(model, x, reduce=None), model(x), y, F.cross_entropy)
    operator = LossDecayPredictor(EmpiricalNTK(model, x), model(x), y, F.cross_entropy)
    torch.testing.assert_close(dense.run([0.1] * 5), operator.run([0.1] * 5), rtol=1e-5, atol=0)  # float32 products
    assert operator.outputs.dtype == torch.float64


def test_speed_is_the_slope():
    predictor = LossDecayPredictor(random_kernel(6), torch.randn(6, 3), torch.randint(3, (6,)), F.cross_entropy)
    before, slope = predictor.loss, predictor.speed
    predictor.step(1e-7)
    assert (before - predictor.loss) / 1e-7 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_works_where_callbacks_run_it(grad):
    kernel, f0, y = random_kernel(4), torch.randn(4, 3), torch.randint(3, (4,))
    free = LossDecayPredictor(kernel, f0, y, F.cross_entropy)
    before = torch.get_rng_state()
    with grad():
        held = LossDecayPredictor(kernel.clone(), f0.clone(), y.clone(), F.cross_entropy)
        torch.testing.assert_close(held.run([0.1, 0.2]), free.run([0.1, 0.2]))
        assert not held.outputs.requires_grad
    held.step(0.1)
    assert torch.equal(before, torch.get_rng_state())


def test_shapes_and_losses_as_models_have_them():
    weights = torch.tensor([1.0, 2.0, 3.0])
    kernel, y = random_kernel(4), torch.randint(3, (4,))
    module = nn.CrossEntropyLoss(weight=weights)
    a = LossDecayPredictor(kernel, torch.zeros(4, 3), y, module).run([0.1])
    b = LossDecayPredictor(kernel, torch.zeros(4, 3), y, lambda f, t: F.cross_entropy(f, t, weights.double())).run(
        [0.1]
    )
    torch.testing.assert_close(a, b)
    assert module.weight.dtype == torch.float32  # the user's own is untouched
    closure = LossDecayPredictor(kernel, torch.zeros(4, 3), y, lambda f, t: F.cross_entropy(f, t, weights)).run([0.1])
    torch.testing.assert_close(closure, b, rtol=1e-6, atol=0)  # takes float32 only
    with pytest.raises(RuntimeError, match="shape"):
        LossDecayPredictor(kernel, torch.zeros(4, 3), y, lambda f, t: (f @ f).sum())
    one = LossDecayPredictor(kernel, torch.zeros(4), torch.ones(4), F.mse_loss)
    one.step(0.1)
    assert one.outputs.shape == (4,)
    images = LossDecayPredictor(kernel, torch.zeros(4, 2, 2), torch.ones(4, 2, 2), F.l1_loss)
    images.step(0.1)
    assert images.outputs.shape == (4, 2, 2)
    assert images.max_learning_rate() == float("inf")  # no curvature


def test_state_goes_on_where_it_was():
    def make():
        return LossDecayPredictor(kernel, f0, y, F.cross_entropy, momentum=0.9)

    kernel, f0, y = random_kernel(5), torch.randn(5, 3), torch.randint(3, (5,))
    whole, first, second = make(), make(), make()
    truth = whole.run([0.01] * 8)
    first.run([0.01] * 3)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.run([0.01] * 5), truth[3:], rtol=0, atol=0)
    assert second.steps == 8
    with pytest.raises(ValueError, match="batch"):
        second.load_state_dict(LossDecayPredictor(kernel, f0[:, :1], f0[:, :1], F.mse_loss).state_dict())


def test_refuses_what_it_cannot_read():
    f0, y, square = torch.zeros(4, 3), torch.zeros(4, 3), random_kernel(4)
    with pytest.raises(ValueError, match=r"shape \[5, 5\] does not fit outputs \[4, 3\]"):
        LossDecayPredictor(random_kernel(5), f0, y, F.mse_loss)
    with pytest.raises(ValueError, match="symmetric"):
        LossDecayPredictor(square.triu(), f0, y, F.mse_loss)
    with pytest.raises(ValueError, match="not finite"):
        LossDecayPredictor(square * torch.nan, f0, y, F.mse_loss)
    with pytest.raises(ValueError, match="one number"):
        LossDecayPredictor(square, f0, y, lambda f, t: (f - t) ** 2)
    with pytest.raises(ValueError, match="does not depend"):
        LossDecayPredictor(square, f0, y, lambda f, t: t.sum())
    with pytest.raises(TypeError, match="callable"):
        LossDecayPredictor(square, f0, y, "mse")
    with pytest.raises(ValueError, match="Nesterov"):
        LossDecayPredictor(square, f0, y, F.mse_loss, nesterov=True)
    with pytest.raises(ValueError, match="momentum must lie"):
        LossDecayPredictor(square, f0, y, F.mse_loss, momentum=1.0)
    with pytest.raises(ValueError, match="all of test_kernel"):
        LossDecayPredictor(square, f0, y, F.mse_loss, test_kernel=square)
    predictor = LossDecayPredictor(square, f0, y, F.mse_loss)
    with pytest.raises(ValueError, match="no test points"):
        _ = predictor.test_loss
    with pytest.raises(ValueError, match="lr must be"):
        predictor.step(-0.1)
    with pytest.raises(ValueError, match="squared error"):
        LossDecayPredictor(square, f0, torch.randint(3, (4,)), F.cross_entropy).predict(1, 0.1)
