"""The mean of exact kernels over networks with the same masks and weights of redrawn signs.

It describes the networks of which a module is one draw, as the Graphon NTK does, without a limit and for every module;
it gives no positions and no gradient in the graphon.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from lightning_graphon._shared.batch_norm import batch_norms, measure_batch_norms, unused_batch_norms
from lightning_graphon._shared.checks import check_choice, checked
from lightning_graphon._shared.choices import Get, Parameterization, Reduce
from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon._shared.module_state import swap_tensors
from lightning_graphon._shared.random import generator
from lightning_graphon.ntk.empirical.functional_model import Inputs, input_device
from lightning_graphon.ntk.empirical.kernel import empirical_ntk
from lightning_graphon.ntk.empirical.nngp import empirical_nngp


@checked
def sampled_ntk(
    model: nn.Module,
    x: Inputs,
    masks: Mapping[str, Tensor] | None = None,
    *,
    draws: int = 32,
    seed: int = 0,
    parameterization: Parameterization = "standard",
    reduce: Reduce | None = "mean",
    x2: Inputs | None = None,
    get: Get = "ntk",
    max_memory: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean of the tangent kernels of networks whose weights are the module's with random signs.

    With `get="nngp"` it is the mean of their `empirical_nngp`: the covariance of the outputs, of which one network
    gives an estimate of rank one per output only, so that more draws are needed than for the tangent kernel.

    Parameters of two or more dimensions get new signs; biases and the weights of norms stay. Batch norm whose
    statistics are those of data gets the statistics of `x` in each drawn network, as they depend on its weights.

    Args:
        model: Any module that `empirical_ntk` takes.
        x: Samples [N, ...], or a tuple of tensors that forward takes as arguments.
        masks: Qualified parameter name to a tensor of the weight's shape, non-zero where kept.
        draws: Number of networks, at least 2.
        seed: Seed of the signs.
        parameterization: As in `empirical_ntk`.
        reduce: As in `empirical_ntk`.
        x2: Other samples; the kernel between `x` and `x2` then.
        get: "ntk", or "nngp" for the covariance of the outputs.
        max_memory: As in `empirical_ntk`.

    Returns:
        The mean kernel, of the shape that `empirical_ntk` gives, and its standard error, entry by entry.

    Raises:
        ValueError: Fewer than 2 draws; and what `empirical_ntk` raises.

    >>> model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 1)).double()
    >>> mean, error = sampled_ntk(model, torch.eye(3, dtype=torch.float64), draws=4)
    >>> mean.shape, error.shape
    (torch.Size([3, 3]), torch.Size([3, 3]))
    """
    check_choice("get", get, get_args(Get))
    if draws < 2:
        raise ValueError(f"draws must be at least 2 to tell the standard error, got {draws}")
    random, total, square = generator(seed, "sampled_ntk"), torch.zeros(()), torch.zeros(())
    for number in range(draws):
        with _redrawn(model, x, masks or {}, random):
            if get == "nngp":
                kernel = empirical_nngp(model, x, masks=masks, reduce=reduce, x2=x2)
            else:
                kernel = empirical_ntk(
                    model, x, masks=masks, parameterization=parameterization, reduce=reduce, x2=x2,
                    max_memory=max_memory,
                )  # fmt: skip
        # Welford's update: the variance without the digits that a difference of squares loses.
        change = kernel - total
        total = total + change / (number + 1)
        square = square + change * (kernel - total)
    return total, (square / (draws * (draws - 1))).sqrt()


@contextmanager
def _redrawn(model: nn.Module, x: Inputs, masks: Mapping[str, Tensor], random: torch.Generator) -> Iterator[None]:
    """The model with new signs inside the context, and with batch norm measured anew."""
    substitutes: dict[Tensor, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            signs = (torch.rand(parameter.shape, generator=random) < 0.5).to(parameter) * 2 - 1
            signs = signs * (masks[name] != 0).to(signs) if name in masks else signs
            substitutes[parameter] = nn.Parameter(parameter.detach() * signs, parameter.requires_grad)
    fresh = unused_batch_norms(model)
    calibrated = [module for name, module in batch_norms(model).items() if name not in fresh]
    saved = [(module, module.running_mean, module.running_var) for module in calibrated]
    with swap_tensors(model, substitutes):
        try:
            with eval_semantics(model, input_device(x)):
                measure_batch_norms(calibrated, lambda: model(*([x] if isinstance(x, Tensor) else x)))
            yield
        finally:
            for module, mean, variance in saved:
                module.running_mean, module.running_var = mean, variance
