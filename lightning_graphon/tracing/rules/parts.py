"""Match the units and positions of tensors that are joined entry by entry."""

from collections.abc import Sequence

import torch
from torch import Tensor


def join_positions(numbers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], int]:
    """One number for each distinct tuple of numbers at the same entry.

    Returns:
        The number at each entry, for each input the index [count] of its number, and their count.

    >>> join_positions([torch.tensor([0, 1, 1]), torch.tensor([4, 4, 4])])
    (tensor([0, 1, 1]), [tensor([0, 1]), tensor([4, 4])], 2)
    """
    key = numbers[0]
    for other in numbers[1:]:
        key = key * (int(other.max()) + 1) + other
    found, inverse = key.unique(return_inverse=True)
    # Any entry of a tuple tells its members.
    entry = torch.empty(len(found), dtype=torch.long).index_put((inverse.reshape(-1),), torch.arange(inverse.numel()))
    return inverse, [number.reshape(-1)[entry] for number in numbers], len(found)
