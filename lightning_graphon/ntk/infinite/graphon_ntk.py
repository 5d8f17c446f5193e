r"""The Graphon NTK: the tangent kernel of an infinitely wide network whose masks follow step graphons.

[P1] is Pham et al., *The Graphon Limit Hypothesis* (NeurIPS 2025, arXiv:2510.17515), section 5. With n_l units in
layer l, densities W, energies E = E[w²M], positions u (outputs), v (inputs):

.. math::
    \tildeΣ^{(l)}(u) = n_{l-1}\int E^{(l)}(u,v) Σ^{(l-1)}(v)\,dv + σ_b^2, \qquad
    T^{(l)}(u) = γ_l n_{l-1}\int W^{(l)} Σ^{(l-1)}\,dv + γ_b + n_{l-1}\int E^{(l)} \dotΣ^{(l-1)} T^{(l-1)}\,dv

and Θ = T of the last layer. γ_l = σ_w²/n_{l-1}, γ_b = σ_b² in the NTK parameterisation; both 1 in torch's own.
"""

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon._shared.choices import Get, Parameterization, ParameterTerm, Propagate, Reduce
from lightning_graphon.graphon import StepGraphon
from lightning_graphon.ntk.activations.base import DualActivation
from lightning_graphon.ntk.activations.registry import ActivationLike, dual_activation
from lightning_graphon.ntk.infinite.drift import drift_kernel
from lightning_graphon.ntk.infinite.layer_building import build_layers
from lightning_graphon.ntk.infinite.layers import Layer, merge_positions
from lightning_graphon.ntk.infinite.recursion import diagonals, tile_edge, tile_kernel, weighted_rows
from lightning_graphon.ntk.operators.tiling import TileShard, tiles


@checked
def graphon_ntk(
    x: Tensor,
    graphons: Sequence[StepGraphon] | Mapping[str, StepGraphon],
    *,
    activation: ActivationLike | Sequence[ActivationLike] = "relu",
    weight_variance: float | Sequence[float] = 2.0,
    bias_variance: float | Sequence[float] = 0.0,
    propagate: Propagate = "density",
    parameterization: Parameterization = "ntk",
    widths: Sequence[int] | None = None,
    reduce: Reduce | None = "mean",
    x2: Tensor | None = None,
    get: Get = "ntk",
    parameter_term: ParameterTerm = "kept",
    train_bias: bool | None = None,
    max_memory: int | None = None,
    group: object | None = None,
) -> Tensor:
    """Kernel of the infinitely wide masked network between all pairs of samples.

    Args:
        x: Samples [N, d], floating point; the kernel has its dtype and device. Use float64: float32
            eigenvalues below 1e-6 of the largest are noise.
        graphons: L+1 of them for L hidden layers, input side first. Rows are a layer's outputs, columns its inputs: the
            first one's columns are the d inputs (or one column for all), the last one's rows the C outputs (or one row
            for all). In between, the rows of one and the columns of the next are the same positions, as
            `layer_graphons(masks, order="joint")` makes them.
        activation: Name, torch function, module or `DualActivation`; or one per hidden layer.
        weight_variance: σ_w², one number or one per layer; unused where `propagate` reads energies and the
            parameterisation is "standard".
        bias_variance: σ_b², one number or one per layer.
        propagate: "density" is [P1]: weights independent of the mask, E = σ_w² W / n_{l-1}. "energy" uses the graphons'
            `energy`. "drift" uses `energy` and `drift`: the kept weights have a mean, so pre-activations and
            back-propagated signals are not centred (the rows of the last graphon must be the outputs).
        parameterization: "ntk" (w = σ_w ω/√n, γ = σ_w²/n) or "standard" (torch's own, γ = 1, the kernel of
            SGD).
        widths: Fan-in of every layer, n_0, ..., n_L (a last n_{L+1} is allowed); n_0 defaults to d.
            Needed wherever they do not cancel: "standard", "energy" and "drift".
        reduce: "mean" over the outputs. None and "per_output" are the same here: each output's own kernel, as outputs
            do not mix in the limit.
        x2: Other samples [M, d]; the kernel between `x` and `x2` then.
        get: "ntk", or "nngp" for the covariance of the outputs.
        parameter_term: "kept": only kept weights are trained, as in a network with masks. "all" is [P1]'s literal
            formula without W in front of Σ: for the constant graphon c it gives c^L Θ_dense.
        train_bias: Whether biases are trained. Default: when `bias_variance` is positive.
        max_memory: Bytes for temporary tensors. Default: what fits the cache.
        group: `TileShard` or process group of torch.distributed among which the tiles are divided, with the same `x`
            and `graphons` on all; the kernel is gathered.

    Returns:
        [N, N], [N, M] with `x2`; with `reduce=None` a leading dimension C. Differentiable in `x` and in the values and
        energies of the graphons; then it is computed in one piece, and `max_memory` and `group` have no effect.

    Raises:
        ValueError: Shapes, options or missing widths, energies or drifts; the message names the layer.

    >>> x, half, dense = torch.eye(2, dtype=torch.float64), StepGraphon([[0.5]]), StepGraphon([[1.0]])
    >>> graphon_ntk(x, [half, half]) / graphon_ntk(x, [dense, dense])
    tensor([[0.2500, 0.2500],
            [0.2500, 0.2500]], dtype=torch.float64)
    """
    check_options(propagate, parameterization, get, parameter_term, reduce)
    _check_samples(x, x2)
    in_order = list(graphons.values()) if isinstance(graphons, Mapping) else graphons
    layers = build_layers(
        in_order, x, propagate=propagate, parameterization=parameterization, widths=widths,
        weight_variance=weight_variance, bias_variance=bias_variance,
        parameter_term=parameter_term, train_bias=train_bias,
    )  # fmt: skip
    duals = resolve_activations(activation, len(layers) - 1)
    return layers_kernel(x, layers, duals, reduce=reduce, x2=x2, get=get, max_memory=max_memory, group=group)


