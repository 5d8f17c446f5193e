"""Sparse-aware initialisation: scale the kept weights so that the variance of signals stays that of the dense network.

Pruning leaves a unit fewer inputs than it was initialised for, and the signal of a deep network fades. For inputs of
equal second moment and weights of either sign, a unit's pre-activation has the second moment Σ w² times that of its
inputs. This sum is restored, not the fan-in: for random masks both are the same, but methods that keep large weights
(magnitude, SNIP, SynFlow) would exceed the dense network with sqrt(fan-in / kept fan-in) (Evci et al. 2022).
"""

from typing import get_args

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon._shared.choices import Rescale
from lightning_graphon._shared.weight_layout import layout_of
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.sharding import full_tensor, local_shard, local_shard_like, reshard


@checked
@torch.no_grad()
def rescale_(model: nn.Module, masks: Masks, by: Rescale = "unit") -> None:
    """Zero the pruned weights of `model` and scale the others to the sum of squares before, in place.

    A second call changes nothing. Units without a kept weight stay zero, biases as they are. If weights are sharded
    (FSDP2), every process must call it.

    Args:
        model: A dense network, or one pruned with the same masks; parameters keep their identity.
        masks: Masks of its weights.
        by: "unit" restores the sum over the inputs of each output unit (of a convolution: each output channel). "layer"
            restores that of the whole layer by one factor, which keeps the proportions between its weights.

    Raises:
        ValueError: `by` is unknown, or the masks were made for another model.

    >>> net = nn.Linear(4, 1, bias=False)
    >>> _ = net.weight.data.fill_(1.0)
    >>> rescale_(net, Masks({"weight": torch.tensor([[True, False, False, False]])}))
    >>> net.weight.data
    tensor([[2., 0., 0., 0.]])
    """
    check_choice("rescale", by, get_args(Rescale))
    reshard(model)
    for name, (weight, mask) in zip(masks, masks.pairs(model), strict=True):
        layout, dense = layout_of(model, name), full_tensor(weight.detach())
        rows = _rescaled(layout.rows(dense), layout.rows(mask.to(dense.device)), by)
        local_shard(weight).copy_(local_shard_like(layout.stored(rows), weight))


def _rescaled(dense: Tensor, mask: Tensor, by: Rescale) -> Tensor:
    """Rescaled weights [out, in, *taps]."""
    kept = dense.masked_fill(~mask, 0)
    # Axis 0 runs over units; with "layer" the norm is over all axes.
    axes = list(range(dense.ndim))[by == "unit" :]
    # Squares of float16 weights underflow.
    wide = torch.promote_types(dense.dtype, torch.float32)
    before, after = (torch.linalg.vector_norm(w, dim=axes, keepdim=True, dtype=wide) for w in (dense, kept))
    return kept * torch.where(after > 0, before / after, 1).to(wide)
