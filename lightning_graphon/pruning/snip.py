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
    sums: dict[str, Tensor] = {}

    def add(name: str, grad: Tensor) -> None:
        if name in sums:
            sums[name] += grad
        else:
            sums[name] = torch.empty_like(grad).copy_(grad)

    for loss in problem.losses():
        problem.each_gradient(loss(), add)
    # In place: a large model leaves no room for one more copy of its weights.
    for name, weight in problem.weights.items():
        total = sums.pop(name) if name in sums else torch.zeros_like(weight)
        sums[name] = problem.average(total.div_(len(problem.batches))).mul_(weight.detach()).abs_()
    return sums
