"""Exact selection of the largest scores: no sort of all weights, no concatenation, stable ties."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon.pruning.allocation.on_cpu import count, descending, exceeds, largest, positions
from lightning_graphon.pruning.lazy_tensors import shapes_of

# Scores that are sorted to find a bracket: the more of them, the fewer are inside. Sorting is cheap on a CPU, picking
# is not.
_SAMPLE = 1 << 14
_SAMPLE_ON_CPU = 1 << 17
# Scores looked at together: temporary tensors stay small on a CPU, and launches few elsewhere.
_CHUNK = 1 << 24
_CHUNK_ON_CPU = 1 << 20


def keep_largest(scores: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Masks of the `keep` largest of all scores; among equal scores the earlier one is kept.

    "Earlier" is the order of `scores`, then the flat index inside a tensor, so the result depends on
    nothing but the values.

    A sorted sample brackets the smallest score that stays. What lies above the bracket stays, and of the entries
    inside, one in sixty on a CPU and one in twenty elsewhere, the largest are found by themselves. A bracket that
    misses is widened. Beside the masks this needs about half a byte per score, and every score is looked at twice.

    Args:
        scores: Name -> float tensor of any shape; no NaN. Entries of -inf are never kept while others remain.
        keep: Number to keep, 0 <= keep <= number of scores.

    Returns:
        Name -> bool tensor of the score's shape; exactly `keep` entries are True.

    Raises:
        ValueError: `keep` is out of range.

    >>> keep_largest({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([3.0, 3.0])}, 2)
    {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    total = sum(shape.numel() for shape in shapes_of(scores).values())
    if not 0 <= keep <= total:
        raise ValueError(f"cannot keep {keep} of {total} weights")
    if keep in (0, total):
        return {name: torch.full_like(score, keep > 0, dtype=torch.bool) for name, score in scores.items()}
    sample = _sample(scores, total)
    for lower, upper in _brackets(sample, keep, total):
        split = _Split.at(scores, lower, upper, sample.dtype)
        missing = keep - split.above
        if 0 <= missing <= split.inside.numel():
            split.keep_inside(_largest(split.inside, missing, total))
            return split.masks
        # Pruned weights, most of them all, share the lowest score: looked at only where the others do not suffice.
        if missing > 0 and split.keep_ties(scores, lower, missing - split.inside.numel()):
            split.keep_inside(torch.ones_like(split.inside, dtype=torch.bool))
            return split.masks
    raise AssertionError("the last bracket holds everything")


@dataclass
class _Split:
    """Scores split by a bracket: masks of those above, their number, those inside, and where these are."""

    masks: dict[str, Tensor]
    above: int
    inside: Tensor
    places: list[tuple[Tensor, Tensor]]

    @classmethod
    def at(cls, scores: Mapping[str, Tensor], lower: float, upper: float, dtype: torch.dtype) -> "_Split":
        """Above is > upper, inside is > lower and not above; in chunks, so that temporary tensors stay small."""
        masks, inside, places = {}, [], []
        for name, score in scores.items():
            masks[name] = torch.empty(score.shape, dtype=torch.bool, device=score.device)
            chunk = _CHUNK_ON_CPU if score.device.type == "cpu" else _CHUNK
            for part, higher in zip(score.reshape(-1).split(chunk), masks[name].view(-1).split(chunk), strict=True):
                part = part.to(dtype)
                exceeds(part, upper, out=higher)
                between = positions(exceeds(part, lower) ^ higher)
                inside.append(part[between])
                places.append((higher, between))
        above = sum(map(count, masks.values()))
        return cls(masks, above, torch.cat([part.to(inside[0].device) for part in inside]), places)

    def keep_inside(self, chosen: Tensor) -> None:
        """Keep the chosen entries of `inside`."""
        lengths = [between.numel() for _, between in self.places]
        for (flags, between), part in zip(self.places, chosen.split(lengths), strict=True):
            flags[between[part.to(between.device)]] = True

    def keep_ties(self, scores: Mapping[str, Tensor], value: float, missing: int) -> bool:
        """Keep the first `missing` of the scores equal to `value`; whether there are so many."""
        for name, score in scores.items():
            # In the common dtype: in a narrower one `value` would be rounded, and equal what is not.
            ties = positions(score.reshape(-1).to(self.inside.dtype) == value)[:missing]
            self.masks[name].view(-1)[ties] = True
            missing -= ties.numel()
            if not missing:
                return True
        return False


def _brackets(sample: Tensor, keep: int, total: int) -> Iterator[tuple[float, float]]:
    """Bounds around the smallest score that stays, ever wider."""
    size = sample.numel()
    centre, slack = keep / total * size, 3 * math.isqrt(size)
    while slack < size:
        upper = sample[max(0, math.floor(centre) - slack)].item()
        lower = sample[min(size - 1, math.ceil(centre) + slack)].item()
        yield lower, upper
        slack *= 4
    yield -math.inf, math.inf


def _largest(values: Tensor, keep: int, total: int) -> Tensor:
    """Mask of the `keep` largest inside a bracket; off the CPU by a narrower bracket where that can shrink."""
    if values.device.type != "cpu" and 2 * _SAMPLE < values.numel() < 0.9 * total:
        return keep_largest({"": values}, keep)[""]
    return largest(values, keep)


def _sample(scores: Mapping[str, Tensor], total: int) -> Tensor:
    """Entries at regular intervals, all if they are few; descending, in a dtype wide enough for each."""
    stride, picked = 0, []
    for score in scores.values():  # once: they may be computed at each look
        stride = stride or max(1, total // (_SAMPLE_ON_CPU if score.device.type == "cpu" else _SAMPLE))
        picked.append(score.reshape(-1)[::stride].clone())  # a view would keep a layer's scores alive
    return descending(torch.cat([part.to(picked[0].device) for part in picked]))
