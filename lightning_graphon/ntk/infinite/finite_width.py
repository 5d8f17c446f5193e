"""How far the kernel of one network is from its infinite-width limit."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_graphon._shared.checks import checked

# Of 50 rows of benchmarks/finite_width.py (MLP and CNN, ReLU, five kinds of masks, widths 16 to 1024, 8 seeds each): a
# fit with a free exponent gives 1.76 · Σ^0.49. Single rows are a factor of 1.25 off.
_FLUCTUATION = 1.85


@dataclass(frozen=True)
class ExpectedError:
    """What a network's kernel can be expected to differ from its limit by.

    Attributes:
        error: Relative distance, as in ‖Θ - Θ_limit‖ / ‖Θ_limit‖.
        layer: Name of the mask that reads the fewest units.
        units: Its effective number of units.
        fan_in: Its mean number of kept inputs per unit.
    """

    error: float
    layer: str
    units: float
    fan_in: float


@checked
def expected_error(masks: Mapping[str, Tensor]) -> ExpectedError | None:
    """About how far the kernel of one network is from its infinite-width limit, by its masks alone.

    A layer averages over the units that it reads: with a_v kept weights that read unit v these count as
    N = (Σ a_v)² / Σ a_v² units, and kernels of single networks scatter by 1.85 · √(Σ 1/N) over the layers that read
    hidden units. Measured on chains of two and three hidden layers, where it holds within a factor of 1.25; residual
    streams and LayerNorm scatter less. The number of kept inputs per unit alone does not tell it.

    Args:
        masks: Name to mask [out, in, ...], ones for a dense layer, in the order of the layers; the first one reads the
            inputs, which are no sample of units.

    Returns:
        The error and the layer that adds most to it; None for fewer than two masks, or an empty one.

    >>> import torch
    >>> masks = {name: torch.ones(100, 100) for name in ("first", "second", "third")}
    >>> found = expected_error(masks)
    >>> round(found.error, 2), found.layer, round(found.units)
    (0.26, 'second', 100)
    """
    units = {name: effective_units(mask) for name, mask in list(masks.items())[1:]}
    if not units or min(units.values()) == 0:
        return None
    layer = min(units, key=lambda name: units[name])
    fan_in = float((masks[layer] != 0).flatten(1).sum(1).double().mean())
    return ExpectedError(_FLUCTUATION * sum(1 / n for n in units.values()) ** 0.5, layer, units[layer], fan_in)


def effective_units(mask: Tensor) -> float:
    """How many equally read inputs scatter as those of a mask [out, in, ...] do; 0 of an empty one.

    >>> import torch
    >>> effective_units(torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]))
    2.0
    """
    read = (mask != 0).transpose(0, 1).flatten(1).sum(1).double()
    return float(read.sum().square() / read.square().sum().clamp_min(1))
