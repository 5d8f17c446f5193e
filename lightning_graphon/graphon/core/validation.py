"""Checks and conversions of the tensors that make a step graphon."""

from typing import Any

import torch
from torch import Tensor

from lightning_graphon._shared.checks import as_numbers


def _as_float(name: str, data: Any, like: Tensor | None = None) -> Tensor:
    tensor = as_numbers(name, data)
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.float64)
    return tensor.clone() if like is None else tensor.to(like).clone()


def as_values(data: Any) -> Tensor:
    """Cell values as a float tensor in [0, 1], copied."""
    values = _as_float("values", data)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"values must be [rows, cols] and not empty, got shape {tuple(values.shape)}")
    low, high = float(values.detach().min()), float(values.detach().max())
    # Means of float32 entries may leave [0, 1] by rounding; the comparison is false for NaN.
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ValueError(f"values are probabilities and must lie in [0, 1], got values from {low} to {high}")
    return values.clamp(0, 1)


def as_measure(name: str, data: Any, values: Tensor, axis: int) -> Tensor:
    """Interval lengths on the device and in the dtype of `values`; all equal if None."""
    count = values.shape[axis]
    if data is None:
        return values.new_full((count,), 1 / count).detach()
    measure = _as_float(name, data, values).detach()
    if measure.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},) to fit values, got {tuple(measure.shape)}")
    total = float(measure.double().sum())
    if not bool((measure > 0).all()) or not abs(total - 1) <= 1e-5:
        raise ValueError(f"{name} must be positive and sum to 1, got sum {total}: divide it by its sum")
    return measure / measure.sum()


def as_cells(name: str, data: Any, values: Tensor, low: float) -> Tensor | None:
    """Another quantity on the same cells, or None."""
    if data is None:
        return None
    cells = _as_float(name, data, values)
    if cells.shape != values.shape:
        raise ValueError(f"{name} must have the shape {tuple(values.shape)} of values, got {tuple(cells.shape)}")
    if not bool(cells.isfinite().all()) or not bool((cells >= low).all()):
        raise ValueError(f"{name} must be finite{' and not negative' if low == 0 else ''}")
    return cells


def as_flags(data: Any, values: Tensor) -> Tensor | None:
    """Bool flags on the same cells, or None."""
    if data is None:
        return None
    flags = as_numbers("sparse_cells", data).to(values.device, torch.bool, copy=True)
    if flags.shape != values.shape:
        raise ValueError(f"sparse_cells must have the shape {tuple(values.shape)}, got {tuple(flags.shape)}")
    return flags
