"""Recognise errors that mean: out of memory."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's error on a GPU, a RuntimeError of its CPU allocator, or Python's MemoryError.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    (True, False)
    """
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return allocator or isinstance(error, (torch.OutOfMemoryError, MemoryError))
