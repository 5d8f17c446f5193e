r"""Generalisation of a kernel on new samples: the bound of Arora et al., and predictions by ridge regression.

Arora, Du, Hu, Li & Wang, *Fine-Grained Analysis of Optimization and Generalization for Overparameterized Two-Layer
Neural Networks* (ICML 2019), Theorem 5.1: a wide network trained on N samples with labels y = ±1 has, up to terms of
order :math:`\sqrt{\log(N/δ)/N}`, a population loss of at most

.. math:: \sqrt{2\, y^T Θ^{-1} y / N}

for every 1-Lipschitz loss with values in [0, 1] that vanishes at the label, for instance min(1, |f - y|), which is an
upper bound of the error rate. Pham et al. (arXiv:2602.06675) use the Graphon NTK as Θ.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon._shared.choices import BoundScale
from lightning_graphon.ntk.operators.spectrum import symmetric_matrix

_NULL_SHARE = 1e-20  # of ‖y‖² in null directions: the square of the eigenvectors' rounding
_MAX_RESIDUAL = 1e-3  # of ‖y‖: a worse solution of the linear system is rejected
_NEGATIVE = 1e-6  # of λ_max: more negative eigenvalues are not rounding


@dataclass(frozen=True)
class GeneralisationBound:
    """A bound on the test error, with the numbers that show whether to trust it.

    Attributes:
        value: Sum of `per_output`. For class numbers it bounds the error rate of the largest output: if that is wrong,
            at least one of the one-against-rest classifiers is.
        per_output: Bound of each output, float64 [C]: training loss + sqrt(2 · norm / N).
        norm: Squared norm yᵀΘ⁻¹y of the interpolating function, or of the ridge solution, float64 [C].
        training_loss: Mean of min(1, |f - y|) on the training samples, float64 [C]; 0 without a ridge.
        condition_number: Ratio (λ_max + ridge) / (λ_min + ridge); inf where the denominator is not positive.
        residual: Largest ‖(Θ + ridge) a - y‖ / ‖y‖ of the linear system over the outputs.
        ridge: The given ridge, in units of the kernel.
        scale: "trace" or "given".
        reason: Why `value` is inf; None where it is finite.
    """

    value: float
    per_output: Tensor
    norm: Tensor
    training_loss: Tensor
    condition_number: float
    residual: float
    ridge: float
    scale: str
    reason: str | None

    @property
    def vacuous(self) -> bool:
        """Whether the bound says nothing, as the loss is at most 1."""
        return not self.value < 1


@checked
def generalisation_bound(
    kernel: Tensor, targets: Tensor, *, ridge: float = 0.0, scale: BoundScale = "trace"
) -> GeneralisationBound:
    """Bound sqrt(2 yᵀ Θ⁻¹ y / N) on the population loss of the network that a kernel describes.

    The theorem is stated for kernels of mean diagonal 1/2 (unit inputs, two layers). For any other kernel the same
    argument, a ball of squared radius yᵀΘ⁻¹y in the kernel's space with Rademacher complexity at most
    sqrt(yᵀΘ⁻¹y · tr Θ) / N (Bartlett & Mendelson 2002), gives 2 sqrt(yᵀΘ⁻¹y · tr Θ) / N: the formula above for Θ
    scaled to mean diagonal 1/2. That is `scale="trace"`. The literal formula (`scale="given"`) depends on the scale of
    the kernel; for constant graphons it grows as density^(-layers / 2), though their kernel keeps its shape.

    With a positive `ridge` the function is ridge regression in place of interpolation: the norm is that of its
    solution, and its training loss is added.

    Args:
        kernel: Kernel [N, N] of all outputs, or [C, N, N] of each; decomposed in float64.
        targets: Class numbers [N], read by `one_vs_rest_targets`; or real targets [N] or [N, C].
        ridge: Number added to the diagonal, in the kernel's units, at least 0.
        scale: "trace" or "given".

    Returns:
        A `GeneralisationBound`. It is inf, with a reason, where targets have a part in directions of the kernel below
        rounding (λ + ridge <= N ε λ_max), where yᵀΘ⁻¹y may be infinite, and where the linear system is not solved.

    Raises:
        ValueError: Shapes; a kernel that is not finite, not symmetric, zero, or not positive semi-definite; a
            negative ridge.

    >>> bound = generalisation_bound(0.5 * torch.eye(8), torch.tensor([0, 1] * 4))
    >>> round(bound.value, 12), bound.vacuous  # sqrt(2 · 16 / 8): orthogonal samples promise nothing
    (2.0, True)
    """
    check_choice("scale", scale, get_args(BoundScale))
    _check_ridge(ridge)
    kernels, y = _kernels(kernel, targets)
    values, vectors = torch.linalg.eigh(kernels)
    _check_positive(values)
    coefficients = vectors.mT @ y.T[:, :, None]  # [C, N, 1]
    shifted = values + ridge
    # In directions below rounding a division by the eigenvalue would be meaningless.
    live = shifted > values.shape[-1] * torch.finfo(torch.float64).eps * values[:, -1:]
    solution = torch.where(live, coefficients[..., 0] / torch.where(live, shifted, 1.0), 0.0)
    norm = (values * solution.square()).sum(-1)
    # Without a ridge the function interpolates. `norm * total` is yᵀΘ⁻¹y · tr Θ, with tr Θ = N / 2 in the theorem.
    fitted = (vectors @ (values * solution)[..., None])[..., 0]
    loss = (fitted - y.T).abs().clamp_max(1).mean(-1) if ridge > 0 else torch.zeros_like(norm)
    total = kernels.diagonal(dim1=-2, dim2=-1).sum(-1) if scale == "trace" else torch.full_like(norm, len(y) / 2)
    per_output = loss + 2 * (norm * total).sqrt() / len(y)
    weights = vectors @ solution[..., None]
    residual = ((kernels @ weights + ridge * weights)[..., 0] - y.T).norm(dim=-1) / y.norm(dim=0).clamp_min(1e-300)
    share = (torch.where(live, 0.0, coefficients[..., 0]).square().sum(-1) / y.square().sum(0)).nan_to_num(0.0)
    reason = _reason(share, residual, int((~live).sum(-1).max()))
    per_output = torch.where((share > _NULL_SHARE) | (residual > _MAX_RESIDUAL), torch.inf, per_output)
    lowest, highest = float(shifted.min()), float((values[:, -1] + ridge).max())
    return GeneralisationBound(
        value=float(per_output.sum()), per_output=per_output, norm=norm, training_loss=loss,
        condition_number=highest / lowest if lowest > 0 else float("inf"), residual=float(residual.max()),
        ridge=float(ridge), scale=scale, reason=reason,
    )  # fmt: skip


@checked
def kernel_ridge_regression(kernel_train: Tensor, targets: Tensor, kernel_test: Tensor, ridge: float) -> Tensor:
    """Predictions Θ(test, train) (Θ + ridge)⁻¹ y of the trained network if its kernel does not change.

    Ridge 0 is gradient descent on the squared error until it converges, from outputs of 0.

    Args:
        kernel_train: Kernel [N, N] of all outputs, or [C, N, N] of each.
        targets: Class numbers [N], read by `one_vs_rest_targets`; or real targets [N] or [N, C].
        kernel_test: Kernel [M, N] or [C, M, N], test points in rows.
        ridge: Number added to the diagonal, at least 0; the `alpha` of scikit-learn's KernelRidge.

    Returns:
        Predictions [M] for real targets [N], else [M, C], float64. The class is the largest output, or the sign of a
        single one.

    Raises:
        ValueError: Shapes; a kernel that is not finite or not symmetric; or a system that is singular to working
            precision (the message has its eigenvalues).

    >>> K = torch.eye(2)
    >>> kernel_ridge_regression(K, torch.tensor([1.0, -1.0]), K, ridge=1.0)
    tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    _check_ridge(ridge)
    kernels, y = _kernels(kernel_train, targets)
    test = kernel_test.detach().to(kernels)
    test = test[None] if test.ndim == 2 else test
    if test.ndim != 3 or test.shape[2] != len(y) or test.shape[0] not in (1, y.shape[1]):
        raise ValueError(
            f"kernel_test must be [M, {len(y)}] or [{y.shape[1]}, M, {len(y)}], test points in rows, got "
            f"{tuple(kernel_test.shape)}"
        )
    if not bool(test.isfinite().all()):
        raise ValueError("kernel_test has entries that are not finite; look for NaN or overflow in the model")
    system = kernels + ridge * torch.eye(len(y), dtype=kernels.dtype, device=kernels.device)
    # No error is raised by the _ex variant, so the message can name the eigenvalues.
    factor, failed = torch.linalg.cholesky_ex(system)
    columns = y.T[:, :, None] if len(kernels) > 1 else y[None]
    solution = torch.cholesky_solve(columns, factor)
    worst = float((system @ solution - columns).norm() / columns.norm().clamp_min(1e-300))
    if bool(failed.any()) or not worst <= _MAX_RESIDUAL:
        raise ValueError(_singular(system, ridge, worst))
    out = test @ solution
    predicted = out[..., 0].T if len(kernels) > 1 else out[0]
    return predicted[:, 0] if targets.ndim == 1 and targets.is_floating_point() else predicted


