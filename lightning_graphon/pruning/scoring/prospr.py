"""ProsPr: prospect pruning by meta-gradients (Alizadeh et al., ICLR 2022, arXiv:2202.08132)."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_graphon._shared.module_state import swap_tensors
from lightning_graphon.pruning.scoring.registry import ScoringContext, register_method


@register_method("prospr", needs="loss", zeroed=False)
def prospr(
    context: ScoringContext, *, training_steps: int = 3, lr: float = 0.1, momentum: float = 0.0
) -> dict[str, Tensor]:
    """|∂L(θ_T)/∂m| where T steps of SGD begin at θ₀ = m ⊙ θ: what a weight does for the loss after some training.

    Step t trains on batch t, all parameters that are not frozen, and the loss is that of batch T; batches are taken in
    turn if they are fewer than T + 1. The gradient goes through the steps (second derivatives), so memory grows with T.
    Without steps it is SNIP on the first batch.

    Args:
        context: Weights to score.
        training_steps: Number T of steps.
        lr: Their learning rate.
        momentum: Their momentum.
    """
    masks = {name: m.to(context.weights[name].dtype).requires_grad_() for name, m in context.masks.items()}
    own: dict[Tensor, Tensor] = {weight: weight.detach() * masks[name] for name, weight in context.weights.items()}
    trained = [p for p in context.model.parameters() if p.requires_grad and p not in own]
    own |= {parameter: parameter.detach().clone().requires_grad_() for parameter in trained}
    velocity = {parameter: torch.zeros_like(parameter) for parameter in own}
    losses = replace(context, weights=cast(Any, masks)).losses()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for step in range(training_steps):
            with swap_tensors(context.model, own):
                loss = losses[step % len(losses)]()
            grads = torch.autograd.grad(loss, list(own.values()), create_graph=True, allow_unused=True)
            for (parameter, value), grad in zip(list(own.items()), grads, strict=True):
                if grad is not None:
                    velocity[parameter] = momentum * velocity[parameter] + grad
                    own[parameter] = value - lr * velocity[parameter]
        with swap_tensors(context.model, own):
            last = losses[training_steps % len(losses)]()
        found = torch.autograd.grad(last, list(masks.values()), allow_unused=True)
    return {
        name: torch.zeros_like(mask) if grad is None else context.average(grad).abs() * mask.detach()
        for (name, mask), grad in zip(masks.items(), found, strict=True)
    }
