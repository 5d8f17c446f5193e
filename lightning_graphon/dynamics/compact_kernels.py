"""Kernels in checkpoints: the lower triangle, in single precision where that loses nothing."""

import math
from typing import Any

import torch
from torch import Tensor


def mirrored(kernels: Tensor) -> Tensor:
    """Kernels [G, ...] whose upper triangles are exactly the lower ones; products of matrices round them apart.

    >>> mirrored(torch.tensor([[[1.0, 7.0], [2.0, 3.0]]]))
    tensor([[[1., 2.],
             [2., 3.]]])
    """
    square = _square(kernels)
    return (square.tril() + square.tril(-1).mT).reshape(kernels.shape)


def pack_kernels(kernels: Tensor) -> dict[str, Any]:
    """Mirrored kernels as {"shape": list of int, "entries": [G, R(R + 1)/2]}.

    Kernels are computed in the precision of their network, so doubles often hold singles.
    """
    square = _square(kernels)
    rows, columns = torch.tril_indices(*square.shape[1:], device=square.device)
    entries = square[:, rows, columns]
    short = entries.float()
    return {"shape": list(kernels.shape), "entries": short if torch.equal(short.to(entries), entries) else entries}


def unpack_kernels(packed: Any, device: torch.device) -> Tensor:
    """Inverse of `pack_kernels`, float64; older checkpoints have the kernels themselves.

    Raises:
        ValueError: The entries do not fit the shape.
    """
    if isinstance(packed, Tensor):
        return packed.to(device)
    shape, entries = packed["shape"], packed["entries"].to(device, torch.float64)
    size = math.isqrt(math.prod(shape[1:]))
    rows, columns = torch.tril_indices(size, size, device=device)
    if entries.shape != (shape[0], len(rows)):
        raise ValueError(f"kernels of shape {shape} cannot have entries {list(entries.shape)}")
    square = entries.new_zeros(shape[0], size, size)
    square[:, rows, columns] = entries
    return mirrored(square).reshape(shape)


def _square(kernels: Tensor) -> Tensor:
    """[G, R, R] of [G, N, C, N, C] and the like."""
    size = math.isqrt(kernels[0].numel())
    return kernels.reshape(len(kernels), size, size)
