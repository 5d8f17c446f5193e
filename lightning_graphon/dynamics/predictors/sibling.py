"""A network drawn anew from the graphons of another one: of the same width a test, narrower a cheap stand-in."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_graphon._shared.checks import check_choice, checked, nearest
from lightning_graphon._shared.choices import Positions
from lightning_graphon._shared.random import generator
from lightning_graphon.dynamics.predictors.cell_draws import Fields
from lightning_graphon.dynamics.predictors.redraw import degree_draws, graphon_draws
from lightning_graphon.dynamics.predictors.resized_network import Units, built, check_runs, read_network, samples_for
from lightning_graphon.dynamics.predictors.width_scaling import (
    OptimizerKind,
    Scaling,
    is_decoupled,
    optimizer_kind,
    rate_factor,
    rebuilt,
    split_group,
)
from lightning_graphon.pruning import Masks


@dataclass(frozen=True)
class Sibling:
    """A redrawn network, and how to train it so that it learns as the one that it was drawn from.

    Attributes:
        model: The network, a copy in structure; its parameters have the names of the original's.
        masks: Its masks, for the weights that had one.
        scaling: "ntk" or "mup".
        ratios: Parameter name -> its inputs and outputs over those of the original's; parameters that are not named
            are as they were.
    """

    model: nn.Module
    masks: Masks
    scaling: Scaling
    ratios: Mapping[str, tuple[float, float]]

    def rates(self, kind: OptimizerKind) -> dict[str, float]:
        """Factor of each parameter's learning rate, for "sgd" or "adam" (any optimizer that divides by gradients)."""
        return {
            name: rate_factor(*self.ratios.get(name, (1.0, 1.0)), kind, self.scaling)
            for name, _ in self.model.named_parameters()
        }

    def decays(self, kind: OptimizerKind) -> dict[str, float]:
        """Factor of each parameter's weight decay: one over that of its learning rate, so that lr · decay stays."""
        return {name: 1 / factor for name, factor in self.rates(kind).items()}

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Norm of the gradients as the original's would be: each weighted by the factor of SGD.

        The plain norm grows or falls with the width, so a threshold for it would clip another network.
        """
        rates, total = self.rates("sgd"), torch.zeros((), dtype=torch.float64)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                total = total + rates[name] * parameter.grad.double().square().sum()
        return total.sqrt()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that `gradient_norm` is at most `max_norm`; returns what it was."""
        norm = self.gradient_norm()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(float((max_norm / (norm + 1e-6)).clamp_max(1)))  # as torch's own
        return norm