def check_options(
    propagate: Propagate,
    parameterization: Parameterization,
    get: Get,
    parameter_term: ParameterTerm,
    reduce: Reduce | None,
) -> None:
    """Check the options that `graphon_ntk` and `graphon_ntk_from_model` share."""
    check_choice("propagate", propagate, get_args(Propagate))
    check_choice("parameterization", parameterization, get_args(Parameterization))
    check_choice("get", get, get_args(Get))
    check_choice("parameter_term", parameter_term, get_args(ParameterTerm))
    check_choice("reduce", "per_output" if reduce is None else reduce, get_args(Reduce))


def layers_kernel(
    x: Tensor, layers: Sequence[Layer], duals: Sequence[DualActivation], *,
    reduce: Reduce | None, x2: Tensor | None, get: Get, max_memory: int | None, group: object | None,
) -> Tensor:  # fmt: skip
    """`graphon_ntk` of layers that are already built."""
    shard = TileShard.from_group(group)
    if layers[-1].mean_map is not None:
        return drift_kernel(x, layers, duals, reduce=reduce, x2=x2, get=get, max_memory=max_memory, shard=shard)
    if reduce == "mean":
        layers = [*layers[:-1], layers[-1].averaged()]
    # Merged positions share one row: the gradient of each would be lost in that of the first.
    layers = layers if _graphons_require_grad(layers) else merge_positions(layers)
    result = _centred_kernel(x, x2, layers, duals, get, max_memory, shard)
    return result[0] if reduce == "mean" else result


def _graphons_require_grad(layers: Sequence[Layer]) -> bool:
    return torch.is_grad_enabled() and any(
        la.covariance_map.requires_grad or la.parameter_map.requires_grad for la in layers
    )


def _centred_kernel(
    x: Tensor, x2: Tensor | None, layers: Sequence[Layer], duals: Sequence[DualActivation],
    get: Get, max_memory: int | None, shard: TileShard,
) -> Tensor:  # fmt: skip
    # The diagonal is O(N) and shared by all tiles.
    y = x if x2 is None else x2
    dx = diagonals(x, layers, duals)
    dy = dx if x2 is None else diagonals(y, layers, duals)
    if _graphons_require_grad(layers) or (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)):
        everything = slice(None)
        whole = tile_kernel(weighted_rows(x, layers[0]), dx, dy, everything, everything, layers, duals, get)
        return whole if x2 is not None else 0.5 * (whole + whole.mT)
    positions = max(len(layer.covariance_map) for layer in layers)
    edge = shard.edge(tile_edge(positions, x.element_size(), x.device.type, max_memory), max(len(x), len(y)))
    out = x.new_zeros(len(layers[-1].covariance_map), len(x), len(y))
    weighted, weighted_for = x.new_empty(0), None  # tiles of the same rows share their left factor
    for rows, cols in shard.mine(tiles(len(x), len(y), edge, symmetric=x2 is None)):
        if rows != weighted_for:
            weighted, weighted_for = weighted_rows(x[rows], layers[0]), rows
        block = tile_kernel(weighted, dx, dy, rows, cols, layers, duals, get)
        # Only the lower triangle is computed; tiles on the diagonal are symmetric up to rounding.
        diagonal = x2 is None and rows == cols
        out[:, rows, cols] = 0.5 * (block + block.mT) if diagonal else block
        if x2 is None and not diagonal:
            out[:, cols, rows] = block.mT
    return shard.collect(out)


def resolve_activations(activation: ActivationLike | Sequence[ActivationLike], hidden: int) -> list[DualActivation]:
    """One dual activation for each of `hidden` layers."""
    if isinstance(activation, (list, tuple)):
        if len(activation) != hidden:
            raise ValueError(f"{len(activation)} activations for {hidden} hidden layers; give one, or one per layer")
        return [dual_activation(a) for a in activation]
    return [dual_activation(activation)] * hidden  # type: ignore[arg-type]


def _check_samples(x: Tensor, x2: Tensor | None) -> None:
    for name, t in (("x", x), ("x2", x2)):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.ndim != 2 or not t.is_floating_point():
            shown = f"{tuple(t.shape)} of {t.dtype}" if isinstance(t, Tensor) else repr(type(t).__name__)
            raise ValueError(f"{name} must be a floating-point tensor [N, d], got {shown}; flatten your samples")
    if x2 is not None and x2.shape[1] != x.shape[1]:
        raise ValueError(f"x has {x.shape[1]} inputs but x2 has {x2.shape[1]}")
