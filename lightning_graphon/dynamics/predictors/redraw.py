"""Turn graphons, or degrees, of a chain of Linear layers into a network of its kind, of any width."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_graphon._shared.choices import Positions
from lightning_graphon.dynamics.predictors.cell_draws import Fields, draw_layer, draw_with_degrees, units_of_bins
from lightning_graphon.dynamics.predictors.linear_chain import LinearChain
from lightning_graphon.dynamics.predictors.width_scaling import Scaling
from lightning_graphon.graphon import layer_graphons
from lightning_graphon.graphon.estimation.layers import joint_labels

_Draws = tuple[list[Tensor], list[tuple[Tensor, Tensor]]]


@torch.no_grad()
def graphon_draws(
    model: nn.Module, chain: LinearChain, masks: Mapping[str, Tensor], source: torch.Generator, width: float, bins: int,
    fields: Fields, scaling: Scaling, positions: Positions,
) -> _Draws:  # fmt: skip
    """For every boundary between layers the neuron whose place each unit takes; mask and weight of each layer."""
    graphons = layer_graphons(masks, model=model, bins=bins, order="joint", positions=positions).values()
    labels = [label.cpu() for label in joint_labels(masks, model=model, bins=bins, positions=positions)]
    sides = _sides(model, chain)
    hidden = [units_of_bins(label, max(1, round(width * len(label))), source) for label in labels]
    units = [torch.arange(sides[0]), *hidden, torch.arange(sides[-1])]
    places = [units[0], *(label[unit] for label, unit in zip(labels, hidden, strict=True)), units[-1]]
    last = len(graphons) - 1
    draws = [
        draw_layer(
            graphon, places[i + 1], places[i], fields=fields, ratio=len(units[i]) / sides[i],
            fluctuation="unit" if scaling == "mup" and i == last else "sum", source=source,
        )
        for i, graphon in enumerate(graphons)
    ]  # fmt: skip
    return units, draws


@torch.no_grad()
def degree_draws(model: nn.Module, chain: LinearChain, masks: Mapping[str, Tensor], source: torch.Generator) -> _Draws:
    """The same with the degrees of each mask only; the units say in which order the rows are."""
    sides = _sides(model, chain)
    orders = [torch.randperm(n, generator=source) for n in sides[1:-1]]
    units = [torch.arange(sides[0]), *orders, torch.arange(sides[-1])]
    draws = []
    for (name, mask), rows in zip(masks.items(), units[1:], strict=True):
        drawn, weight = draw_with_degrees(mask, model.get_parameter(name), source)
        # Rows move and the next mask's columns do not: a neuron's two degrees come from different neurons.
        draws.append((drawn[rows], weight[rows]))
    return units, draws


def _sides(model: nn.Module, chain: LinearChain) -> list[int]:
    linears = [_linear(model, name) for name in chain.linears]
    return [linears[0].in_features, *(linear.out_features for linear in linears)]


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)  # noqa: S101  the chain holds no other
    return module


# ---- building


@torch.no_grad()
def built(model: nn.Module, chain: LinearChain, units: list[Tensor], weights: list[Tensor]) -> nn.Module:
    """A deep copy of the model with these weights; parameters and buffers of single units are taken from `units`."""
    twin = copy.deepcopy(model)
    for name, before, after, weight in zip(chain.linears, units[:-1], units[1:], weights, strict=True):
        linear = _linear(twin, name)
        linear.in_features, linear.out_features = len(before), len(after)
        _replace(linear, "weight", weight)
        if linear.bias is not None:
            _replace(linear, "bias", linear.bias.detach()[after.to(linear.bias.device)])
    for name, boundary in chain.per_unit.items():
        _take_units(twin.get_submodule(name), units[boundary])
    return twin


def _take_units(module: nn.Module, unit: Tensor) -> None:
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.ndim == 1:
            _replace(module, name, tensor.detach()[unit.to(tensor.device)])
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = (len(unit),)
    for name in ("num_features", "num_parameters"):
        if hasattr(module, name):
            setattr(module, name, len(unit))


def _replace(module: nn.Module, name: str, values: Tensor) -> None:
    """A parameter or buffer of another shape, with the dtype, device and gradient flag of the old one."""
    old = getattr(module, name)
    new = values.to(old).clone()
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def unit_ratios(model: nn.Module, chain: LinearChain, units: list[Tensor]) -> dict[str, tuple[float, float]]:
    """Parameter name -> its inputs and outputs over those of the model's, by the number of units at each boundary."""
    ratio = [len(unit) / side for unit, side in zip(units, _sides(model, chain), strict=True)]
    found: dict[str, tuple[float, float]] = {}
    for i, name in enumerate(chain.linears):
        prefix = f"{name}." if name else ""
        found |= {f"{prefix}weight": (ratio[i], ratio[i + 1]), f"{prefix}bias": (1.0, ratio[i + 1])}
    for name, boundary in chain.per_unit.items():
        found |= {f"{name}.{p}": (1.0, ratio[boundary]) for p, _ in model.get_submodule(name).named_parameters()}
    return found
