"""The Graphon NTK of a module: joint positions of its units, and the kernel of its masks and weights."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import checked, nearest
from lightning_graphon._shared.choices import Get, Parameterization, ParameterTerm, Positions, Propagate, Reduce
from lightning_graphon._shared.unmasked_zeros import warn_of_unmasked_zeros
from lightning_graphon.graphon import layer_graphons
from lightning_graphon.graphon.estimation.unit_bins import UnitPositions, unit_bins
from lightning_graphon.ntk.activations.base import DualActivation
from lightning_graphon.ntk.infinite.chain import ChainLayer, kept_variance, read_chain, with_own_parameters
from lightning_graphon.ntk.infinite.graphon_ntk import check_options, layers_kernel
from lightning_graphon.ntk.infinite.layer_building import build_layers
from lightning_graphon.ntk.infinite.layers import Layer
from lightning_graphon.ntk.infinite.network_drift import drift_network_kernel
from lightning_graphon.ntk.infinite.nodes.registry import build_nodes
from lightning_graphon.ntk.infinite.setting import Setting
from lightning_graphon.ntk.infinite.walk import Readout, network_kernel
from lightning_graphon.ntk.operators.tiling import TileShard
from lightning_graphon.tracing import NotReadableError, Trace, trace
from lightning_graphon.tracing.axes import same_units
from lightning_graphon.tracing.steps import Affine, Embedding, Pointwise
from lightning_graphon.tracing.tracer import refusal

_DEFAULT_BINS = 16
_ALTERNATIVE = "use `sampled_ntk` or `empirical_ntk`, which take any module"


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

    Every hidden layer gets positions that all of its masks share, a residual stream one set of them for all its blocks;
    inputs and outputs keep their identity. Biases
    enter with the mean of their squares and are trained; parameters with `requires_grad=False` add no parameter term.

    Args:
        model: Any network that can be traced and whose steps have a limit: Linear layers and convolutions, elementwise
            functions, average pooling, sums, products, concatenations, norms, fresh batch norm, attention, embeddings,
            and reshapes. What is read is checked against the module's own outputs.
        x: Samples [N, ...]; computed in float64.
        masks: Qualified weight name to tensor of its shape, non-zero where kept; weights without one are dense.
        bins: Largest number of positions of each hidden layer, or residual stream. Default: 64 for a chain of Linear
            layers, 16 for another network; for the drift, whose cells need many weights to tell a mean from noise, 8
            for a chain or a network with space or tokens, else 32.
        propagate: "energy" reads E[w²M] from the weights, the default: it describes the network that is trained.
            "density" is [P1]: weights independent of the mask. "drift" also reads E[wM] (see `graphon_ntk`).
        parameterization: "standard" or "ntk", as in `empirical_ntk`.
        reduce: "mean" over the outputs; None and "per_output" give each output's own kernel.
        positions: "degree", "energy" or "spectral", as in `layer_graphons`. Default: "degree"; for the drift "spectral"
            in a chain of Linear layers and sums of w·M in another network.
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
        UserWarning: No masks are given, and many weights are exactly zero; or an activation follows a sum that is not
            Gaussian, as in residual networks with activations after the sum.

    Raises:
        ValueError: Something in the module has no limit (the message names the layer and suggests `sampled_ntk` or
            `empirical_ntk`), or options.
        KeyError: A mask names no weight of a layer.

    >>> model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> graphon_ntk_from_model(model, torch.eye(3)).shape
    torch.Size([3, 3])
    >>> images = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    >>> graphon_ntk_from_model(images, torch.rand(4, 1, 6, 6)).shape
    torch.Size([4, 4])
    """
    check_options(propagate, parameterization, get, parameter_term, reduce)
    options = Options(bins, propagate, parameterization, positions, weight_variance, parameter_term)
    try:
        network = trace(model, x)
        _check_readout(network)
        full = _all_masks(network, masks)
        warn_of_unmasked_zeros({name: weight.detach() for name, weight in _weights(network).items()}, masks)
        # Float64 whatever the model's dtype: small eigenvalues need its digits.
        flat = x.detach().flatten(1).to(torch.float64)
        other = None if x2 is None else x2.detach().flatten(1).to(torch.float64)
        chain = read_chain(network)
        if chain is None:
            shard = TileShard.from_group(group)
            return _network_kernel(network, flat, other, full, options, reduce, get, max_memory, shard)
    except NotReadableError as error:
        raise ValueError(f"{error}; {_ALTERNATIVE}") from error
    layers = _chain_layers(chain, model, flat, full, options)
    duals: Sequence[DualActivation] = [layer.dual for layer in chain if layer.dual is not None]
    return layers_kernel(flat, layers, duals, reduce=reduce, x2=other, get=get, max_memory=max_memory, group=group)


class Options(NamedTuple):
    """Options of `graphon_ntk_from_model` that say which kernel it is."""

    bins: int | None
    propagate: Propagate
    parameterization: Parameterization
    positions: Positions | None
    weight_variance: float | None
    parameter_term: ParameterTerm


