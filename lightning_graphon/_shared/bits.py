"""Bool tensors as one bit per entry."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BIT_VALUES = (128, 64, 32, 16, 8, 4, 2, 1)


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into uint8 on the CPU, eight entries per byte, the first in the highest bit.

    >>> pack(torch.tensor([True, False, True])).tolist()
    [160]
    """
    flat = mask.detach().reshape(-1).cpu().view(torch.uint8)
    # Zeros fill up the last byte.
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = torch.zeros(padded.shape[0], dtype=torch.uint8)
    for column, weight in enumerate(_BIT_VALUES):
        packed += padded[:, column] * weight
    return packed


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `pack`, for a mask of the given shape.

    Raises:
        ValueError: `bits` is not a uint8 tensor of the length that `shape` needs.

    >>> unpack(torch.tensor([160], dtype=torch.uint8), (3,)).tolist()
    [True, False, True]
    """
    size = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-size // 8),):
        raise ValueError(f"{bits.numel()} packed bytes of {bits.dtype} cannot hold a mask of shape {tuple(shape)}")
    columns = [(bits & weight) != 0 for weight in _BIT_VALUES]
    return torch.stack(columns, dim=1).reshape(-1)[:size].reshape(tuple(shape))
