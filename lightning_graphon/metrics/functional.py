r"""Predicted against observed loss, as functions and as statistics that merge.

The statistics of two sets of points give those of their union, over updates, processes and resumed runs: means and
co-moments are merged by the pairwise formulas of Chan, Golub and LeVeque (1979), which do not cancel.
"""

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked

# Moments of (step, log predicted, log observed): count, 3 means, 6 co-moments (upper triangle).
MOMENTS = 10
_ROWS, _COLUMNS = torch.triu_indices(3, 3).tolist()


@checked
def loss_decay_errors(predicted: Tensor, observed: Tensor) -> Tensor:
    """Relative errors |p − o| / |o|, [K].

    0 where both are equal, also both 0 or both the same infinity; inf where only the observed loss is 0 or where one is
    infinite; NaN where one is NaN.

    >>> loss_decay_errors(torch.tensor([1.5, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])).tolist()
    [0.5, 0.0, inf]
    """
    error = (predicted - observed).abs() / observed.abs()
    # The formula gives NaN for infinite losses and for 0 / 0.
    infinite = (predicted.isinf() | observed.isinf()) & ~predicted.isnan() & ~observed.isnan()
    error = torch.where(infinite, torch.inf, error)
    return torch.where(predicted == observed, 0.0, error)


def log_moments(predicted: Tensor, observed: Tensor, step: Tensor) -> Tensor:
    """Moments [10] of (step, log predicted, log observed) over the points where both losses are positive and finite."""
    usable = (predicted > 0) & (observed > 0) & predicted.isfinite() & observed.isfinite()
    points = torch.stack([step, predicted.log(), observed.log()])[:, usable]
    count = points.shape[1]
    if count == 0:
        return points.new_zeros(MOMENTS)
    means = points.mean(1)
    centred = points - means[:, None]
    moments = (centred @ centred.T)[_ROWS, _COLUMNS]
    return torch.cat([points.new_tensor([count]), means, moments])


def merge_moments(parts: Tensor) -> Tensor:
    """Moments of a union from those of its parts [P, 10]; symmetric in the parts."""
    counts, means, moments = parts[:, 0], parts[:, 1:4], parts[:, 4:]
    total = counts.sum()
    if total == 0:
        return torch.zeros_like(parts[0])
    mean = (counts[:, None] * means).sum(0) / total
    offsets = means - mean
    between = (counts[:, None] * offsets[:, _ROWS] * offsets[:, _COLUMNS]).sum(0)
    return torch.cat([total[None], mean, moments.sum(0) + between])


def fits_from_moments(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decay rates of the predicted and the observed loss per step, and the correlation of their logarithms.

    Rates are −slopes of log L against step by least squares, NaN with fewer than two different steps; the correlation
    is NaN where a curve is constant or has fewer than two points.
    """
    tt, tp, to, pp, po, oo = moments[4:]  # of time (step), predicted and observed
    tt = torch.where(tt > 0, tt, torch.nan)
    scale = (pp * oo).sqrt()
    correlation = (po / torch.where(scale > 0, scale, torch.nan)).clamp(-1, 1)
    return -tp / tt, -to / tt, correlation


@checked
def log_correlation(predicted: Tensor, observed: Tensor) -> Tensor:
    """Pearson correlation of log predicted and log observed over points [K] where both are positive and finite.

    >>> log_correlation(torch.tensor([4.0, 2.0, 1.0]), torch.tensor([16.0, 4.0, 1.0])).round(decimals=6).item()
    1.0
    """
    predicted, observed = predicted.double().reshape(-1), observed.double().reshape(-1)
    return fits_from_moments(log_moments(predicted, observed, torch.zeros_like(predicted)))[2]


@checked
def fitted_decay_rate(loss: Tensor, step: Tensor) -> Tensor:
    """Rate r of the least-squares fit log L = a − r·step over points [K] with positive, finite loss.

    >>> round(fitted_decay_rate(torch.tensor([1.0, 0.5, 0.25]), torch.arange(3)).item(), 6)
    0.693147
    """
    loss, step = loss.double().reshape(-1), step.double().reshape(-1)
    return fits_from_moments(log_moments(loss, loss, step))[0]
