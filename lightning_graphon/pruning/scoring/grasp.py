"""GraSP: gradient signal preservation (Wang, Zhang, Grosse, ICLR 2020, arXiv:2002.07376, eq. 8)."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_graphon.pruning.scoring.registry import ScoringContext, register_method


@register_method("grasp", needs="loss")
def grasp(context: ScoringContext, *, absolute: bool = False, temperature: float = 200.0) -> dict[str, Tensor]:
    """w · (H g) with gradient and Hessian of the loss of outputs / temperature over the prunable weights.

    Removing a weight changes the squared gradient norm by -2 w·Hg to first order. So removing the smallest w·Hg raises
    the gradient flow, and the largest are kept.

    Args:
        context: Weights to score.
        absolute: Score by |w · Hg|, the variant of arXiv:2602.06675.
        temperature: Divisor of the network's outputs (logits).
    """
    losses = context.losses(temperature)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        mean = [torch.zeros_like(weight) for weight in context.weights.values()]
        for loss in losses:
            for total, grad in zip(mean, context.gradients(loss()), strict=True):
                total += grad / len(losses)
        # Pruned weights are not trained, so in later rounds the gradient flow is that of the kept ones.
        mean = [context.average(g) * context.masks[name] for name, g in zip(context.weights, mean, strict=True)]
        products = [torch.zeros_like(weight) for weight in context.weights.values()]
        # The Hessian-vector product is linear in the loss, so products of batches add up.
        for loss in losses:
            for total, product in zip(products, _hessian_product(context, loss(), mean), strict=True):
                total += product / len(losses)
    scores = [w.detach() * context.average(hg) for w, hg in zip(context.weights.values(), products, strict=True)]
    return context.named([score.abs() for score in scores] if absolute else scores)


def _hessian_product(context: ScoringContext, loss: Tensor, vector: list[Tensor]) -> list[Tensor]:
    grads = context.gradients(loss, create_graph=True)
    inner = torch.stack([(g * v).sum() for g, v in zip(grads, vector, strict=True)]).sum()
    if not inner.requires_grad:  # the loss is linear in the weights: no curvature
        return [torch.zeros_like(v) for v in vector]
    return context.gradients(inner)
