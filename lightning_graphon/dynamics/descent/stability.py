r"""Largest stable learning rate of gradient descent in function space.

Around the current outputs the error follows :math:`δ_{k+1} = (1 - ηΘH)δ_k`, H the Hessian of the loss in the
outputs. :math:`ΘH` has the eigenvalues of :math:`Θ^{1/2} H Θ^{1/2}`, real for symmetric H; descent is stable
while :math:`ηλ_{max} < 2`, with SGD's momentum μ while :math:`ηλ_{max} < 2(1+μ)/(1-d)` (dampening d), with
Nesterov's while :math:`ηλ_{max} < 2(1+μ)/(1+2μ)` (Jury's criterion on the two-step recurrence).
"""

import math
from collections.abc import Callable

import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.ntk.operators.output_kernel import OutputKernel


@checked
def stability_limit(momentum: float = 0.0, nesterov: bool = False, dampening: float = 0.0) -> float:
    """Largest stable η·λ of `torch.optim.SGD` on a quadratic with curvature λ.

    Args:
        momentum: μ in [0, 1).
        nesterov: as in SGD.
        dampening: d in [0, 1); acts with momentum only.

    >>> stability_limit(), stability_limit(0.9), round(stability_limit(0.9, nesterov=True), 4)
    (2.0, 3.8, 1.3571)
    """
    if momentum == 0:
        return 2.0
    if nesterov:
        return 2 * (1 + momentum) / (1 + 2 * momentum)
    return 2 * (1 + momentum) / (1 - dampening) if dampening < 1 else math.inf


def check_sgd(momentum: float, nesterov: bool = False, dampening: float = 0.0) -> None:
    """Refuse options that `torch.optim.SGD` refuses or with which descent cannot converge.

    Raises:
        ValueError: momentum out of [0, 1), or Nesterov without momentum or with dampening.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError("Nesterov needs momentum and no dampening, as in torch.optim.SGD")


def largest_curvature(
    kernel: OutputKernel, hessian: Callable[[Tensor], Tensor], like: Tensor, *,
    tolerance: float = 1e-10, max_products: int = 200,
) -> float:  # fmt: skip
    """λ_max of ΘH by Lanczos in the inner product ⟨u, v⟩ = uᵀΘv, in which HΘ is symmetric.

    Args:
        kernel: Θ over the outputs, positive semi-definite.
        hessian: v ↦ H v on fields [N, C].
        like: a field, for shape and device.
        tolerance: relative change of λ_max at which to stop.
        max_products: most products with Θ and H.

    Returns:
        A lower bound that has converged to `tolerance`; 0 for a zero kernel.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    p = kernel @ w
    basis: list[Tensor] = []
    images: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    top, calm = 0.0, 0
    square = float((w * p).sum())
    for _ in range(min(max_products, like.numel())):
        if square <= 1e-24 * top * top or square <= 0:
            break  # the space is exhausted
        norm = math.sqrt(square)
        if basis:
            beside.append(norm)
        basis.append(w.flatten() / norm)
        images.append(p.flatten() / norm)
        w = hessian(images[-1].reshape(like.shape))
        diagonal.append(float(w.flatten() @ images[-1]))
        before, top = top, float(eigvalsh_tridiagonal(diagonal, beside)[-1])
        calm = calm + 1 if abs(top - before) <= tolerance * abs(top) else 0
        if calm == 2:
            break
        Q, P, flat = torch.stack(basis), torch.stack(images), w.flatten()
        for _ in range(2):  # to the basis; twice is enough (Kahan and Parlett)
            flat = flat - Q.T @ (P @ flat)
        w = flat.reshape(like.shape)
        p = kernel @ w
        square = float((w * p).sum())
    return max(top, 0.0)