@checked
def one_vs_rest_targets(labels: Tensor) -> Tensor:
    """±1 targets of class numbers: one column for two classes, +1 for the larger number; else one for each class.

    Args:
        labels: Class numbers [N], any integers; columns are in their ascending order.

    Returns:
        Targets [N, 1] or [N, C], +1 for the class of the column and -1 for the rest, float64.

    Raises:
        ValueError: Labels that are not [N] whole numbers, or of one class only.

    >>> one_vs_rest_targets(torch.tensor([3, 8, 3]))[:, 0]
    tensor([-1.,  1., -1.], dtype=torch.float64)
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"class numbers must be whole numbers [N], got {tuple(labels.shape)} of {labels.dtype}")
    classes, index = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError("two classes are needed at least; all labels are the same")
    if len(classes) == 2:
        return 2 * index[:, None].to(torch.float64) - 1
    return 2 * torch.nn.functional.one_hot(index).to(torch.float64) - 1


# ---- checks


def _check_ridge(ridge: float) -> None:
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge must be a finite number >= 0, got {ridge!r}")


def _kernels(kernel: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels [1 or C, N, N] and targets [N, C], float64."""
    if kernel.ndim not in (2, 3):
        raise ValueError(f"a kernel must be [N, N], or [C, N, N] for one per output, got {tuple(kernel.shape)}")
    kernels = torch.stack([symmetric_matrix(k) for k in (kernel[None] if kernel.ndim == 2 else kernel)])
    if targets.is_floating_point():
        y = targets.detach().to(kernels).reshape(len(targets), -1)
        if not bool(y.isfinite().all()):
            raise ValueError("targets must be finite")
    else:
        y = one_vs_rest_targets(targets).to(kernels)
    if y.shape[0] != kernels.shape[1] or len(kernels) not in (1, y.shape[1]):
        raise ValueError(
            f"a kernel of shape {tuple(kernel.shape)} does not fit {y.shape[0]} samples with {y.shape[1]} outputs"
        )
    return kernels, y


