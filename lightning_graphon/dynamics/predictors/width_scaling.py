r"""How learning rates and decay change with width, and what two narrow networks say of a wide one.

One formula serves input, hidden and output layers. With the ratios a of a layer's inputs and b of its outputs to those
of the wide network (1 for the network's own inputs and outputs, and a = 1 for biases and norms), learning rates get

========= ================ =========
scaling   SGD              Adam
========= ================ =========
"ntk"     1 / a            b^-½ / a
"mup"     b / a            1 / a
========= ================ =========
"""

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from lightning_graphon._shared.checks import check_choice, checked

Scaling: TypeAlias = Literal["ntk", "mup"]
OptimizerKind: TypeAlias = Literal["sgd", "adam"]
_ADAPTIVE = (Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, Adadelta, RMSprop, Rprop)
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lr")


def rate_factor(inputs: float, outputs: float, kind: OptimizerKind, scaling: Scaling) -> float:
    """Factor of a parameter's learning rate, for the ratios of its inputs and outputs to those of the wide network.

    >>> [rate_factor(a, b, "adam", "mup") for a, b in ((1, 0.25), (0.25, 0.25), (0.25, 1))]
    [1.0, 4.0, 4.0]
    """
    check_choice("optimizer kind", kind, get_args(OptimizerKind))
    powers = {("ntk", "sgd"): 0.0, ("ntk", "adam"): -0.5, ("mup", "sgd"): 1.0, ("mup", "adam"): 0.0}
    return float(outputs ** powers[scaling, kind] / inputs)


def optimizer_kind(optimizer: Optimizer) -> OptimizerKind:
    """Kind "adam" where a step does not grow with the gradient, "sgd" where it grows in proportion.

    Classes that are not torch's are asked by one step of a copy on two numbers.

    Raises:
        ValueError: An optimizer whose steps do neither, or that needs a closure.

    >>> optimizer_kind(SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    'sgd'
    """
    if isinstance(optimizer, _ADAPTIVE):
        return "adam"
    if isinstance(optimizer, SGD | ASGD):
        return "sgd"
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise ValueError(f"{name} searches along a line: there is no learning rate that a narrow network could scale")
    try:
        small, large = (_one_step(optimizer, gradient) for gradient in (1.0, 4.0))
        ratio = large / small
    except Exception as error:
        raise ValueError(
            f"{name} cannot step on a single number ({error}): its learning rates are not scaled"
        ) from error
    for kind, expected in (("adam", 1.0), ("sgd", 4.0)):
        if abs(ratio - expected) < 0.01:
            return kind  # type: ignore[return-value]
    raise ValueError(
        f"{name} is neither like SGD nor like Adam: a gradient 4 times as large moves {ratio:.3g} times as far"
    )


def _one_step(optimizer: Optimizer, gradient: float) -> float:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    # Decay moves a parameter whatever the gradient.
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} | {"weight_decay": 0.0}
    copy = rebuilt(optimizer, [{**group, "params": [parameter]}])
    parameter.grad = torch.full_like(parameter, gradient)
    copy.step()
    return 1.0 - float(parameter.detach())


def rebuilt(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """A new optimizer of the same class with other parameter groups, without state."""
    taken = inspect.signature(type(optimizer)).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    # AdamW's defaults hold settings that its constructor does not take.
    settings = {k: v for k, v in optimizer.defaults.items() if anything or k in taken}
    return type(optimizer)(groups, **settings)


def is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weight decay shrinks weights by itself, and is not added to the gradient."""
    if isinstance(optimizer, AdamW):
        return True
    if type(optimizer).__module__.startswith("torch.optim"):
        return bool(group.get("decoupled_weight_decay", False))
    return bool(group.get("decoupled_weight_decay", True))  # of later optimizers (Lion, AdaBelief) nearly all are


def split_group(
    group: Mapping[str, Any], names: Mapping[int, str], parameters: Mapping[str, nn.Parameter],
    rates: Mapping[str, float], decays: Mapping[str, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """A parameter group as groups for parameters of the same names in another network, one for each factor.

    Args:
        group: Of the wide network's optimizer.
        names: `id` of the wide network's parameters -> name.
        parameters: Of the narrow network, by name.
        rates: Factor of each learning rate.
        decays: Factor of each weight decay.

    Raises:
        ValueError: The group has a parameter that has no name here.
    """
    parts: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in group["params"]:
        if id(parameter) not in names:
            raise ValueError(f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the model's")
        name = names[id(parameter)]
        parts[rates[name], decays[name]].append(parameters[name])
    return [_scaled(group, rate, decay, part) for (rate, decay), part in parts.items()]


def _scaled(group: Mapping[str, Any], rate: float, decay: float, part: list[nn.Parameter]) -> dict[str, Any]:
    scaled = {key: group[key] * rate for key in _RATES if key in group}
    if group.get("weight_decay"):
        scaled["weight_decay"] = group["weight_decay"] * decay
    return {**group, **scaled, "params": part}


@checked
def extrapolate_widths(wider: Tensor, narrower: Tensor, ratios: tuple[float, float] = (1 / 4, 1 / 8)) -> Tensor:
    """Losses of the network itself from those of two narrower siblings, whose log is off by a multiple of 1 / width.

    `log L(1) = log L(r1) + (1/r1 - 1) / (1/r2 - 1/r1) (log L(r1) - log L(r2))`; for a quarter and an eighth the
    factor is 3/4.

    Args:
        wider: Losses [...] of the sibling of ratio r1, not negative; a diverged one may be infinite or NaN.
        narrower: Losses of that shape of the sibling of ratio r2.
        ratios: Widths (r1, r2) over that of the network, r1 > r2.

    Returns:
        Losses of that shape, float64; infinite where a sibling diverged.

    Raises:
        ValueError: Ratios that do not fall, shapes that differ, or a negative loss.

    >>> extrapolate_widths(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor([1.0000, 1.1892], dtype=torch.float64)
    """
    first, second = ratios
    if not first > second > 0:
        raise ValueError(f"ratios must fall and be positive, as (1/4, 1/8), got {ratios}")
    if wider.shape != narrower.shape:
        raise ValueError(f"wider and narrower differ in shape: {tuple(wider.shape)} and {tuple(narrower.shape)}")
    if bool((wider < 0).any()) or bool((narrower < 0).any()):
        raise ValueError("losses must not be negative: their logarithms are extrapolated")
    a, b = (losses.double() for losses in (wider, narrower))
    diverged = ~(a.isfinite() & b.isfinite())
    # The logarithm of zero, and infinity minus infinity, are none.
    tiny = torch.finfo(torch.float64).tiny
    a, b = (torch.where(diverged, 1.0, losses.clamp_min(tiny)).log() for losses in (a, b))
    found = (a + (1 / first - 1) / (1 / second - 1 / first) * (a - b)).exp()
    return torch.where(diverged, float("inf"), found)
