"""SNIP: connection sensitivity (Lee, Ajanthan, Torr, ICLR 2019, arXiv:1810.02340, eq. 6)."""

import torch
from torch import Tensor

from lightning_graphon.pruning.methods import Problem, register_method


@register_method("snip", needs="loss")
def snip(problem: Problem) -> dict[str, Tensor]:
    """|w · ∂L/∂w|, the loss averaged over batches and processes before the absolute value.

    At mask 1 this is the effect |∂L/∂m| of removing a connection on the very weights that will be trained.
    With `steps > 1` it is the iterative SNIP of de Jorge et al. 2021 on the weights still kept.
    """
    sums = [torch.zeros_like(weight) for weight in problem.weights.values()]
    for loss in problem.losses():
        for total, grad in zip(sums, problem.gradients(loss()), strict=True):
            total += grad
    # In place: a large model leaves no room for one more copy of its weights.
    means = [problem.average(total.div_(len(problem.batches))) for total in sums]
    return problem.named([g.mul_(w.detach()).abs_() for w, g in zip(problem.weights.values(), means, strict=True)])