def _check_positive(values: Tensor) -> None:
    low, high = float(values.min()), float(values.max())
    if high <= 0:
        raise ValueError("the kernel is zero or negative: no signal passes through the network, nothing is learned")
    if low < -_NEGATIVE * high:
        raise ValueError(
            f"the kernel has the eigenvalue {low:.3g} with λ_max = {high:.3g}: it is not positive semi-definite to "
            "working precision; compute it in float64"
        )


def _reason(share: Tensor, residual: Tensor, null: int) -> str | None:
    if bool((share > _NULL_SHARE).any()):
        return (
            f"{null} directions of the kernel are below rounding and hold {float(share.max()):.3g} of the targets' "
            "square: yᵀΘ⁻¹y cannot be told from infinity. A ridge gives a finite bound on ridge regression"
        )
    if bool((residual > _MAX_RESIDUAL).any()):
        return f"the linear system is solved to {float(residual.max()):.3g} of the targets only; add a ridge"
    return None


def _singular(system: Tensor, ridge: float, residual: float) -> str:
    values = torch.linalg.eigvalsh(system)
    low, high = float(values.min()), float(values.max())
    return (
        f"Θ + ridge with ridge = {ridge:g} is singular to working precision: eigenvalues from {low:.3g} to {high:.3g}, "
        f"residual {residual:.3g}; raise the ridge (a share of the mean diagonal, say), or use float64 kernels"
    )
