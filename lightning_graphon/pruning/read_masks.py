"""Masks of a network that somebody else made sparse: by torch.nn.utils.prune, ModelPruning, or zeros."""

from torch import Tensor, nn

from lightning_graphon.pruning.layer_selection import LayerPatterns, check_patterns, qualified, select_weights
from lightning_graphon.pruning.masks import Masks
from lightning_graphon.pruning.sharding import full_tensor


def read_masks(model: nn.Module, include: LayerPatterns = None, exclude: LayerPatterns = None) -> Masks:
    """Masks as they are now: buffers of `torch.nn.utils.prune` (which ModelPruning uses), else non-zero weights.

    Args:
        model: Any module; a dense one has masks that keep everything.
        include: Which weights, as in `prune`; those that torch.nn.utils.prune masks are always read.
        exclude: Which not.

    Where weights are cut over processes, every process must call it.

    Returns:
        Masks by the weight's qualified name, in network order.

    Raises:
        ValueError: There is no weight to read.

    >>> from torch.nn.utils.prune import l1_unstructured
    >>> net = l1_unstructured(nn.Linear(2, 2), "weight", amount=1)
    >>> read_masks(net)
    Masks(1 layers, 3 of 4 weights kept, sparsity 0.2500)
    """
    foreign = _foreign_masks(model)
    try:
        weights = select_weights(model, include, exclude)
    except ValueError:
        if not foreign:
            raise
        weights = {}
    found = {**foreign, **{name: full_tensor(weight.detach() != 0) for name, weight in weights.items()}}
    if not foreign:
        return Masks(found)
    order = [qualified(path, "weight") for path, _ in model.named_modules()]
    rank = {name: place for place, name in enumerate(order)}
    return Masks(dict(sorted(found.items(), key=lambda item: rank.get(item[0], len(rank)))))


def check_readable(model: nn.Module, include: LayerPatterns = None, exclude: LayerPatterns = None) -> None:
    """Raise where `include` or `exclude` name what `read_masks` will never find in this model.

    Raises:
        TypeError, ValueError: As `check_patterns`.
    """
    if not _foreign_masks(model):  # whose weights have other names
        check_patterns(model, include, exclude)


def _foreign_masks(model: nn.Module) -> dict[str, Tensor]:
    """`weight_mask` buffers that stand beside a `weight_orig` parameter."""
    return {
        qualified(path, "weight"): mask.detach() != 0
        for path, module in model.named_modules()
        if "weight_orig" in dict(module.named_parameters(recurse=False))
        if (mask := dict(module.named_buffers(recurse=False)).get("weight_mask")) is not None
    }
