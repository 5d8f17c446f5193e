"""Metrics (torchmetrics) over the mathematics."""

from lightning_graphon.metrics.ntk_spectrum import NTKSpectrum

__all__ = ["NTKSpectrum"]
