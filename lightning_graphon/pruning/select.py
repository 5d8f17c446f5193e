"""Exact selection of the largest scores: no sort of all weights, no concatenation, stable ties."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

_SAMPLE = 1 << 15


def keep_largest(scores: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Masks of the `keep` largest of all scores; among equal scores the earlier one stays.

    "Earlier" is the order of `scores`, then the flat index inside a tensor, so the result depends on
    nothing but the values.

    Args:
        scores: Name -> float tensor of any shape; no NaN. Entries of -inf are never kept while others remain.
        keep: How many to keep, 0 <= keep <= number of scores.

    Returns:
        Name -> bool tensor of the score's shape; exactly `keep` entries are True.

    Raises:
        ValueError: `keep` is out of range.

    >>> keep_largest({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([3.0, 3.0])}, 2)
    {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    total = sum(score.numel() for score in scores.values())
    if not 0 <= keep <= total:
        raise ValueError(f"cannot keep {keep} of {total} weights")
    if keep in (0, total):
        return {name: torch.full_like(score, keep > 0, dtype=torch.bool) for name, score in scores.items()}
    threshold = kth_largest(list(scores.values()), keep)
    masks = {name: score > threshold for name, score in scores.items()}
    missing = keep - _count(masks.values())
    for name, score in scores.items():
        if missing == 0:
            break
        ties = (score == threshold).reshape(-1).nonzero().squeeze(1)[:missing]
        masks[name].view(-1)[ties] = True
        missing -= ties.numel()
    return masks


def kth_largest(tensors: Sequence[Tensor], k: int) -> float:
    """The k-th largest entry over all tensors (k = 1 is the maximum), exactly.

    A sorted sample brackets the answer; the entries inside the bracket, about one in thirty, are searched the same
    way. A bracket that misses is widened. Extra memory: a few bytes a score of the largest tensor.

    Args:
        tensors: Float tensors without NaN.
        k: Rank, 1 <= k <= number of entries.

    >>> kth_largest([torch.tensor([5.0, 1.0]), torch.tensor([4.0])], 2)
    4.0
    """
    total = sum(t.numel() for t in tensors)
    sample = _sample(tensors)
    size = sample.numel()
    if size == total:
        return sample[k - 1].item()
    centre, slack = k / total * size, 3 * math.isqrt(size)
    # Pruned weights score -inf; the bracket leaves them out.
    finite = torch.finfo(tensors[0].dtype).min
    while True:
        upper = sample[max(0, math.floor(centre) - slack)].item()
        lower = max(finite, sample[min(size - 1, math.ceil(centre) + slack)].item())
        if slack >= size:
            upper, lower = math.inf, -math.inf
        higher = [t > upper for t in tensors]
        above = _count(higher)
        if above < k:
            if upper == lower:
                return upper
            middle = _between(tensors, lower, higher)
            if k <= above + middle.numel():
                return _kth(middle, k - above, total)
        slack *= 4


def _kth(middle: Tensor, k: int, total: int) -> float:
    """The k-th largest of the bracket; by sorting where heavy ties keep the bracket from shrinking."""
    if middle.numel() < total // 2:
        return kth_largest([middle], k)
    return middle.sort(descending=True).values[k - 1].item()


def _sample(tensors: Sequence[Tensor]) -> Tensor:
    """All entries if they are few, else about 2^15 of them at regular intervals; descending."""
    stride = max(1, sum(t.numel() for t in tensors) // _SAMPLE)
    picked = [t.reshape(-1)[::stride] for t in tensors]
    device = picked[0].device
    return torch.cat([p.to(device) for p in picked]).sort(descending=True).values


def _count(masks: Iterable[Tensor]) -> int:
    return sum(int(mask.count_nonzero()) for mask in masks)


def _between(tensors: Sequence[Tensor], lower: float, higher: Sequence[Tensor]) -> Tensor:
    """Entries of at least `lower` that are not among the `higher`."""
    device = tensors[0].device
    return torch.cat([t[(t >= lower) ^ high].to(device) for t, high in zip(tensors, higher, strict=True)])