@checked
def redraw_from_graphons(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    inputs: Tensor | None = None,
    width: float = 1.0,
    bins: int = 64,
    seed: int = 0,
    fields: Fields = "WED",
    scaling: Scaling = "ntk",
    positions: Positions = "degree",
) -> Sibling:
    """Draw a network whose masks and weights follow the joint graphons of another one.

    Each hidden neuron gets a position; whether an edge is kept, and the mean and the variance of its weight (normally
    distributed), depend on the positions of its two ends; of convolutions each tap for itself. A residual stream is one
    set of neurons for all its blocks. Inputs and outputs keep their identity. Parameters of single units (biases,
    norms, running statistics, embeddings) are those of a neuron of the same bin. Weights without a mask stay dense. The
    model itself is not changed.

    Args:
        model: Any module that can be traced, of Linear layers, convolutions without groups, elementwise functions,
            average pooling, norms, embeddings, sums, products and concatenations. Not attention, whose units belong to
            heads. Sizes that its forward holds as numbers cannot follow another width.
        masks: Qualified weight name -> bool tensor of its shape.
        inputs: Samples [N, ...] of the model, of which two are run to read it. A model that begins with a Linear layer
            needs none.
        width: Hidden units over those of the model.
        bins: Largest number of positions of each hidden layer, or residual stream.
        seed: Of all random numbers; the global ones are not touched.
        fields: Which fields the weights are drawn from: "WED" is all three (density, energy, drift), "WE" leaves out
            the mean, "W" draws all weights of a layer with its own mean and variance. "degrees" uses no graphon: masks
            are random with the same degrees, neurons in another order in each of their two masks, and the kept weights
            in any order; of the same width only.
        scaling: "ntk" keeps the variance of every unit's input and the tangent kernel; "mup" scales the last layer's
            fluctuations by one over the width, so that features learn as in the wide network.
        positions: Rule of the bins, as in `layer_graphons`.

    Returns:
        The network, its masks, its learning-rate factors.

    Raises:
        ValueError: A layer that cannot be redrawn, a mask of something else, or an argument out of range.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> sibling = redraw_from_graphons(net, {"0.weight": torch.ones(8, 3).bool()}, width=0.5)
    >>> sibling.model[0].weight.shape, sibling.rates("sgd")["2.weight"]
    (torch.Size([4, 3]), 2.0)
    """
    check_choice("fields", fields, get_args(Fields))
    check_choice("scaling", scaling, get_args(Scaling))
    if not (width > 0 and math.isfinite(width)):
        raise ValueError(f"width is a ratio of hidden units and must be positive, got {width}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if fields == "degrees" and width != 1:
        raise ValueError(f"fields='degrees' keeps the degrees of a network, which another width cannot have: {width=}")
    samples = samples_for(model, inputs)
    units = Units(read_network(model, samples))
    full = _full_masks(model, units, masks)
    source = generator(seed, "redrawn network")
    if fields == "degrees":
        chosen, draws = degree_draws(units, full, source)
    else:
        chosen, draws = graphon_draws(units, full, source, width, bins, fields, scaling, positions)
    drawn = built(model, units, chosen, {name: weight for name, (_, weight) in draws.items()})
    kept = {
        name: draws[name][0].reshape(drawn.get_parameter(name).shape).to(mask.device) for name, mask in masks.items()
    }
    check_runs(drawn, model, samples)
    return Sibling(drawn, Masks(kept), scaling, units.ratios(chosen))


@checked
def sibling_optimizer(optimizer: Optimizer, model: nn.Module, sibling: Sibling) -> Optimizer:
    """An optimizer of the same class and settings for a sibling, with learning rates and decays for its width.

    Groups are split by factor. Decoupled decay, and that of SGD, is divided by the learning rate's factor, so that
    their product stays. Decay that Adam adds to the gradient keeps its share of it.

    Args:
        optimizer: Of the model, before its first step.
        model: From which the sibling was drawn.
        sibling: Of `redraw_from_graphons`.

    Raises:
        ValueError: An optimizer that has state already, whose learning rates cannot be scaled, or of another model.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> narrow = redraw_from_graphons(net, {"0.weight": torch.ones(8, 3).bool()}, width=0.5)
    >>> scaled = sibling_optimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, narrow)
    >>> [(group["lr"], len(group["params"])) for group in scaled.param_groups]
    [(0.1, 3), (0.2, 1)]
    """
    if any(optimizer.state.values()):
        raise ValueError(
            f"{type(optimizer).__name__} has state of earlier steps, which a redrawn network cannot take over"
        )
    kind = optimizer_kind(optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        part
        for group in optimizer.param_groups
        for part in split_group(
            group,
            names,
            dict(sibling.model.named_parameters()),
            sibling.rates(kind),
            _decays(optimizer, group, sibling),
        )
    ]
    return rebuilt(optimizer, groups)


def scale_updates(optimizer: Optimizer, model: nn.Module, sibling: Sibling) -> None:
    """Let an optimizer that others have built train a sibling at the learning rates and decays for its width.

    Steps are scaled as they are taken, so groups and schedulers stay as they are, as `sibling_optimizer` cannot do.

    Args:
        optimizer: Of the model, before its first step.
        model: Holds the sibling's parameters.
        sibling: Of `redraw_from_graphons`.

    Raises:
        ValueError: An optimizer whose learning rates cannot be scaled, or that adds its decay to the gradient.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> narrow = redraw_from_graphons(net, {"0.weight": torch.ones(8, 3).bool()}, width=0.5)
    >>> optimizer = torch.optim.SGD(narrow.model.parameters(), lr=0.1)
    >>> scale_updates(optimizer, narrow.model, narrow)
    >>> before = narrow.model[2].weight.clone()
    >>> narrow.model(torch.ones(1, 3)).sum().backward()
    >>> optimizer.step()
    >>> torch.allclose(before - narrow.model[2].weight, 0.2 * narrow.model[2].weight.grad)
    True
    """
    rates, names = sibling.rates(optimizer_kind(optimizer)), {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        if group.get("weight_decay") and not is_decoupled(optimizer, group):
            raise ValueError(
                f"{type(optimizer).__name__} adds its decay to the gradient, which scaled steps cannot undo: use "
                "sibling_optimizer, or an optimizer such as AdamW"
            )
    before: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def remember(*_: object) -> None:  # of all: gradients may come later, in the closure of the step
        before.update((p, p.clone()) for group in optimizer.param_groups for p in group["params"] if p in names)

    @torch.no_grad()
    def rescale(*_: object) -> None:
        for group in optimizer.param_groups:
            shrink = float(group["lr"]) * float(group.get("weight_decay") or 0.0)
            for parameter in (p for p in group["params"] if p in before):
                start, rate = before.pop(parameter), rates[names[parameter]]
                if parameter.grad is not None:  # decay stays as it is
                    parameter.copy_(start + rate * (parameter - start + shrink * start) - shrink * start)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(rescale)


def _decays(optimizer: Optimizer, group: Mapping[str, object], sibling: Sibling) -> dict[str, float]:
    kind = optimizer_kind(optimizer)
    if kind == "sgd" or not group.get("weight_decay") or is_decoupled(optimizer, group):
        return sibling.decays(kind)
    if sibling.scaling != "ntk":
        raise ValueError(
            f"{type(optimizer).__name__} adds its decay to the gradient, which scaling='mup' does not scale"
        )
    ratios = {name: sibling.ratios.get(name, (1.0, 1.0)) for name in sibling.rates(kind)}
    # Gradients grow by b^-1/2 and weights by a^-1/2.
    return {name: math.sqrt(inputs / outputs) for name, (inputs, outputs) in ratios.items()}


def _full_masks(model: nn.Module, units: Units, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A mask for each weight of the layers, in their order; all True where none is given."""
    weights = {matrix.step.weight_name: matrix.step.weight for matrix in units.matrices()}
    for name in masks:
        if name not in weights:
            raise ValueError(f"mask {name!r} is of no weight that is redrawn. {nearest(name, weights)}")
    fitting = Masks({name: mask != 0 for name, mask in masks.items()})
    fitting.pairs(model)  # refuses other shapes
    return {
        name: fitting[name] if name in fitting else torch.ones_like(w, dtype=torch.bool, requires_grad=False)
        for name, w in weights.items()
    }
