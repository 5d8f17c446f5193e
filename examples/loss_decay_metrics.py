"""Numbers of the tangent kernels at initialisation that may say how fast a network will train."""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon.dynamics import LossDecayPredictor, finite_probe_kernel
from lightning_graphon.ntk import empirical_ntk, graphon_ntk_from_model, spectral_summary
from lightning_graphon.pruning import Masks

KERNELS = {
    "exact": "exact kernel of the network",
    "graphon density": "Graphon NTK, density (the paper)",
    "graphon energy": "Graphon NTK, energy",
    "graphon drift": "Graphon NTK, drift",
}
SPECTRAL = {
    "decay_rate": "decay rate α of λ_k ∝ k^(−α)",
    "effective_rank": "effective rank, trace / λ₁",
    "spectral_gap": "spectral gap, λ₁ / λ₂",
    "energy_concentration": "energy of the top five",
    "trace": "trace",
    "lambda_max": "λ₁",
    "alignment": "alignment with the labels",
}
FUNCTIONAL = {
    "speed": "initial speed gᵀΘg",
    "predicted_fall": "predicted fall, SGD, frozen kernel",
}
FREE = {
    "density": "fraction of weights kept",
    "gradient_l1": "‖∂L/∂w‖₁, first speed of Adam",
    "callback": "fall predicted by the callback",
}
LABELS = {**SPECTRAL, **FUNCTIONAL, **FREE}


class Sample(NamedTuple):
    """Samples of the kernel, their labels, and the number of training samples that they stand for."""

    inputs: Tensor
    labels: Tensor
    dataset_size: int


def kernel_metrics(net: nn.Module, masks: Masks | None, sample: Sample, rate: float, steps: int) -> dict[str, float]:
    """Every number of SPECTRAL and FUNCTIONAL for every kernel, "exact trace" and so on, and two without a kernel.

    Args:
        net: The dense network at initialisation.
        masks: Its masks; None: dense.
        sample: Where the kernel is taken.
        rate: Learning rate of SGD for the predicted fall.
        steps: Number of its steps.
    """
    sparse = copy.deepcopy(net)
    if masks is not None:
        masks.apply_(sparse)
    with torch.no_grad():
        outputs = sparse(sample.inputs)
    found = {}
    for name, kernel in _kernels(sparse, masks, sample):
        scalars = spectral_summary(kernel, sample.labels).scalars()
        found |= {f"{name} {key}": scalars[key] for key in SPECTRAL}
        found |= {f"{name} {key}": v for key, v in _of_loss(kernel, outputs, sample, rate, steps).items()}
    kept = 1.0 if masks is None else 1 - masks.sparsity
    return found | {"density": kept, "gradient_l1": _gradient_l1(sparse, masks, sample)}


def _kernels(net: nn.Module, masks: Masks | None, sample: Sample) -> Iterator[tuple[str, Tensor]]:
    yield "exact", empirical_ntk(net, sample.inputs, masks=masks).double()
    for propagate in ("density", "energy", "drift"):
        yield f"graphon {propagate}", graphon_ntk_from_model(net, sample.inputs, masks, propagate=propagate)


def _of_loss(kernel: Tensor, outputs: Tensor, sample: Sample, rate: float, steps: int) -> dict[str, float]:
    """What the kernel says of this loss: at once, and after some steps of SGD with the kernel frozen."""
    plain = LossDecayPredictor(kernel, outputs, sample.labels, F.cross_entropy)
    corrected = finite_probe_kernel(kernel, outputs, sample.dataset_size, positive=True)
    # No check of the learning rate: the callback does it.
    frozen = LossDecayPredictor(corrected, outputs, sample.labels, F.cross_entropy, check_every=0)
    losses = frozen.run([rate] * steps).log()
    return {"speed": plain.speed, "predicted_fall": float(losses[0] - losses[-1])}


def _gradient_l1(net: nn.Module, masks: Masks | None, sample: Sample) -> float:
    """Sum of |∂L/∂w| over kept weights: gᵀΘg with the preconditioner 1/|∂L/∂w| that Adam has after one step."""
    named = dict(net.named_parameters())
    slopes = torch.autograd.grad(F.cross_entropy(net(sample.inputs), sample.labels), list(named.values()))
    kept = {} if masks is None else dict(masks)
    return sum(float((slope * kept.get(name, 1)).abs().sum()) for name, slope in zip(named, slopes, strict=True))
