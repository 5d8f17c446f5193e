"""Whether a mask has changed since it was last looked at."""

import torch
from torch import Tensor


class MaskSnapshot:
    """A mask as it was at the last look.

    Args:
        mask: Bool tensor; a copy is kept.

    Attributes:
        content: The copy, not to be written to.

    >>> mask = torch.tensor([True, False])
    >>> snapshot = MaskSnapshot(mask)
    >>> mask[1] = True
    >>> snapshot.is_now(mask)
    False
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask, self.content = mask, mask.clone()
        self._writes = None if mask.is_inference() else mask._version  # tensors of inference mode do not count writes

    def is_now(self, mask: Tensor) -> bool:
        """Whether it is still the same; one that nobody wrote to, as those of PruneAtInit, is not read again."""
        unwritten = mask is self._mask and self._writes is not None and self._writes == mask._version
        return unwritten or (mask.shape == self.content.shape and torch.equal(mask, self.content))
