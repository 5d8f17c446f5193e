"""The bound against numpy and exact inverses, ridge regression against scikit-learn and against gradient descent."""

import numpy as np
import pytest
import torch
from scipy.linalg import hilbert, invhilbert

from lightning_graphon.graphon import constant
from lightning_graphon.ntk import (
    generalisation_bound,
    graphon_ntk,
    kernel_ridge_regression,
    one_vs_rest_targets,
)
from tests.helpers.ntk_oracles import digits

N = 48
LABELS = torch.arange(N) * 7 % 10


@pytest.fixture(scope="module")
def kernel():
    return graphon_ntk(digits(N), [constant(0.3)] * 3)


def by_eigenvectors(K, y, ridge=0.0):
    """Squared norm of the ridge solution and its training outputs, numpy."""
    values, vectors = np.linalg.eigh(K.numpy())
    c = vectors.T @ y.numpy()
    return float((values * (c / (values + ridge)) ** 2).sum()), vectors @ (values / (values + ridge) * c)


def test_two_classes_against_numpy(kernel):
    labels = LABELS % 2
    y = 2.0 * labels.double() - 1
    norm = float(y.numpy() @ np.linalg.solve(kernel.numpy(), y.numpy()))
    literal = generalisation_bound(kernel, labels, scale="given")
    assert literal.value == pytest.approx((2 * norm / N) ** 0.5, rel=1e-8)  # the condition number is 1e4
    scaled = kernel * (N / 2) / kernel.trace()  # mean diagonal 1/2, as in the theorem
    norm = float(y.numpy() @ np.linalg.solve(scaled.numpy(), y.numpy()))
    bound = generalisation_bound(kernel, labels)
    assert bound.value == pytest.approx((2 * norm / N) ** 0.5, rel=1e-8)
    assert bound.reason is None
    assert bound.residual < 1e-10
    assert bound.condition_number == pytest.approx(np.linalg.cond(kernel.numpy()), rel=1e-8)


def test_ten_classes_are_ten_times_one_against_the_rest(kernel):
    bound = generalisation_bound(kernel, LABELS)
    single = [generalisation_bound(kernel, (c == LABELS).long()).value for c in range(10)]
    torch.testing.assert_close(bound.per_output, torch.tensor(single, dtype=torch.float64))
    assert bound.value == pytest.approx(sum(single))


def test_one_kernel_an_output(kernel):
    kernels = torch.stack([kernel * (1 + c) + c * torch.eye(N) for c in range(10)])
    bound = generalisation_bound(kernels, LABELS)
    single = [generalisation_bound(K, (c == LABELS).long()).value for c, K in enumerate(kernels)]
    torch.testing.assert_close(bound.per_output, torch.tensor(single, dtype=torch.float64))


def test_the_default_does_not_see_the_scale_of_the_kernel_and_the_literal_formula_does(kernel):
    for scale, factor in (("trace", 1.0), ("given", 0.1)):
        one, hundred = (generalisation_bound(k * kernel, LABELS % 2, scale=scale).value for k in (1, 100))
        assert hundred == pytest.approx(factor * one, rel=1e-9)


def test_a_ridge_gives_the_norm_and_the_training_loss_of_ridge_regression(kernel):
    y = 2.0 * (LABELS % 2).double() - 1
    norm, fitted = by_eigenvectors(kernel, y, ridge=0.05)
    bound = generalisation_bound(kernel, LABELS % 2, ridge=0.05)
    loss = np.minimum(1, np.abs(fitted - y.numpy())).mean()
    assert float(bound.norm) == pytest.approx(norm, rel=1e-9)
    assert float(bound.training_loss) == pytest.approx(loss, rel=1e-9)
    assert bound.value == pytest.approx(loss + 2 * (norm * float(kernel.trace())) ** 0.5 / N, rel=1e-9)
    torch.testing.assert_close(
        kernel_ridge_regression(kernel, y, kernel, 0.05), torch.tensor(fitted, dtype=torch.float64)
    )


def test_near_singular_against_the_exact_inverse():
    """Hilbert matrices have integer inverses. At n = 8 the condition number is 1.5e10, so eps of it is left."""
    y = torch.tensor([1.0, -1.0] * 4).double()
    exact = float(y.numpy() @ invhilbert(8, exact=True).astype(object) @ y.numpy())
    bound = generalisation_bound(torch.tensor(hilbert(8)), y, scale="given")
    assert float(bound.norm) == pytest.approx(exact, rel=1e-4)
    assert bound.condition_number == pytest.approx(1.5e10, rel=0.05)
    assert bound.reason is None


def test_beyond_rounding_it_is_inf_with_the_reason():
    y = torch.tensor([1.0, -1.0] * 10).double()
    bound = generalisation_bound(torch.tensor(hilbert(20)), y)
    assert bound.value == float("inf")
    assert bound.vacuous
    assert "directions of the kernel are below rounding" in bound.reason
    assert np.isfinite(generalisation_bound(torch.tensor(hilbert(20)), y, ridge=1e-6).value)


def test_a_singular_kernel_is_no_harm_where_the_targets_are_in_its_range():
    features = torch.randn(20, 3, dtype=torch.float64)
    w = torch.tensor([1.0, -2.0, 0.5]).double()
    bound = generalisation_bound(features @ features.T, features @ w, scale="given")
    assert bound.reason is None
    assert bound.value == pytest.approx((2 * float(w @ w) / 20) ** 0.5, rel=1e-9)  # minimal norm is w itself
    duplicated = torch.cat([features, features[:1]])
    opposed = torch.cat([features @ w, -(features @ w)[:1]])  # one sample, two labels
    assert generalisation_bound(duplicated @ duplicated.T, opposed).value == float("inf")


