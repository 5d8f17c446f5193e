"""Methods that look at no data and no gradient: random and magnitude."""

import torch
from torch import Tensor

from lightning_graphon._random import generator
from lightning_graphon.pruning.methods import Problem, register_method


@register_method("random", needs="nothing")
def random(problem: Problem) -> dict[str, Tensor]:
    """u ~ U(0, 1), drawn on the CPU from the seed: the same on any device, in any round, in any process."""
    source = generator(problem.seed, "random masks")
    return {
        name: torch.rand(weight.shape, generator=source).to(weight.device) for name, weight in problem.weights.items()
    }


@register_method("magnitude", needs="nothing")
def magnitude(problem: Problem) -> dict[str, Tensor]:
    """|w| of the raw weight, no scaling between layers (Han et al. 2015)."""
    return {name: weight.detach().abs() for name, weight in problem.weights.items()}
