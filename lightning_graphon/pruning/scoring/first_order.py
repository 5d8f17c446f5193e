"""Random scores, magnitudes |w|, and SNIP's |w · ∂L/∂w|."""

import torch
from torch import Tensor

from lightning_graphon._shared.random import generator
from lightning_graphon.pruning.lazy_tensors import LazyTensorMapping
from lightning_graphon.pruning.scoring.registry import ScoringContext, register_method


@register_method("random", needs="nothing", zeroed=False)
def random(context: ScoringContext) -> dict[str, Tensor]:
    """Numbers u ~ U(0, 1), drawn on the CPU from the seed: the same on any device, in every round and process."""
    source = generator(context.seed, "random masks")
    return {
        name: torch.rand(weight.shape, generator=source).to(weight.device) for name, weight in context.weights.items()
    }


@register_method("magnitude", needs="nothing", zeroed=False)
def magnitude(context: ScoringContext) -> LazyTensorMapping:
    """Magnitudes |w| without scaling between layers (Han et al. 2015)."""
    weights = context.weights
    # Computed on access: a copy of all weights may not fit the memory.
    return LazyTensorMapping(
        {name: weight.shape for name, weight in weights.items()}, lambda name: weights[name].detach().abs()
    )


@register_method("snip", needs="loss")
def snip(context: ScoringContext) -> dict[str, Tensor]:
    """|w · ∂L/∂w| of the loss averaged over batches and processes (arXiv:1810.02340, eq. 6).

    It is the effect |∂L/∂m| on the loss of removing a connection. With `steps > 1` it is the iterative SNIP of
    de Jorge et al. 2021 on the weights still kept.
    """
    scores = mean_gradients(context)
    # In place, as a large model leaves no memory for another copy of its weights.
    for name, weight in context.weights.items():
        scores[name].mul_(weight.detach()).abs_()
    return scores


def mean_gradients(context: ScoringContext) -> dict[str, Tensor]:
    """∂L/∂w of every weight, of the loss averaged over batches and processes."""
    sums: dict[str, Tensor] = {}

    def add(name: str, grad: Tensor) -> None:
        if name in sums:
            sums[name] += grad
        else:
            sums[name] = torch.empty_like(grad).copy_(grad)

    for loss in context.losses():
        context.stream_gradients(loss(), add)
    for name, weight in context.weights.items():
        total = sums.pop(name) if name in sums else torch.zeros_like(weight)
        sums[name] = context.average(total.div_(len(context.batches)))
    return sums
