"""Exact selection of the largest scores: no sort of all weights, no concatenation, stable ties.

numpy's partition of all scores would be shorter, but slower, by how much depends on the ties: on one core, of 4 million
float64 scores it takes 12 ms where all differ, 15 to 25 where some are zero as pruned ones are (120 unless they are
taken out before); the brackets take 5 to 7. So 100 rounds of SynFlow take 3.6 s instead of 2.7, in float32 2.4 instead
of 1.3. Of 100 million float32 scores it takes 0.22 s and 480 MiB, the brackets 0.15 s and 200, half of that the masks.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

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
        masks, inside, places = _split(scores, lower, upper, sample.dtype)
        missing = keep - sum(map(true_count, masks.values()))
        if 0 <= missing <= inside.numel():
            _fill(places, _largest(inside, missing, total))
            return masks
        # Pruned weights, most of them all, share the lowest score: looked at only where the others do not suffice.
        if missing > 0 and _keep_ties(masks, scores, lower, sample.dtype, missing - inside.numel()):
            _fill(places, torch.ones_like(inside, dtype=torch.bool))
            return masks
    raise AssertionError("the last bracket holds everything")


def _sample(scores: Mapping[str, Tensor], total: int) -> Tensor:
    """Entries at regular intervals, all if they are few; descending, in a dtype wide enough for each."""
    stride, picked = 0, []
    for score in scores.values():  # once: they may be computed at each look
        stride = stride or max(1, total // (_SAMPLE_ON_CPU if score.device.type == "cpu" else _SAMPLE))
        picked.append(score.reshape(-1)[::stride].clone())  # a view would keep a layer's scores alive
    sample = torch.cat([part.to(picked[0].device) for part in picked])
    if not _for_numpy(sample):
        return sample.sort(descending=True).values
    return torch.from_numpy(np.sort(sample.numpy())[::-1].copy())


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


_Places = list[tuple[Tensor, Tensor]]  # of the scores inside a bracket: a part of a mask [n], and indices into it [k]


def _split(
    scores: Mapping[str, Tensor], lower: float, upper: float, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor, _Places]:
    """Masks of the scores above a bracket, the scores inside, > lower and not above, and where these are."""
    masks, inside, places = {}, [], []
    for name, score in scores.items():
        masks[name] = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        chunk = _CHUNK_ON_CPU if score.device.type == "cpu" else _CHUNK
        for part, above in zip(score.reshape(-1).split(chunk), masks[name].view(-1).split(chunk), strict=True):
            part = part.to(dtype)
            above.copy_(_exceeds(part, upper))
            between = true_positions(_exceeds(part, lower) ^ above)
            inside.append(part[between])
            places.append((above, between))
    return masks, torch.cat([part.to(inside[0].device) for part in inside]), places


def _fill(places: _Places, chosen: Tensor) -> None:
    """Keep those of the scores inside that are chosen, [k] over all places."""
    lengths = [between.numel() for _, between in places]
    for (flags, between), part in zip(places, chosen.split(lengths), strict=True):
        flags[between[part.to(between.device)]] = True


def _keep_ties(
    masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], value: float, dtype: torch.dtype, missing: int
) -> bool:
    """Keep the first `missing` of the scores equal to `value`; whether there are so many."""
    for name, score in scores.items():
        # In the common dtype: in a narrower one `value` would be rounded, and equal what is not.
        ties = true_positions(score.reshape(-1).to(dtype) == value)[:missing]
        masks[name].view(-1)[ties] = True
        missing -= ties.numel()
        if not missing:
            return True
    return False


def _largest(values: Tensor, keep: int, total: int) -> Tensor:
    """Mask [n] of the `keep` largest inside a bracket; among equal ones the earlier stay."""
    if values.device.type != "cpu" and 2 * _SAMPLE < values.numel() < 0.9 * total:
        return keep_largest({"": values}, keep)[""]
    found = torch.zeros_like(values, dtype=torch.bool)
    if not _for_numpy(values):
        found[values.sort(descending=True, stable=True).indices[:keep]] = True
    elif keep:
        array = values.numpy()
        bound = float(np.partition(array, -keep)[-keep])
        found = torch.from_numpy(array > bound)
        found[true_positions(values == bound)[: keep - true_count(found)]] = True
    return found


# Where they are on a CPU, numpy does the following two to fifteen times faster than torch.


def _for_numpy(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype != torch.bfloat16  # which numpy does not know


def _exceeds(values: Tensor, bound: float) -> Tensor:
    return torch.from_numpy(values.numpy() > bound) if _for_numpy(values) else values > bound


def true_count(flags: Tensor) -> int:
    """Number of True entries."""
    return int(np.count_nonzero(flags.numpy()) if _for_numpy(flags) else flags.count_nonzero())


def true_positions(flags: Tensor) -> Tensor:
    """Indices [k], ascending, of the True entries of a vector."""
    return torch.from_numpy(np.flatnonzero(flags.numpy())) if _for_numpy(flags) else flags.nonzero().squeeze(1)
