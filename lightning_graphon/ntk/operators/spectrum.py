r"""Spectral summary of a kernel: the four metrics of Pham et al. (arXiv:2510.17515), section 6 and Appendix D.

With eigenvalues λ₁ >= λ₂ >= ...: decay rate α of the fit λ_k ∝ k^(-α) on log axes, effective rank Σλ/λ₁,
spectral gap λ₁/λ₂, energy concentration Σ_{i<=5} λ_i / Σλ.
"""

import warnings
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.ntk.operators.operator import KernelOperator, top_eigenpairs
from lightning_graphon.ntk.operators.output_kernel import symmetrised

_NEGATIVE = 1e-6  # relative to λ_max: more negative eigenvalues are not rounding
_DENSE = 2048  # operators up to this size become matrices and are decomposed exactly


@dataclass(frozen=True)
class SpectralSummary:
    """Numbers that describe a kernel's spectrum; plain floats except the eigenvalues.

    Attributes:
        eigenvalues: Float64, descending; all N, or the largest `k` where the kernel was a large operator.
        decay_rate: α of λ_k ∝ k^(-α), least squares on log axes over the eigenvalues above rounding; 0 with
            fewer than two.
        decay_offset: Intercept of that fit, log λ at k = 1.
        effective_rank: Trace / λ_max; 0 for the zero kernel.
        spectral_gap: λ₁/λ₂; inf where λ₂ <= 0 < λ₁, 1 where there is no second eigenvalue or all are zero.
        energy_concentration: Share of the five largest eigenvalues in the trace; 0 for the zero kernel.
        trace: Sum of all eigenvalues.
        condition_number: λ_max/λ_min; inf where λ_min <= 0; None where λ_min is not known.
        lambda_max: Largest eigenvalue.
        lambda_min: Smallest, negative if it is; None where only the largest were computed.
        alignment: Kernel-target alignment in [-1, 1], or None without labels.
    """

    eigenvalues: Tensor = field(repr=False)
    decay_rate: float
    decay_offset: float
    effective_rank: float
    spectral_gap: float
    energy_concentration: float
    trace: float
    condition_number: float | None
    lambda_max: float
    lambda_min: float | None
    alignment: float | None

    def scalars(self) -> dict[str, float]:
        """The numbers that are known, by name, without the eigenvalues."""
        return {k: v for k, v in asdict(self).items() if k != "eigenvalues" and v is not None}


@checked
def spectral_summary(kernel: Tensor | KernelOperator, labels: Tensor | None = None, *, k: int = 64) -> SpectralSummary:
    """Eigenvalues of a symmetric kernel and the metrics of [P1].

    Args:
        kernel: [N, N], or [N, C, N, C] (read as N·C by N·C), floating point; or a `KernelOperator`.
            Decomposed in float64.
        labels: Class numbers [N] or targets [N, C], for the alignment ⟨K, YYᵀ⟩/(‖K‖ ‖YYᵀ‖) (Cristianini et
            al. 2001); class numbers become one-hot rows. Needs a kernel over the N samples.
        k: Number of eigenvalues of an operator larger than 2048.

    Returns:
        A `SpectralSummary`; every number is finite except ratios over a zero eigenvalue, which are inf.

    Raises:
        ValueError: The kernel is not square, not finite, or not symmetric; or labels do not fit.

    Warns:
        UserWarning: The kernel is not positive semi-definite, λ_min < -1e-6 λ_max. Nothing is clipped.

    >>> summary = spectral_summary(torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])))
    >>> summary.effective_rank, summary.spectral_gap, summary.trace, summary.condition_number
    (2.0, 2.0, 8.0, 4.0)
    """
    # Beyond that the largest eigenvalues and the exact trace must do; λ_min stays unknown.
    if isinstance(kernel, KernelOperator) and kernel.shape[0] > _DENSE:
        if labels is not None:
            raise ValueError("alignment needs the kernel as a matrix; pass empirical_ntk(...) instead of an operator")
        return _summarise(top_eigenpairs(kernel, k)[0], kernel.trace(), None, None)
    matrix = symmetric_matrix(kernel.to_dense() if isinstance(kernel, KernelOperator) else kernel)
    values = torch.linalg.eigvalsh(matrix).flip(0)
    alignment = None if labels is None else kernel_target_alignment(matrix, labels)
    return _summarise(values, float(values.sum()), float(values[-1]), alignment)


