"""Networks that are chains of Linear layers, which have a recursion of their own.

It has the inputs in a Gram matrix, and squared distances in place of covariances, so that near-duplicates keep their
digits.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from lightning_graphon._shared.choices import Parameterization, Propagate
from lightning_graphon.ntk.activations.base import DualActivation
from lightning_graphon.ntk.activations.registry import dual_activation
from lightning_graphon.ntk.infinite.layers import Layer
from lightning_graphon.ntk.infinite.nodes.pointwise import read_dual
from lightning_graphon.tracing import Trace
from lightning_graphon.tracing.steps import Affine, Input, Pointwise, Step


@dataclass(frozen=True)
class ChainLayer:
    """One Linear layer of a chain.

    Attributes:
        step: The layer.
        dual: Activation after it; None after the last.
    """

    step: Affine
    dual: DualActivation | None


def read_chain(trace: Trace) -> list[ChainLayer] | None:
    """Linear layers in order, with the activations between them; None of a network that is no such chain."""
    steps = trace.steps
    if not all(step.inputs == (number - 1,) for number, step in enumerate(steps) if number):
        return None
    if not isinstance(steps[0], Input) or not isinstance(steps[-1], Affine) or not _in_order(trace):
        return None
    layers: list[ChainLayer] = []
    for before, step in pairwise(steps):
        if isinstance(step, Affine) and _reads_all(step, before):
            layers.append(ChainLayer(step, dual_activation("identity")))
        elif isinstance(step, Pointwise) and isinstance(before, Affine):
            layers[-1] = replace(layers[-1], dual=read_dual(step))
        else:
            return None
    layers[-1] = replace(layers[-1], dual=None)
    return layers


def _in_order(trace: Trace) -> bool:
    codes = trace.output.codes.flatten(1)
    return torch.equal(codes, torch.arange(codes.numel()).reshape(codes.shape))


def _reads_all(step: Affine, before: Step) -> bool:
    """Whether the features are the units in order, or the entries of the flattened samples."""
    if step.positions != 1 or step.weight.ndim != 2 or step.rows is not None:
        return False
    places = step.taps[step.tap_of, 0]
    entries = before.entries if isinstance(before, Input) else torch.arange(len(before.units))[:, None]
    if entries.shape != (len(before.units), before.positions):
        return False
    return torch.equal(entries[step.features, places], torch.arange(step.weight.shape[1]))


def kept_variance(layer: ChainLayer, mask: Tensor) -> float:
    """Fan-in times the mean square of the kept weights."""
    kept = layer.step.weight.detach()[mask].to(torch.float64)
    return layer.step.fan_in * float(kept.square().mean()) if len(kept) else 0.0


def with_own_parameters(
    built: Layer, layer: ChainLayer, parameterization: Parameterization, propagate: Propagate
) -> Layer:
    """The layer with the module's own biases, and without parameter terms of frozen parameters."""
    weight, bias = layer.step.weight, layer.step.bias
    changes: dict[str, object] = {}
    if not weight.requires_grad:
        changes |= {"parameter_map": torch.zeros_like(built.parameter_map), "ratio": 0.0}
    if bias is not None:
        b = bias.detach().to(built.bias_variance)
        # Hidden neurons are exchangeable, so their biases enter with the mean over the layer.
        own = len(b) == len(built.bias_variance) and layer.dual is None  # outputs keep their identity
        mean = b if own else b.mean().expand_as(built.bias_variance)
        square = b.square() if own else b.square().mean().expand_as(built.bias_variance)
        # Without drift pre-activations are centred by definition, so a bias enters with its second moment.
        drift = propagate == "drift"
        changes |= {"bias_variance": (square - mean.square()).clamp_min(0) if drift else square}
        if drift:
            changes |= {"bias_mean": mean}
        gamma = 1.0 if parameterization == "standard" else float(b.square().mean())
        changes |= {"bias_term": gamma if bias.requires_grad else 0.0}
    return replace(built, **changes)  # type: ignore[arg-type]
