"""Sparse-aware initialisation: the weights that stay take over what the pruned ones contributed to the variance.

Pruning leaves a unit fewer inputs than it was initialised for, and the signal of a deep network fades. For inputs of
equal second moment and weights of either sign, a unit's pre-activation has the second moment Σ w² times that of its
inputs. That sum is restored, not the fan-in: the two are the same for random masks, but methods that keep large weights
(magnitude, SNIP, SynFlow) would exceed the dense network with sqrt(fan-in / kept fan-in) (Evci et al. 2022).
"""

from typing import get_args

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import check_choice
from lightning_graphon._shared.choices import Rescale
from lightning_graphon._shared.weight_layout import swap_sides, transposed_groups
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.sharding import full_tensor, local_shard, local_shard_like, reshard


@torch.no_grad()
def rescale_(model: nn.Module, masks: Masks, by: Rescale = "unit") -> None:
    """Zero the pruned weights of `model` and scale those that stay, in place, to the sum of squares before.

    A network that is pruned already stays as it is, so calling twice scales once. Units without a kept weight stay
    zero. Biases do not change. Where weights are cut over processes (FSDP2), every process must call it.

    Args:
        model: Dense, or pruned by the same masks; parameters keep their identity.
        masks: Which weights stay.
        by: "unit": the sum over the inputs of each output unit (of a convolution: each output channel). "layer": the
            sum over the whole layer, by one factor, so that the proportions between its weights stay.

    Raises:
        ValueError: `by` is something else, or the masks were made for another model.

    >>> net = nn.Linear(4, 1, bias=False)
    >>> _ = net.weight.data.fill_(1.0)
    >>> rescale_(net, Masks({"weight": torch.tensor([[True, False, False, False]])}))
    >>> net.weight.data
    tensor([[2., 0., 0., 0.]])
    """
    check_choice("rescale", by, get_args(Rescale))
    reshard(model)
    for name, (weight, mask) in zip(masks, masks.pairs(model), strict=True):
        groups, dense = transposed_groups(model, name), full_tensor(weight.detach())
        rows = _rescaled(swap_sides(dense, groups), swap_sides(mask.to(dense.device), groups), by)
        local_shard(weight).copy_(local_shard_like(swap_sides(rows, groups), weight))


def _rescaled(dense: Tensor, mask: Tensor, by: Rescale) -> Tensor:
    """[out, in, *taps]."""
    kept = dense.masked_fill(~mask, 0)
    axes = list(range(dense.ndim))[by == "unit" :]
    wide = torch.promote_types(dense.dtype, torch.float32)
    before, after = (torch.linalg.vector_norm(w, dim=axes, keepdim=True, dtype=wide) for w in (dense, kept))
    return kept * torch.where(after > 0, before / after, 1).to(wide)
