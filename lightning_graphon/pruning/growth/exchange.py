"""Drop the smallest weights and grow as many others: what SET, RigL and SNFS share."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_graphon.pruning.allocation.top_k import keep_largest, true_count, true_positions
from lightning_graphon.pruning.growth.redistribution import moved_counts
from lightning_graphon.pruning.growth.registry import GrowthContext
from lightning_graphon.pruning.growth.schedule import count_of


def keep_largest_weights(weight: Tensor, mask: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` weights of largest magnitude among those that `mask` keeps; of equals the earlier stay.

    >>> keep_largest_weights(torch.tensor([1.0, -3.0, 2.0]), torch.tensor([True, False, True]), 1)
    tensor([False, False,  True])
    """
    places = true_positions(mask.reshape(-1))  # few of all weights
    chosen = keep_largest({"": weight.reshape(-1)[places].nan_to_num().abs()}, keep)[""]
    return torch.zeros_like(mask).reshape(-1).index_fill_(0, places[chosen], True).reshape(mask.shape)


def grow_largest(kept: Tensor, scores: Tensor, count: int) -> Tensor:
    """`kept` and, of the other weights, the `count` with the largest scores; of equals the earlier.

    >>> grow_largest(torch.tensor([True, False, False]), torch.tensor([9.0, 1.0, 2.0]), 1)
    tensor([ True, False,  True])
    """
    return kept | keep_largest({"": among(~kept, scores)}, count)[""]


def among(mask: Tensor, scores: Tensor) -> Tensor:
    """Scores where `mask` is True, and elsewhere -inf, which is taken last."""
    return scores.masked_fill(~mask, -torch.inf)


def drop_smallest(context: GrowthContext) -> dict[str, Tensor]:
    """What is left of each layer once its share of smallest weights is dropped."""
    survivors = {}
    for name, mask in context.masks.items():
        kept = true_count(mask)
        survivors[name] = keep_largest_weights(context.weights[name], mask, kept - count_of(context.fraction, kept))
    return survivors


def exchange(context: GrowthContext, scores: Callable[[str, Tensor, int], Tensor]) -> dict[str, Tensor]:
    """Drop each layer's share of smallest weights, and grow those of the largest scores up to the layer's count.

    A weight that was just dropped may grow at once, as in the papers' pseudocode, and then nothing has happened to it.

    Args:
        context: Weights, masks and counts.
        scores: From a layer's name, what is left of its mask and the number to grow, to scores of the weight's shape.
    """
    survivors = drop_smallest(context)
    counts: Mapping[str, int] = moved_counts(context, survivors) if context.moves else context.counts
    masks = {}
    for name, kept in survivors.items():
        missing = counts[name] - true_count(kept)
        masks[name] = grow_largest(kept, scores(name, kept, missing), missing)
    return masks
