"""Metrics of torchmetrics for loss curves and kernel spectra."""

from lightning_graphon.metrics.functional import fitted_decay_rate, log_correlation, loss_decay_errors
from lightning_graphon.metrics.loss_decay import LossDecay, loss_decay_summary
from lightning_graphon.metrics.ntk_spectrum import NTKSpectrum

__all__ = [
    "LossDecay",
    "NTKSpectrum",
    "fitted_decay_rate",
    "log_correlation",
    "loss_decay_errors",
    "loss_decay_summary",
]
