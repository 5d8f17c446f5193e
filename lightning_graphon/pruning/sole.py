"""Whether memory may be written to: nothing else holds it."""

from collections.abc import Callable

import torch
from torch import Tensor


def is_sole(tensor: Tensor) -> bool:
    """Whether no other tensor and no step of a pending backward pass holds this tensor's memory.

    False also where this version of torch does not count.

    >>> weight = torch.ones(2, 2)
    >>> is_sole(weight)
    True
    >>> view = weight.T
    >>> is_sole(weight)
    False
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    # Python's own handle is counted by some versions: compare with a tensor that is known to be alone.
    return count is not None and _holders(count, tensor) == _holders(count, torch.empty(1))


def _holders(count: Callable[[int], int], tensor: Tensor) -> int:
    return count(tensor.untyped_storage()._cdata)
