"""Targets of a design as differentiable functions of the kernel; larger is better."""

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from lightning_graphon._shared.checks import check_choice
from lightning_graphon._shared.choices import DesignTarget
from lightning_graphon.ntk.operators.spectrum import alignment, energy_share

Objective = Callable[[Tensor], Tensor]


def kernel_objective(target: DesignTarget, labels: Tensor | None, ridge: float) -> Objective:
    """The target by its name; `ridge` is the ρ of "fit" in the kernel's units.

    Raises:
        ValueError: An unknown target, or no labels.
    """
    check_choice("target", target, get_args(DesignTarget))
    if target == "energy":
        return energy_share
    if labels is None:
        raise ValueError(f"target={target!r} needs the labels of x: pass labels=, or use target='energy'")
    if target == "alignment":
        return partial(alignment, labels=labels, centred=True)
    Y = centred_targets(labels)
    return partial(label_speed, Y=Y) if target == "speed" else partial(label_fit, Y=Y, ridge=ridge)


def centred_targets(labels: Tensor) -> Tensor:
    """Targets [N, C] of mean 0, one-hot for class numbers, float64."""
    if not labels.is_floating_point():
        labels = torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1])
    Y = labels.reshape(len(labels), -1).to(torch.float64)
    return Y - Y.mean(0)


def label_speed(kernel: Tensor, Y: Tensor) -> Tensor:
    """The rate tr YᵀΘY / ‖Y‖² at which the labels' square begins to fall under gradient flow from outputs of 0."""
    return (Y * (kernel @ Y.to(kernel))).sum() / Y.square().sum()


def label_fit(kernel: Tensor, Y: Tensor, ridge: float) -> Tensor:
    """Share of the labels' square that ridge regression fits, 1 - ρ tr Yᵀ(Θ + ρ)⁻¹Y / ‖Y‖², in [0, 1).

    Each mode is fitted by λ/(λ + ρ), similar to gradient flow after a time of 1/ρ, 1 - exp(-λ/ρ).
    """
    # With a positive ridge the system is well conditioned, so no eigendecomposition is needed.
    shifted = kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    return 1 - ridge * (Y * torch.linalg.solve(shifted, Y.to(kernel))).sum() / Y.square().sum()
