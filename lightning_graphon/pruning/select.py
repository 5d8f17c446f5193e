"""Exact selection of the largest scores: no sort of all weights, no concatenation, stable ties."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

_SAMPLE = 1 << 14


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
    dtype = reduce(torch.promote_types, (score.dtype for score in scores.values()))
    scores = {name: score.to(dtype) for name, score in scores.items()}
    threshold = kth_largest(list(scores.values()), keep)
    masks = {name: score >= threshold for name, score in scores.items()}
    surplus = _count(masks.values()) - keep
    # Too many only where several scores equal the threshold: the last of them go.
    for name in reversed(list(scores)):
        if surplus == 0:
            break
        ties = (scores[name] == threshold).reshape(-1).nonzero().squeeze(1)[-surplus:]
        masks[name][torch.unravel_index(ties, scores[name].shape)] = False
        surplus -= ties.numel()
    return masks


def kth_largest(tensors: Sequence[Tensor], k: int) -> float:
    """The k-th largest entry over all tensors (k = 1 is the maximum), exactly.

    A sorted sample brackets the answer; the entries inside the bracket, about one in twenty, are searched the same
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
    while slack < size:
        upper = sample[max(0, math.floor(centre) - slack)].item()
        lower = sample[min(size - 1, math.ceil(centre) + slack)].item()
        higher = [t > upper for t in tensors]
        above = _count(higher)
        if above < k:
            # Without `lower` itself: pruned weights, most of them all, share the lowest score.
            inside = _between(tensors, lower, higher)
            if k <= above + inside.numel():
                return _kth(inside, k - above, total)
            if k <= above + inside.numel() + _count(t == lower for t in tensors):
                return lower
        slack *= 4
    return _kth(torch.cat([t.reshape(-1).to(tensors[0].device) for t in tensors]), k, total)


def _kth(inside: Tensor, k: int, total: int) -> float:
    """The k-th largest of the bracket; by sorting where heavy ties keep the bracket from shrinking."""
    if inside.numel() < 0.9 * total:
        return kth_largest([inside], k)
    return inside.sort(descending=True).values[k - 1].item()


def _sample(tensors: Sequence[Tensor]) -> Tensor:
    """All entries if they are few, else about 2^14 of them at regular intervals; descending."""
    stride = max(1, sum(t.numel() for t in tensors) // _SAMPLE)
    picked = [t.reshape(-1)[::stride] for t in tensors]
    device = picked[0].device
    return torch.cat([p.to(device) for p in picked]).sort(descending=True).values


def _count(masks: Iterable[Tensor]) -> int:
    return sum(int(mask.count_nonzero()) for mask in masks)


def _between(tensors: Sequence[Tensor], lower: float, higher: Sequence[Tensor]) -> Tensor:
    """Entries above `lower` that are not among the `higher`."""
    device = tensors[0].device
    return torch.cat([t[(t > lower) ^ high].to(device) for t, high in zip(tensors, higher, strict=True)])
