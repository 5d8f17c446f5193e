"""Methods that look at no data and no gradient: random and magnitude."""

import torch
from torch import Tensor

from lightning_graphon._random import generator
from lightning_graphon.pruning.lazily import Lazy
from lightning_graphon.pruning.methods import Problem, register_method


@register_method("random", needs="nothing", zeroed=False)
def random(problem: Problem) -> dict[str, Tensor]:
    """u ~ U(0, 1), drawn on the CPU from the seed: the same on any device, in any round, in any process."""
    source = generator(problem.seed, "random masks")
    return {
        name: torch.rand(weight.shape, generator=source).to(weight.device) for name, weight in problem.weights.items()
    }


@register_method("magnitude", needs="nothing", zeroed=False)
def magnitude(problem: Problem) -> Lazy:
    """|w| of the raw weight, no scaling between layers (Han et al. 2015)."""
    weights = problem.weights
    return Lazy({name: weight.shape for name, weight in weights.items()}, lambda name: weights[name].detach().abs())
