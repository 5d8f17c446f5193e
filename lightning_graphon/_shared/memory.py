"""Running out of memory, by whatever name."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's on a GPU, a RuntimeError of its CPU allocator, or Python's.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    (True, False)
    """
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return allocator or isinstance(error, (torch.OutOfMemoryError, MemoryError))
