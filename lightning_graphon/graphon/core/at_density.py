"""Graphon values from free parameters, at a given density: what an optimiser can move."""

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked


@checked
def values_at_density(
    log_odds: Tensor, density: float, row_measure: Tensor | None = None, col_measure: Tensor | None = None
) -> Tensor:
    """Values W = sigmoid(log_odds + τ) with the τ that makes their mean the density, differentiable.

    A sum a(u) + b(v) of log-odds gives the product of odds, W / (1 - W) = c f(u) g(v), whose sparse limit is the
    product graphon c f(u) g(v) (the β-model of Chatterjee, Diaconis & Sly 2011); masks drawn at an exact budget
    multiply all odds by one factor and so stay in this family.

    Args:
        log_odds: Free parameters [rows, cols], finite; float64 keeps the density to 1e-12.
        density: Mean of the values, in (0, 1]; 1 is the dense layer, whatever the parameters.
        row_measure: Lengths [rows] of the intervals of u, summing to 1. Default: all equal.
        col_measure: Lengths [cols] of the intervals of v. Default: all equal.

    Returns:
        Values [rows, cols] in the dtype of `log_odds`.

    Raises:
        ValueError: A density outside (0, 1], or parameters that are not a finite matrix.

    >>> round(values_at_density(torch.tensor([[0.0, 3.0]]).double(), 0.25).mean().item(), 12)
    0.25
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is the fraction of weights kept and must lie in (0, 1], got {density!r}")
    if log_odds.ndim != 2 or not bool(log_odds.isfinite().all()):
        raise ValueError(f"log_odds must be finite [rows, cols], got shape {tuple(log_odds.shape)} or NaN or inf in it")
    if density == 1:
        return torch.ones_like(log_odds)
    rows = torch.full_like(log_odds[:, 0], 1 / len(log_odds)) if row_measure is None else row_measure.to(log_odds)
    cols = torch.full_like(log_odds[0], 1 / log_odds.shape[1]) if col_measure is None else col_measure.to(log_odds)
    area = torch.outer(rows / rows.sum(), cols / cols.sum())
    with torch.no_grad():
        start = _bisect(log_odds, area, density)
    # The last step of the search for τ is a Newton step that autograd follows. By the implicit function theorem that
    # gives the exact gradient ∂τ/∂a_i = -s_i / Σ_j s_j with s = μ W(1 - W).
    values = torch.sigmoid(log_odds + start)
    slope = (area * values * (1 - values)).sum().detach()
    # Where all values are exactly 0 or 1 (log-odds hundreds apart) there is no slope, and bisection must do.
    step = ((area * values).sum() - density) / slope if float(slope) > 0 else torch.zeros_like(slope)
    return torch.sigmoid(log_odds + (start - step))


def _bisect(log_odds: Tensor, area: Tensor, density: float) -> Tensor:
    """τ by bisection between the values at which the largest and the smallest cell equal the density."""
    centre = torch.logit(log_odds.new_tensor(density, dtype=torch.float64)).to(log_odds)
    low, high = centre - log_odds.max(), centre - log_odds.min()
    for _ in range(64):  # one per bit of a float64
        middle = 0.5 * (low + high)
        above = (area * torch.sigmoid(log_odds + middle)).sum() > density
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * (low + high)
