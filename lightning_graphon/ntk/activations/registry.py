"""Dual activations by name, torch function or module, and the registry of names."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import checked, nearest
from lightning_graphon.ntk.activations.base import DualActivation, HermiteDual
from lightning_graphon.ntk.activations.closed_form import CLOSED_FORMS
from lightning_graphon.ntk.activations.elu import celu, elu, selu
from lightning_graphon.ntk.activations.kinked import KinkedDual
from lightning_graphon.ntk.activations.piecewise_linear import PiecewiseLinear, ReLULike

ActivationLike = str | DualActivation | nn.Module | Callable[[Tensor], Tensor]

_F = nn.functional
_REGISTRY: dict[str, DualActivation] = {
    "relu": ReLULike(0.0, 1.0, "relu"),
    "leaky_relu": ReLULike(0.01, 1.0, "leaky_relu"),
    "abs": ReLULike(-1.0, 1.0, "abs"),
    "identity": ReLULike(1.0, 1.0, "identity"),
    "hardtanh": PiecewiseLinear(-1.0, 0.0, [(-1.0, 1.0), (1.0, -1.0)], "hardtanh"),
    "relu6": PiecewiseLinear(0.0, 0.0, [(0.0, 1.0), (6.0, -1.0)], "relu6"),
    "hardsigmoid": PiecewiseLinear(0.0, 0.0, [(-3.0, 1 / 6), (3.0, -1 / 6)], "hardsigmoid"),
    **CLOSED_FORMS,
    "tanh": HermiteDual(torch.tanh, name="tanh"),
    "sigmoid": HermiteDual(torch.sigmoid, name="sigmoid"),
    "silu": HermiteDual(_F.silu, name="silu"),
    "mish": HermiteDual(_F.mish, name="mish"),
    "softplus": HermiteDual(_F.softplus, name="softplus"),
    "elu": elu(),
    "selu": selu(),
    "celu": celu(),
    "softsign": KinkedDual(_F.softsign, name="softsign"),
}
_ALIASES = {"linear": "identity", "swish": "silu", "leakyrelu": "leaky_relu", "id": "identity"}
_FUNCTIONS: dict[Callable[..., Tensor], str] = {
    torch.relu: "relu", _F.relu: "relu", _F.leaky_relu: "leaky_relu", torch.abs: "abs", torch.erf: "erf",
    _F.gelu: "gelu", torch.sin: "sin", torch.cos: "cos", torch.exp: "exp", torch.square: "square",
    torch.tanh: "tanh", _F.tanh: "tanh", torch.sigmoid: "sigmoid", _F.sigmoid: "sigmoid",
    _F.hardtanh: "hardtanh", _F.relu6: "relu6", _F.hardsigmoid: "hardsigmoid",
    _F.elu: "elu", _F.selu: "selu", torch.selu: "selu", _F.celu: "celu", torch.celu: "celu", _F.softsign: "softsign",
}  # fmt: skip


@checked
def register_activation(name: str, activation: DualActivation | Callable[[Tensor], Tensor]) -> DualActivation:
    """Give a name to an activation, so that `graphon_ntk(..., activation=name)` finds it.

    Args:
        name: A name that is not taken.
        activation: A `DualActivation`, or an elementwise torch function, for which a Hermite series is used.

    Returns:
        The dual activation under that name.

    Raises:
        ValueError: The name is taken by another activation.

    >>> register_activation("sinc", torch.sinc)
    HermiteDual('sinc')
    >>> unregister_activation("sinc")
    """
    if name in _REGISTRY or name in _ALIASES:
        raise ValueError(f"activation {name!r} is already registered; pick another name or unregister it first")
    _REGISTRY[name] = activation if isinstance(activation, DualActivation) else HermiteDual(activation, name=name)
    return _REGISTRY[name]


@checked
def unregister_activation(name: str) -> None:
    """Remove a name given by `register_activation`.

    Raises:
        KeyError: The name is not registered.
    """
    del _REGISTRY[name]


def dual_activation(activation: ActivationLike) -> DualActivation:
    """Dual of a name, torch function, module or dual activation: a closed form where known, else a Hermite series.

    Args:
        activation: For example "relu", `torch.tanh`, `nn.GELU()`.

    Raises:
        ValueError: Unknown name, or a module with different activations per unit.
        TypeError: `activation` is something else.

    >>> dual_activation(nn.LeakyReLU(0.2))
    ReLULike('leaky_relu')
    """
    if isinstance(activation, DualActivation):
        return activation
    if isinstance(activation, str):
        return _by_name(activation)
    if isinstance(activation, nn.Module):
        return _by_module(activation)
    if not callable(activation):
        raise TypeError(f"activation must be a name, a torch function or a module, got {activation!r}")
    known = _FUNCTIONS.get(activation)
    return _REGISTRY[known] if known else HermiteDual(activation)


def _by_name(name: str) -> DualActivation:
    key = name.lower()
    key = _ALIASES.get(key, key)
    # A registered name may have capitals; otherwise case does not matter.
    if name in _REGISTRY:
        return _REGISTRY[name]
    if key not in _REGISTRY:
        raise ValueError(f"unknown activation {name!r}. {nearest(name, _REGISTRY)}")
    return _REGISTRY[key]


def _by_module(module: nn.Module) -> DualActivation:
    """Dual of a module with its settings; of an unknown one by its forward."""
    if isinstance(module, nn.LeakyReLU):
        return ReLULike(module.negative_slope, 1.0, "leaky_relu")
    if isinstance(module, nn.RReLU):  # in eval it is LeakyReLU with the mean slope
        return ReLULike(0.5 * (module.lower + module.upper), 1.0, "rrelu")
    if isinstance(module, nn.PReLU):
        if module.num_parameters != 1:
            raise ValueError(
                f"PReLU with {module.num_parameters} slopes is a different activation in every unit; "
                "the infinite-width kernel needs one: use PReLU(1), or `empirical_ntk`"
            )
        return ReLULike(float(module.weight.detach()), 1.0, "prelu")
    # ReLU6 is a subclass with bounds of its own.
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        bends = [(float(module.min_val), 1.0), (float(module.max_val), -1.0)]
        return PiecewiseLinear(float(module.min_val), 0.0, bends, "hardtanh")
    # The closed form is that of the exact GELU.
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return HermiteDual(module, name="gelu_tanh")
    simple = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.GELU: "gelu", nn.Identity: "identity",
              nn.Hardsigmoid: "hardsigmoid", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
              nn.SELU: "selu", nn.Softsign: "softsign"}  # fmt: skip
    if type(module) in simple:
        return _REGISTRY[simple[type(module)]]
    if isinstance(module, nn.ELU):
        return elu(float(module.alpha))
    if isinstance(module, nn.CELU):
        return celu(float(module.alpha))
    return HermiteDual(module, name=type(module).__name__.lower())