@checked
def kernel_target_alignment(kernel: Tensor, labels: Tensor, *, centred: bool = False) -> float:
    """⟨K, YYᵀ⟩ / (‖K‖ ‖YYᵀ‖), 0 for a zero kernel or zero targets.

    Args:
        kernel: Kernel [N, N].
        labels: Class numbers [N] (integers) or targets [N, C] (floating point).
        centred: Subtract the mean feature and the mean target first, K → HKH with H = I - 11ᵀ/N (Cortes, Mohri
            & Rostamizadeh 2012). This leaves out the constant function, which every kernel of positive inputs learns
            first.

    Returns:
        A number in [-1, 1]; at least 0 for positive semi-definite kernels.

    Raises:
        ValueError: The number of labels is not that of the samples.

    >>> round(kernel_target_alignment(torch.eye(2), torch.tensor([0, 1])), 6)
    1.0
    """
    return float(alignment(kernel.detach(), labels, centred=centred))


def alignment(kernel: Tensor, labels: Tensor, *, centred: bool = False) -> Tensor:
    """`kernel_target_alignment` as a float64 tensor that autograd follows."""
    if len(labels) != len(kernel):
        raise ValueError(f"{len(labels)} labels for a kernel of {len(kernel)} samples; give one per sample")
    targets = labels if labels.ndim == 2 else labels[:, None]
    if not labels.is_floating_point() and labels.ndim == 1:
        targets = torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1])
    Y = targets.to(dtype=torch.float64, device=kernel.device)
    K = kernel.to(torch.float64)
    if centred:
        Y = Y - Y.mean(0)
        K = K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()
    scale = K.norm() * (Y.T @ Y).norm()
    return (Y * (K @ Y)).sum() / scale if float(scale.detach()) > 0 else torch.zeros_like(scale)


def energy_share(kernel: Tensor, count: int = 5) -> Tensor:
    """Share of the `count` largest eigenvalues of a symmetric [N, N] in its trace, as a differentiable tensor."""
    K = kernel.to(torch.float64)
    return torch.linalg.eigvalsh(K)[-count:].sum() / K.trace()


def symmetric_matrix(kernel: Tensor) -> Tensor:
    """A kernel as a float64 matrix, checked to be square, finite and symmetric."""
    if kernel.ndim == 4:
        kernel = kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or len(kernel) == 0:
        raise ValueError(f"a kernel must be [N, N] or [N, C, N, C] with N > 0, got {tuple(kernel.shape)}")
    matrix = kernel.detach().to(torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the kernel has entries that are not finite; look for NaN or overflow in the model")
    return symmetrised(matrix)


def _summarise(values: Tensor, trace: float, lowest: float | None, alignment: float | None) -> SpectralSummary:
    top = float(values[0])
    if lowest is not None and lowest < -_NEGATIVE * abs(top):
        warnings.warn(
            f"the kernel's smallest eigenvalue is {lowest:.3g} with λ_max = {top:.3g}: it is not positive "
            "semi-definite to working precision; compute it in float64",
            stacklevel=4,
        )
    rate, offset = _decay(values)
    return SpectralSummary(
        eigenvalues=values, decay_rate=rate, decay_offset=offset,
        effective_rank=trace / top if top > 0 else 0.0,
        spectral_gap=_ratio(top, float(values[1])) if len(values) > 1 else 1.0,
        energy_concentration=float(values[:5].sum()) / trace if trace > 0 else 0.0,
        trace=trace, condition_number=None if lowest is None else _ratio(top, lowest),
        lambda_max=top, lambda_min=lowest, alignment=alignment,
    )  # fmt: skip


def _ratio(top: float, other: float) -> float:
    """top / other; inf over a number that is not positive, 1 where both are zero."""
    if top <= 0 and other <= 0:
        return 1.0
    return top / other if other > 0 else float("inf")


def _decay(values: Tensor) -> tuple[float, float]:
    """Decay rate and intercept of log λ_k against log k, without eigenvalues below rounding."""
    # LAPACK's error of an eigenvalue is about n ε λ_max; a fit to logarithms would follow the noise.
    floor = max(0.0, float(values[0])) * len(values) * torch.finfo(torch.float64).eps
    index = (values > floor).nonzero()[:, 0]
    if len(index) < 2:
        return 0.0, float(values[0].log()) if len(index) else 0.0
    logs, places = values[index].log(), torch.log(index.to(torch.float64) + 1)
    centred = places - places.mean()
    slope = float((centred * logs).sum() / centred.square().sum())
    return -slope, float(logs.mean()) - slope * float(places.mean())
