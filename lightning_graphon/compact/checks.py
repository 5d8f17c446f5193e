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
                f"the weight of {path.partition('.parametrizations')[0]!r} is computed (a parametrization, weight_norm, "
                "spectral_norm, torch.nn.utils.prune): remove that first, as with "
                "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
            )
    sharded = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
    if sharded is not None:
        raise ValueError(f"{sharded!r} is sharded (FSDP2): make the network smaller before it is distributed")


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of outputs, relative to the largest output or 1; infinite where shapes differ."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return torch.inf
    worst = 0.0
    for left, right in zip(found, expected, strict=True):
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        same = left.eq(right) | (left.isnan() & right.isnan())
        difference = torch.where(same, 0, (left - right).abs() if left.is_floating_point() else 1)
        worst = max(worst, float(difference.max()) / scale if right.numel() else 0.0)
    return worst if worst == worst else torch.inf
