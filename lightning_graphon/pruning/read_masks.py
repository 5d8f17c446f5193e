"""Masks of a network that other software pruned: torch.nn.utils.prune, ModelPruning, or zeros in weights."""

from torch import Tensor, nn

from lightning_graphon._shared.checks import as_kind
from lightning_graphon.pruning.candidates import LayerPatterns, qualified
from lightning_graphon.pruning.layer_selection import (
    check_patterns,
    find_weights,
)
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.sharding import full_tensor


def read_masks(model: nn.Module, include: LayerPatterns = None, exclude: LayerPatterns = None) -> Masks:
    """Masks of a network: buffers of `torch.nn.utils.prune` (which ModelPruning uses), else non-zero weights.

    If weights are sharded, every process must call it.

    Args:
        model: Any module; a dense one has masks that keep everything.
        include: Weights to read, as in `prune`; those that torch.nn.utils.prune masks are always read.
        exclude: Weights not to read.

    Returns:
        Masks by the weight's qualified name, in network order.

    Raises:
        ValueError: There is no weight to read.

    >>> from torch.nn.utils.prune import l1_unstructured
    >>> net = l1_unstructured(nn.Linear(2, 2), "weight", amount=1)
    >>> read_masks(net)
    Masks(1 layers, 3 of 4 weights kept, sparsity 0.2500)
    """
    foreign = _foreign_masks(as_kind("model", model, nn.Module))
    try:
        weights = find_weights(model, include, exclude)
    except ValueError:
        if not foreign:
            raise
        weights = {}
    found = {**foreign, **{name: full_tensor(weight.detach() != 0) for name, weight in weights.items()}}
    if not foreign:
        return Masks(found)
    # Masks of both kinds in network order.
    order = [qualified(path, "weight") for path, _ in model.named_modules()]
    rank = {name: place for place, name in enumerate(order)}
    return Masks(dict(sorted(found.items(), key=lambda item: rank.get(item[0], len(rank)))))


def check_readable(model: nn.Module, include: LayerPatterns = None, exclude: LayerPatterns = None) -> None:
    """Raise where `include` or `exclude` name weights that `read_masks` cannot find in this model.

    Raises:
        TypeError, ValueError: As `check_patterns`.
    """
    # With torch.nn.utils.prune parameters have other names, so patterns cannot be checked.
    if not _foreign_masks(as_kind("model", model, nn.Module)):
        check_patterns(model, include, exclude)


def _foreign_masks(model: nn.Module) -> dict[str, Tensor]:
    """`weight_mask` buffers of modules with a `weight_orig` parameter."""
    return {
        qualified(path, "weight"): mask.detach() != 0
        for path, module in model.named_modules()
        if "weight_orig" in dict(module.named_parameters(recurse=False))
        if (mask := dict(module.named_buffers(recurse=False)).get("weight_mask")) is not None
    }
