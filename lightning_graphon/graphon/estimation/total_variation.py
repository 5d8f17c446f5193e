"""Total-variation denoising of the cells of a step graphon."""

import torch
from torch import Tensor


def total_variation(
    values: Tensor, row_measure: Tensor, col_measure: Tensor, weight: float, iterations: int = 300
) -> Tensor:
    """Minimise ½ Σ m_ij (x_ij − h_ij)² / m̄ + weight · TV(x), the isotropic total variation of the grid.

    The model of Rudin, Osher and Fatemi (1992), solved by a fixed number of accelerated projected gradient steps on
    the dual (Beck and Teboulle, IEEE TIP 2009).

    The values h [rows, cols] lie in [0, 1], m_ij is the product of the measures of row and column and m̄ its mean. The
    result lies in [0, 1] and has the mean of h.
    """
    mass = row_measure[:, None] * col_measure
    mass = mass / mass.mean()
    # The dual's gradient is Lipschitz with 8 · weight / min m, as ‖div‖² ≤ 8 on a grid.
    step = float(mass.min()) / (8 * weight) if weight > 0 else 0.0
    dual = momentum = values.new_zeros(2, *values.shape)
    t = 1.0
    for _ in range(iterations if weight > 0 else 0):
        ascent = momentum + step * _gradient(_primal(values, momentum, weight, mass))
        new = ascent / ascent.norm(dim=0).clamp_min(1.0)
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        momentum = new + ((t - 1) / t_new) * (new - dual)
        dual, t = new, t_new
    return _into_unit_interval(_primal(values, dual, weight, mass), row_measure, col_measure)


def _primal(values: Tensor, dual: Tensor, weight: float, mass: Tensor) -> Tensor:
    # The divergence of the dual field sums to zero, so every iterate keeps the mean Σ m_ij x_ij.
    return values + weight * _divergence(dual) / mass


def _gradient(x: Tensor) -> Tensor:
    return torch.stack([x.diff(dim=0, append=x[-1:]), x.diff(dim=1, append=x[:, -1:])])


def _divergence(dual: Tensor) -> Tensor:
    """Negative adjoint of `_gradient`, of fields that are 0 in its last row and column."""
    zero = torch.zeros_like(dual[0])
    return dual[0].diff(dim=0, prepend=zero[:1]) + dual[1].diff(dim=1, prepend=zero[:, :1])


def _into_unit_interval(x: Tensor, row_measure: Tensor, col_measure: Tensor) -> Tensor:
    """Shrink towards the mean until all values lie in [0, 1]; a no-op at convergence (maximum principle)."""
    mean = (row_measure @ x @ col_measure).clamp(0, 1)
    above, below = (x.max() - mean).clamp_min(1e-30), (mean - x.min()).clamp_min(1e-30)
    shrink = torch.minimum((1 - mean) / above, mean / below).clamp_max(1.0)
    return (mean + shrink * (x - mean)).clamp(0, 1)
