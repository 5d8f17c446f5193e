"""Build the matrices of `Layer` from graphons and options."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_graphon._shared.choices import Parameterization, ParameterTerm, Propagate
from lightning_graphon.graphon import StepGraphon
from lightning_graphon.ntk.infinite.layers import Layer, expand_inputs


def build_layers(
    graphons: Sequence[StepGraphon], x: Tensor, *, propagate: Propagate, parameterization: Parameterization,
    widths: Sequence[int] | None,
    weight_variance: float | Sequence[float], bias_variance: float | Sequence[float],
    parameter_term: ParameterTerm, train_bias: bool | None,
) -> list[Layer]:  # fmt: skip
    """Check the chain of graphons and give one `Layer` for each.

    Raises:
        ValueError: The message names the layer.
    """
    _check_chain(graphons, x.shape[1])
    fan_ins = _fan_ins(widths, len(graphons), x.shape[1])
    variances = _per_layer("weight_variance", weight_variance, len(graphons))
    biases = _per_layer("bias_variance", bias_variance, len(graphons))
    layers = []
    for i, (g, variance, bias, fan_in) in enumerate(zip(graphons, variances, biases, fan_ins, strict=True)):
        # Only a kernel with drift counts the units of a layer's outputs.
        fan_out = widths[i + 1] if widths is not None and i + 1 < len(widths) else None
        layer = _layer(i, g, x, propagate, parameterization, variance, bias, fan_in, parameter_term, train_bias)
        layers.append(_with_drift(i, layer, g, fan_in, fan_out) if propagate == "drift" else layer)
    layers[0] = expand_inputs(layers[0], x.shape[1])
    return layers


def _layer(
    index: int, g: StepGraphon, x: Tensor, propagate: Propagate, parameterization: Parameterization, variance: float,
    bias: float, fan_in: int | None, parameter_term: ParameterTerm, train_bias: bool | None,
) -> Layer:  # fmt: skip
    # In the dtype of the samples, which is that of the kernel.
    values, rows, cols = (_like(t, x) for t in (g.values, g.row_measure, g.col_measure))
    density = values * cols
    if propagate == "density":  # E = σ_w² W / n_in, so the fan-in cancels
        covariance_map = variance * density
    else:
        covariance_map = (
            _require_fan_in(fan_in, index, f"propagate={propagate!r}") * _like(_field(g, "energy", index), x) * cols
        )
    standard = parameterization == "standard"
    gamma = float(_require_fan_in(fan_in, index, "parameterization='standard'")) if standard else variance
    all_move = parameter_term == "all"
    parameter_map = gamma * (cols.expand_as(density) if all_move else density)
    # Where the two maps are proportional, the recursion needs one product with them in place of two.
    ratio = gamma / variance if propagate == "density" and not all_move and variance > 0 else None
    trained = bias > 0 if train_bias is None else train_bias
    bias_term = float(trained) * (bias if parameterization == "ntk" else 1.0)
    return Layer(covariance_map, parameter_map, torch.full_like(rows, bias), bias_term, ratio, rows)


def _with_drift(index: int, layer: Layer, g: StepGraphon, fan_in: int | None, fan_out: int | None) -> Layer:
    drift = _like(_field(g, "drift", index), layer.covariance_map)
    cols = _like(g.col_measure, layer.covariance_map)
    units = _require_fan_in(fan_in, index, "propagate='drift'")
    _check_moments(index, _like(_field(g, "energy", index), layer.covariance_map), drift)
    return replace(
        layer, mean_map=units * drift * cols, mean_square_map=units * drift.square() * cols,
        bias_mean=torch.zeros_like(layer.bias_variance), units=fan_out,
    )  # fmt: skip


def _check_moments(index: int, energy: Tensor, drift: Tensor) -> None:
    bad = (drift.square() > energy * (1 + 1e-5)).nonzero()  # Jensen; means in float32 are off by less
    if len(bad):
        u, v = bad[0].tolist()
        raise ValueError(
            f"graphon {index}: the square of the drift {float(drift[u, v]):.4g} is larger than the energy "
            f"{float(energy[u, v]):.4g} in cell ({u}, {v}), one of {len(bad)} such; no weights have these moments, "
            "since energy is the mean of w²·M and drift that of w·M over the same cell"
        )


def _like(t: object, x: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=x.dtype, device=x.device)


def _field(g: StepGraphon, name: str, index: int) -> object:
    value = getattr(g, name)
    if value is None:
        raise ValueError(
            f"graphon {index} has no {name}, which this `propagate` reads; estimate it from weights: "
            "layer_graphons(masks, model=model) fills energy and drift in"
        )
    return value


def _require_fan_in(fan_in: int | None, index: int, why: str) -> int:
    if fan_in is None:
        raise ValueError(f"{why} needs the fan-in of layer {index}; pass widths=[n_0, ..., n_L]")
    return fan_in


def _fan_ins(widths: Sequence[int] | None, count: int, inputs: int) -> list[int | None]:
    if widths is None:
        return [inputs, *[None] * (count - 1)]
    if len(widths) not in (count, count + 1):
        raise ValueError(f"widths must be n_0, ..., n_L for {count} graphons, {count} numbers, got {list(widths)}")
    if widths[0] != inputs:
        raise ValueError(f"widths[0] = {widths[0]} but the samples have {inputs} inputs")
    return [int(n) for n in widths[:count]]


def _per_layer(name: str, value: float | Sequence[float], count: int) -> list[float]:
    values = [float(value)] * count if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != count:
        raise ValueError(f"{name} must be one number or {count}, one per layer, got {len(values)}")
    for i, v in enumerate(values):
        if not 0 <= v < float("inf"):
            raise ValueError(f"{name} of layer {i} must be finite and at least 0, got {v}")
    return values


def _check_chain(graphons: Sequence[StepGraphon], inputs: int) -> None:
    if len(graphons) == 0:
        raise ValueError("graphon_ntk needs at least one graphon, the readout's")
    shapes = [tuple(torch.as_tensor(g.values).shape) for g in graphons]
    if shapes[0][1] not in (1, inputs):
        raise ValueError(
            f"graphon 0 has {shapes[0][1]} columns but the samples have {inputs} inputs; inputs are not "
            "exchangeable: give one column for each, or one column for all"
        )
    for i in range(1, len(shapes)):
        if shapes[i][1] != shapes[i - 1][0]:
            raise ValueError(
                f"graphon {i} has {shapes[i][1]} columns but graphon {i - 1} has {shapes[i - 1][0]} rows; they "
                "must be the same positions: estimate them with layer_graphons(..., order='joint')"
            )
        left, right = (
            torch.as_tensor(t, dtype=torch.float64).cpu()
            for t in (graphons[i - 1].row_measure, graphons[i].col_measure)
        )
        if not torch.allclose(left, right, rtol=1e-5, atol=1e-8):  # float32 graphons are fine
            raise ValueError(
                f"the rows of graphon {i - 1} and the columns of graphon {i} have different measures; they must "
                "be the same positions: estimate them with layer_graphons(..., order='joint')"
            )
