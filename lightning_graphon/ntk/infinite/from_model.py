"""The Graphon NTK of a module: joint graphons of its masks and weights, and their kernel."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import checked, nearest
from lightning_graphon._shared.choices import Get, Parameterization, ParameterTerm, Positions, Propagate, Reduce
from lightning_graphon._shared.unmasked_zeros import warn_of_unmasked_zeros
from lightning_graphon.graphon import layer_graphons
from lightning_graphon.ntk.activations.base import DualActivation
from lightning_graphon.ntk.infinite.chain import Affine, read_chain
from lightning_graphon.ntk.infinite.graphon_ntk import check_options, layers_kernel
from lightning_graphon.ntk.infinite.layer_building import build_layers
from lightning_graphon.ntk.infinite.layers import Layer


@checked
def graphon_ntk_from_model(
    model: nn.Module,
    x: Tensor,
    masks: Mapping[str, Tensor] | None = None,
    *,
    bins: int | None = None,
    propagate: Propagate = "energy",
    parameterization: Parameterization = "standard",
    reduce: Reduce | None = "mean",
    positions: Positions | None = None,
    weight_variance: float | None = None,
    parameter_term: ParameterTerm = "kept",
    x2: Tensor | None = None,
    get: Get = "ntk",
    max_memory: int | None = None,
    group: object | None = None,
) -> Tensor:
    """Infinite-width kernel of the masked network of which the module is one draw.

    Every hidden layer gets positions that both of its masks share; inputs and outputs keep their identity. Biases
    enter with the mean of their squares and are trained; parameters with `requires_grad=False` add no parameter term.

    Args:
        model: A chain of Linear layers and elementwise activations; Flatten, Identity and Dropout are ignored.
        x: Samples [N, ...], flattened to the first layer's inputs; computed in float64.
        masks: Qualified weight name to tensor of its shape, non-zero where kept; weights without one are dense.
        bins: Largest number of positions of each hidden layer. Default: 64; 8 for the drift, whose cells need many
            weights to tell a mean from noise.
        propagate: "energy" reads E[w²M] from the weights, the default: it describes the network that is trained.
            "density" is [P1]: weights independent of the mask. "drift" also reads E[wM] (see `graphon_ntk`).
        parameterization: "standard" or "ntk", as in `empirical_ntk`.
        reduce: "mean" over the outputs; None and "per_output" give each output's own kernel.
        positions: "degree", "energy" or "spectral", as in `layer_graphons`. Default: "spectral" for the drift, else
            "degree".
        weight_variance: σ_w² (variance of a weight times its fan-in) for "density" and "ntk"; by default fan-in times
            the mean square of each layer's kept weights.
        parameter_term: "kept", or "all" for [P1]'s literal formula.
        x2: Other samples [M, ...].
        get: "ntk", or "nngp" for the covariance of the outputs.
        max_memory: Bytes for temporary tensors.
        group: As in `graphon_ntk`.

    Returns:
        [N, N], [N, M] with `x2`, with a leading C for `reduce=None`; float64, on the device of `x`.

    Warns:
        UserWarning: No masks are given, and many weights are exactly zero.

    Raises:
        ValueError: The module is not such a chain (the message names the layer and suggests `empirical_ntk`), or
            options.
        KeyError: A mask names no Linear weight of the chain.

    >>> model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> graphon_ntk_from_model(model, torch.eye(3)).shape
    torch.Size([3, 3])
    """
    check_options(propagate, parameterization, get, parameter_term, reduce)
    chain = read_chain(model, x)
    warn_of_unmasked_zeros({layer.weight_name: layer.module.weight.detach() for layer in chain}, masks)
    # The chain needs a mask of each layer, so that neurons of dense layers have positions too.
    full = _all_masks(chain, masks)
    # Float64 whatever the model's dtype: small eigenvalues need its digits.
    flat = x.detach().flatten(1).to(torch.float64)
    other = None if x2 is None else x2.detach().flatten(1).to(torch.float64)
    rule: Positions = positions or ("spectral" if propagate == "drift" else "degree")
    count = bins if bins is not None else (8 if propagate == "drift" else 64)
    drift, needs_variance = propagate == "drift", propagate == "density" or parameterization == "ntk"
    graphons = layer_graphons(full, model=model, bins=count, order="joint", positions=rule, drift=drift)
    variances = [weight_variance or (_variance(a, full[a.weight_name]) if needs_variance else 1.0) for a in chain]
    layers = build_layers(
        list(graphons.values()), flat, propagate=propagate, parameterization=parameterization,
        widths=[*(a.module.in_features for a in chain), chain[-1].module.out_features],
        weight_variance=variances, bias_variance=0.0, parameter_term=parameter_term, train_bias=False,
    )  # fmt: skip
    layers = [_with_own_parameters(la, a, parameterization, propagate) for la, a in zip(layers, chain, strict=True)]
    duals: Sequence[DualActivation] = [a.dual for a in chain if a.dual is not None]
    return layers_kernel(flat, layers, duals, reduce=reduce, x2=other, get=get, max_memory=max_memory, group=group)


def _all_masks(chain: list[Affine], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A bool mask for every layer of the chain; all ones where none is given."""
    given = dict(masks or {})
    full = {}
    for layer in chain:
        mask = given.pop(layer.weight_name, None)
        if mask is None:
            mask = torch.ones_like(layer.module.weight, dtype=torch.bool)
        full[layer.weight_name] = mask if mask.dtype == torch.bool else mask != 0
    if given:
        name = next(iter(given))
        raise KeyError(f"mask {name!r} names no Linear weight of the chain. {nearest(name, full)}")
    return full


def _variance(layer: Affine, mask: Tensor) -> float:
    """Fan-in times the mean square of the kept weights."""
    kept = layer.module.weight.detach()[mask].to(torch.float64)
    return layer.module.in_features * float(kept.square().mean()) if len(kept) else 0.0


def _with_own_parameters(
    built: Layer, layer: Affine, parameterization: Parameterization, propagate: Propagate
) -> Layer:
    """The layer with the module's own biases, and without parameter terms of frozen parameters."""
    weight, bias = layer.module.weight, layer.module.bias
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
