r"""How far networks that differ at initialisation still differ at test points after training.

A network's test outputs are affine in its initial outputs, f_test(t) = f_test(0) + G(t) (y - f(0)) with
G = Θ_test V diag((1 - e^{-cλt}) / λ) Vᵀ. So a covariance K = R Rᵀ of initial outputs becomes

.. math:: K_t = W W^T, \qquad W = R_{test} - G(t) R_{train}

(Lee et al. 2019, eq. 16, multiplied out there). Written as a product it is positive semi-definite whatever is rounded.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_graphon.ntk.operators.output_kernel import Eigen, OutputKernel, symmetrised

_NEGATIVE = 1e-6  # of λ_max: more negative than this is no rounding


def initial_root(covariance: Tensor, train: int, test: int, outputs: int) -> Tensor:
    """R [B, N + M, N + M] with R Rᵀ the covariance, B = 1 where all outputs have the same.

    Args:
        covariance: [N + M, N + M], train points first, or [C, N + M, N + M].
        train: Number N of train points.
        test: Number M of test points.
        outputs: Number C of outputs.

    Raises:
        ValueError: It does not fit, is not finite, not symmetric, or not positive semi-definite.
    """
    n, name = train + test, "the initial covariance"
    if covariance.shape not in ((n, n), (outputs, n, n)):
        raise ValueError(
            f"{name} must be [{n}, {n}], {train} train points before {test} test points, or [{outputs}, {n}, {n}] for "
            f"one per output, got {list(covariance.shape)}"
        )
    if not bool(covariance.isfinite().all()):
        raise ValueError(f"{name} has entries that are not finite; look for NaN or overflow in the model")
    values, vectors = torch.linalg.eigh(symmetrised(_blocks(covariance)))
    check_positive(values, name)
    return vectors * values.clamp_min(0).sqrt()[..., None, :]


def check_positive(values: Tensor, name: str) -> None:
    """Refuse eigenvalues [..., n], ascending, that are negative by more than rounding.

    Raises:
        ValueError: The message has the eigenvalues.
    """
    low, high = float(values.min()), float(values.max())
    if low < -_NEGATIVE * abs(high):
        raise ValueError(
            f"{name} must be positive semi-definite, but its eigenvalues run from {low:.3g} to {high:.3g}; are all of "
            "its blocks of the same kernel, in float64, with the train points first?"
        )


def test_deviations(eigen: Eigen, gains: Tensor, test_kernel: OutputKernel, root: Tensor) -> Iterator[Tensor]:
    """W [B, M, *] of each time, so that W Wᵀ is the covariance of the test outputs.

    Args:
        eigen: Of the train points' kernel, with clean eigenvalues.
        gains: Factors from each mode's initial residual to its push [T, K, *].
        test_kernel: Between M test points and the N train points, a matrix.
        root: R [B, N + M, *] of the initial outputs, train points first; B is 1 or the number of outputs.

    Yields:
        B is 1 where outputs do not differ, or the number of outputs; for a full kernel 1, with M·C rows. Infinite where
        descent has diverged.

    Raises:
        ValueError: The kernels are of different forms.
    """
    if test_kernel.form != eigen.form or eigen.form == "kronecker":
        raise ValueError(
            f"a variance needs matrices of one form, got a {eigen.form} kernel and a {test_kernel.form} test kernel; "
            "give both as [N, N] and [M, N], or write a KroneckerKernel out with to_dense()"
        )
    assert isinstance(test_kernel.kernel, Tensor)  # noqa: S101
    if eigen.form == "full":
        root = _for_all_outputs(root, test_kernel.outputs)
    vectors, rows = _blocks(eigen.vectors), _blocks(test_kernel.kernel)
    train = vectors.shape[-1]
    read, inner = rows @ vectors, vectors.mT @ root[:, :train]
    for gain in gains:
        deviations = root[:, train:] - read @ (gain.T[:, :, None] * inner)
        yield deviations if bool(gain.isfinite().all()) else torch.full_like(deviations, torch.inf)


def _blocks(matrix: Tensor) -> Tensor:
    return matrix if matrix.ndim == 3 else matrix[None]


def _for_all_outputs(root: Tensor, outputs: int) -> Tensor:
    """R [1, n·C, *] over points and outputs, sample-major, of independent outputs."""
    eye = torch.eye(outputs, dtype=root.dtype, device=root.device)
    both = torch.einsum("cnr,cd->ncrd", root.expand(outputs, -1, -1), eye)
    return both.flatten(2).flatten(0, 1)[None]
