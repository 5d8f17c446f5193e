"""Metrics (torchmetrics) over the mathematics."""