def _chain_layers(
    chain: list[ChainLayer], model: nn.Module, x: Tensor, masks: Mapping[str, Tensor], options: Options
) -> list[Layer]:
    drift = options.propagate == "drift"
    rule: Positions = options.positions or ("spectral" if drift else "degree")
    count = options.bins if options.bins is not None else (8 if drift else 64)
    own = {layer.step.weight_name: masks[layer.step.weight_name] for layer in chain}
    graphons = layer_graphons(own, model=model, bins=count, order="joint", positions=rule, drift=drift)
    needs_variance = options.propagate == "density" or options.parameterization == "ntk"
    variances = [
        options.weight_variance or (kept_variance(la, own[la.step.weight_name]) if needs_variance else 1.0)
        for la in chain
    ]
    layers = build_layers(
        list(graphons.values()), x, propagate=options.propagate, parameterization=options.parameterization,
        widths=[*(layer.step.fan_in for layer in chain), len(chain[-1].step.units)],
        weight_variance=variances, bias_variance=0.0, parameter_term=options.parameter_term, train_bias=False,
    )  # fmt: skip
    return [
        with_own_parameters(built, layer, options.parameterization, options.propagate)
        for built, layer in zip(layers, chain, strict=True)
    ]


def _network_kernel(
    network: Trace, x: Tensor, x2: Tensor | None, masks: Mapping[str, Tensor], options: Options,
    reduce: Reduce | None, get: Get, max_memory: int | None, shard: TileShard,
) -> Tensor:  # fmt: skip
    """Kernel of a network that is no chain."""
    drift = options.propagate == "drift"
    # Cells of a mean need many weights, which a layer of taps has fewer of.
    spread = any(isinstance(step, Affine) and step.positions > 1 for step in network.steps)
    default = (8 if spread else 32) if drift else _DEFAULT_BINS
    count = options.bins if options.bins is not None else default
    rule: UnitPositions = options.positions or ("drift" if drift else "degree")
    bin_of = unit_bins(network, masks, count, rule)
    if reduce == "mean" and not drift:
        bin_of = _outputs_in_one_bin(network, bin_of)
    setting = Setting(
        network, bin_of, same_units(network), masks, options.propagate, options.parameterization,
        options.weight_variance, options.parameter_term,
    )  # fmt: skip
    nodes, output = build_nodes(setting), network.output
    if not nodes[output.index].gaussian:
        raise refusal(f"{nodes[output.index].step.label} at the end, after an activation and without a last layer,")
    bins = nodes[output.index].bin_of_unit[output.unit[0].reshape(-1)]
    mean = reduce == "mean"
    for node in nodes:
        node.move(x.device)
    readout = Readout(bins.to(x.device), output.position[0].reshape(-1).to(x.device), output.index)
    with nullcontext() if x.device.type == "cpu" else x.device:  # also for indices that are made on the way
        if drift and get == "ntk":
            kernel = drift_network_kernel(nodes, readout, x, x2, mean=mean, max_memory=max_memory, shard=shard)
        else:
            kernel = network_kernel(nodes, readout, x, x2, get=get, mean=mean, max_memory=max_memory, shard=shard)
    return kernel[0] if reduce == "mean" else kernel


def _outputs_in_one_bin(network: Trace, bin_of: Tensor) -> Tensor:
    """Bins where the outputs of the last layer share one, as only their mean is asked for: all of its units, once."""
    step, output = network.output.step, network.output
    read = any(output.index in other.inputs for other in network.steps)
    elsewhere = any(other is not step and bool(torch.isin(step.units, other.units).any()) for other in network.steps)
    whole = output.codes[0].unique().numel() == output.codes[0].numel() == len(step.units) * step.positions
    if not isinstance(step, Affine) or read or elsewhere or not whole:
        return bin_of
    return bin_of.index_fill(0, step.units, int(bin_of[step.units].min()))


def _check_readout(network: Trace) -> None:
    step = network.output.step
    if isinstance(step, Pointwise):
        raise NotReadableError(
            f"{step.label}: an activation follows the last layer, but the kernel is that of a linear readout: return "
            "the logits"
        )
    if not any(isinstance(step, Affine) for step in network.steps):
        raise refusal("a network without a Linear layer or convolution")
    outside = bool((network.output.codes < 0).any())
    if outside or not torch.equal(
        network.output.sample[:, None].flatten(2)[..., 0].reshape(-1), torch.arange(len(network.output.codes))
    ):
        raise refusal("an output whose first axis is not that of the samples")


def _weights(network: Trace) -> dict[str, Tensor]:
    """Weights that may have a mask, by name."""
    return {s.weight_name: s.weight for s in network.steps if isinstance(s, (Affine, Embedding))}


def _all_masks(network: Trace, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A bool mask for every layer; all ones where none is given."""
    given, full = dict(masks or {}), {}
    for name, weight in _weights(network).items():
        mask = given.pop(name, None)
        mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
        full[name] = mask if mask.dtype == torch.bool else mask != 0
    if given:
        name = next(iter(given))
        raise KeyError(f"mask {name!r} names no weight of a layer that is read. {nearest(name, full)}")
    return full
