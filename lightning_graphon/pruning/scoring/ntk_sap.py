"""NTK-SAP: the spectrum of the tangent kernel over initialisations (Wang et al., ICLR 2023, arXiv:2304.02840)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graphon._shared.module_state import swap_tensors
from lightning_graphon._shared.random import generator
from lightning_graphon.pruning.scoring.networks.redrawn import redrawn
from lightning_graphon.pruning.scoring.registry import ScoringContext, register_method

_SAMPLES = 64  # where no batch says how many


@register_method("ntk-sap", needs="inputs", steps=100, zeroed=False)
def ntk_sap(context: ScoringContext, *, epsilon: float = 0.01, draws: int = 1) -> dict[str, Tensor]:
    """|∂/∂m Σ ‖f(x; m ⊙ θ) − f(x; m ⊙ (θ + εN))‖²| with θ, N and x drawn anew for each batch and round.

    The expected distance is ε² times the trace of the tangent kernel over the weights kept. θ comes from the layers'
    own initialisation (`reset_parameters`) and x is standard normal, so that the mask depends on neither the weights
    that will be trained nor the data. Batch norm has the statistics of x; elsewhere the network is in eval mode.

    Args:
        context: Weights to score; of the batches only the number and the shapes are used.
        epsilon: Standard deviation of the perturbation, of the weights to score.
        draws: How often each batch is drawn.
    """
    total = {name: torch.zeros_like(weight) for name, weight in context.weights.items()}
    kept = sum(int(mask.count_nonzero()) for mask in context.masks.values())
    for number, batch in enumerate([*(context.batches or [None])] * draws):
        purpose = f"ntk-sap at {kept}, draw {number}"
        with redrawn(context, purpose) as drawn:
            for name, grad in _distance_gradient(drawn, batch, purpose, epsilon).items():
                total[name] += grad
    return {name: context.average(grad).abs() * context.masks[name] for name, grad in total.items()}


def _distance_gradient(context: ScoringContext, batch: Any, purpose: str, epsilon: float) -> dict[str, Tensor]:
    noise = generator(context.seed, f"noise of {purpose}")

    def outputs() -> Tensor:
        source = generator(context.seed, f"inputs of {purpose}")  # the same for both networks
        return context.objective.outputs(batch, _normal_like(source, None if batch is not None else _SAMPLES))

    masks = {name: m.to(context.weights[name].dtype).requires_grad_() for name, m in context.masks.items()}
    own: dict[Tensor, Tensor] = {weight: weight.detach() * masks[name] for name, weight in context.weights.items()}
    moved: dict[Tensor, Tensor] = {
        weight: (weight.detach() + epsilon * _normal(weight.shape, noise, weight)) * masks[name]
        for name, weight in context.weights.items()
    }
    with swap_tensors(context.model, own):
        _take_statistics(context.model, outputs)
        there = outputs()
    with swap_tensors(context.model, moved):
        distance = (there - outputs()).square().sum()
    grads = torch.autograd.grad(distance, list(masks.values()), allow_unused=True)
    return {name: torch.zeros_like(m) if g is None else g for (name, m), g in zip(masks.items(), grads, strict=True)}


def _normal(shape: torch.Size, source: torch.Generator, like: Tensor) -> Tensor:
    """Drawn on the CPU: the same on every device."""
    return torch.randn(shape, generator=source).to(like)


def _normal_like(source: torch.Generator, samples: int | None) -> Callable[[Tensor], Tensor]:
    return lambda x: _normal(x.shape if samples is None else torch.Size([samples, *x.shape[1:]]), source, x)


def _take_statistics(model: nn.Module, outputs: Callable[[], Tensor]) -> None:
    """Put batch norms to the statistics that outputs have now, and the network into eval mode."""
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    if norms:
        with torch.no_grad():
            outputs()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.training, norm.momentum = False, momentum