@pytest.mark.parametrize(
    ("kernel", "targets", "message"),
    [
        (torch.diag(torch.tensor([1.0, -0.5])), torch.tensor([0, 1]), "not positive semi-definite"),
        (torch.zeros(2, 2), torch.tensor([0, 1]), "zero or negative"),
        (torch.tensor([[1.0, 0.3], [0.0, 1.0]]), torch.tensor([0, 1]), "symmetric"),
        (torch.eye(2) / 0, torch.tensor([0, 1]), "not finite"),
        (torch.eye(3), torch.tensor([0, 1]), "does not fit 2 samples"),
        (torch.eye(2), torch.tensor([1, 1]), "two classes are needed"),
        (torch.eye(2), torch.tensor([1.0, float("nan")]), "targets must be finite"),
        (torch.ones(2), torch.tensor([0, 1]), r"\[N, N\]"),
    ],
)
def test_what_is_refused(kernel, targets, message):
    for function in (
        lambda: generalisation_bound(kernel, targets),
        lambda: kernel_ridge_regression(kernel, targets, kernel, 0.0),
    ):
        # What is not positive definite is singular for the solver.
        with pytest.raises(ValueError, match=f"{message}|singular to working precision"):
            function()


def test_options_that_are_refused(kernel):
    with pytest.raises(ValueError, match="ridge must be a finite number >= 0, got -1"):
        generalisation_bound(kernel, LABELS, ridge=-1)
    with pytest.raises(ValueError, match="'trace', 'given'"):
        generalisation_bound(kernel, LABELS, scale="trac")
    with pytest.raises(ValueError, match="test points in rows"):
        kernel_ridge_regression(kernel, LABELS, kernel[:, :5], 0.1)


def test_ridge_regression_against_scikit_learn(kernel):
    ridge_module = pytest.importorskip("sklearn.kernel_ridge")
    train, test = slice(0, 30), slice(30, N)
    y = one_vs_rest_targets(LABELS[train])
    for targets, columns in ((LABELS[train], y), (y[:, 0], y[:, 0])):
        oracle = ridge_module.KernelRidge(alpha=0.02, kernel="precomputed").fit(kernel[train, train], columns)
        found = kernel_ridge_regression(kernel[train, train], targets, kernel[test, train], 0.02)
        torch.testing.assert_close(found, torch.tensor(oracle.predict(kernel[test, train].numpy())))


def test_ridge_regression_with_one_kernel_an_output(kernel):
    kernels = torch.stack([kernel * (1 + c) + c * torch.eye(N) for c in range(10)])
    found = kernel_ridge_regression(kernels, LABELS, kernels[:, :4], 0.1)
    y = one_vs_rest_targets(LABELS)
    for c in range(10):
        expected = kernel_ridge_regression(kernels[c], y[:, c], kernels[c, :4], 0.1)
        torch.testing.assert_close(found[:, c], expected)


def test_without_a_ridge_it_is_where_gradient_descent_ends(kernel):
    """2000 steps at 1/λ_max on a kernel of condition number 100: exp(-20) of the slowest mode is left."""
    train, test = slice(0, 30), slice(30, N)
    K = kernel[train, train]
    K = K + 0.01 * torch.linalg.eigvalsh(K)[-1] * torch.eye(30)
    y = one_vs_rest_targets(LABELS[train] % 2)[:, 0]
    a, step = torch.zeros_like(y), 1 / torch.linalg.eigvalsh(K)[-1]
    for _ in range(2000):
        a = a - step * (K @ a - y)
    predicted = kernel_ridge_regression(K, y, kernel[test, train], 0.0)
    torch.testing.assert_close(predicted, kernel[test, train] @ a, rtol=1e-6, atol=1e-7)  # exp(-20) = 2e-9 of ‖a‖


def test_a_singular_system_is_refused_with_its_eigenvalues():
    K = torch.tensor(hilbert(20))
    with pytest.raises(ValueError, match="ridge = 0 is singular to working precision: eigenvalues from"):
        kernel_ridge_regression(K, torch.arange(20) % 2, K, 0.0)
    assert bool(kernel_ridge_regression(K, torch.arange(20) % 2, K, 1e-3).isfinite().all())


def test_signed_targets():
    assert one_vs_rest_targets(torch.tensor([5, 2, 9])).tolist() == [[-1, 1, -1], [1, -1, -1], [-1, -1, 1]]
    assert one_vs_rest_targets(torch.tensor([True, False])).tolist() == [[1], [-1]]
    with pytest.raises(ValueError, match="whole numbers"):
        one_vs_rest_targets(torch.tensor([0.0, 1.0]))


def test_no_graph_is_kept_and_nothing_changes(kernel):
    K = kernel.clone().requires_grad_()
    assert not generalisation_bound(K, LABELS).per_output.requires_grad
    assert not kernel_ridge_regression(K, LABELS, K, 0.1).requires_grad
    assert torch.equal(K, kernel)


def test_a_small_part_in_a_direction_without_kernel_is_enough():
    """Such a part is too small for the residual to show and still costs an infinite norm."""
    y = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    bound = generalisation_bound(torch.diag(torch.tensor([1.0, 0.0])), y)
    assert bound.residual < 1e-3
    assert bound.value == float("inf")
    assert "hold 1e-08 of the targets' square" in bound.reason
