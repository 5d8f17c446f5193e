"""Dual activations: E[φφ′] and E[φ̇φ̇′] under a Gaussian."""

from lightning_graphon.ntk.activations.base import DualActivation, HermiteDual
from lightning_graphon.ntk.activations.piecewise_linear import PiecewiseLinear, ReLULike
from lightning_graphon.ntk.activations.registry import dual_activation, register_activation, unregister_activation

__all__ = [
    "DualActivation",
    "HermiteDual",
    "PiecewiseLinear",
    "ReLULike",
    "dual_activation",
    "register_activation",
    "unregister_activation",
]
