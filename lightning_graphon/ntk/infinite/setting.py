"""What the nodes of a network's kernel are built from: bins, masks and options."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_graphon._shared.choices import Parameterization, ParameterTerm, Propagate
from lightning_graphon.tracing import Trace
from lightning_graphon.tracing.steps import Affine, Step


@dataclass(frozen=True)
class Setting:
    """Bins, masks and options.

    Attributes:
        trace: The network's steps.
        bin_of: Bin [units] of every unit id.
        same: Class [units] of ids that are the same unit.
        masks: Masks by the names of weights.
        propagate: "energy" or "density".
        parameterization: As in `graphon_ntk_from_model`.
        weight_variance: σ_w², or None for that of each layer's kept weights.
        parameter_term: As in `graphon_ntk_from_model`.
    """

    trace: Trace
    bin_of: Tensor
    same: Tensor
    masks: Mapping[str, Tensor]
    propagate: Propagate
    parameterization: Parameterization
    weight_variance: float | None
    parameter_term: ParameterTerm

    def bins(self, step: Step) -> Tensor:
        """Number [U] of each unit's bin among those of the step."""
        # A step may have a unit twice, as the value and the gate of a product: these are two bins.
        label = self.bin_of[step.units] * len(step.units) + _occurrence(self.same[step.units])
        return label.unique(return_inverse=True)[1]

    def mask(self, name: str, weight: Tensor) -> Tensor:
        """Mask of a weight, float64 on the CPU; ones where there is none."""
        mask = self.masks.get(name)
        mask = torch.ones_like(weight) if mask is None else mask != 0
        return mask.detach().to("cpu", torch.float64)

    def variance(self, step: Affine) -> float:
        """σ_w² of a layer."""
        if self.weight_variance is not None:
            return self.weight_variance
        kept = step.weight.detach()[self.mask(step.weight_name, step.weight).to(step.weight.device) > 0]
        return step.fan_in * float(kept.double().square().mean()) if len(kept) else 0.0


_FAR = 4.0  # standard errors: a mean below is noise of finitely many numbers


def beyond_noise(means: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """Means of `count` numbers each, with mean squares `squares`; 0 where they are no larger than their noise."""
    noise = ((squares - means.square()).clamp_min(0) / count).sqrt()
    return torch.where(means.abs() > _FAR * noise, means, 0.0)


def bin_means(values: Tensor, bins: Tensor) -> Tensor:
    """Means [K, ...] of values [U, ...] over the units of each bin."""
    count = torch.bincount(bins).to(values)
    sums = values.new_zeros(len(count), *values.shape[1:]).index_add_(0, bins, values)
    return sums / count.reshape(-1, *[1] * (values.ndim - 1))


def _occurrence(numbers: Tensor) -> Tensor:
    """How often each number stood before.

    >>> _occurrence(torch.tensor([4, 7, 4, 4]))
    tensor([0, 0, 1, 2])
    """
    order = numbers.argsort(stable=True)
    _, count = numbers.unique(return_counts=True)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    return torch.empty_like(numbers).index_put((order,), torch.arange(len(numbers)) - first)
