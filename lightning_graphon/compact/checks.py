"""What can be made smaller at all, and whether two networks give the same."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_graphon.pruning import is_sharded


def check_compactable(model: nn.Module) -> None:
    """Raise where weights are not what layers store.

    Raises:
        ValueError: They are computed or sharded; the message names the layer.
    """
    for path, module in model.named_modules():
        computed = isinstance(module, parametrize.ParametrizationList) or {"weight_orig", "weight_g"} & {
            *module._parameters
        }
        if computed:
            raise ValueError(
                f"the weight of {path.partition('.parametrizations')[0]!r} is computed (a parametrization, "
                "weight_norm, spectral_norm, torch.nn.utils.prune): remove that first, as with "
                "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
            )
    sharded = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
    if sharded is not None:
        raise ValueError(f"{sharded!r} is sharded (FSDP2): make the network smaller before it is distributed")


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of outputs, relative to the largest of each output; infinite where shapes differ."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return torch.inf
    errors = [_error(left, right) for left, right in zip(found, expected, strict=True) if right.numel()]
    return torch.inf if any(error != error for error in errors) else max(errors, default=0.0)


def _error(left: Tensor, right: Tensor) -> float:
    same = left.eq(right) | (left.isnan() & right.isnan())
    if not left.is_floating_point():
        return 0.0 if bool(same.all()) else torch.inf
    # Not relative to 1: outputs of a sparse network at initialisation can be as small as rounding.
    return float(torch.where(same, 0, (left - right).abs()).max()) / max(float(right.abs().max()), 1e-30)
