"""The network on as much of a probe batch as memory and the time budget allow."""

from collections.abc import Mapping
from contextlib import suppress
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._module.network import TrainingStepNetwork
from lightning_graphon.callbacks._module.probe import samples, take, training_batch_size
from lightning_graphon.callbacks._module.training_step import TrainingStepObjective
from lightning_graphon.dynamics import ProbedNetwork, UnsupportedTrainingError

PORTION = 0.25  # of the time budget, for one computation of kernels
_PASSES = 30  # passes with a loss that recording one and measuring it at first cost, at least
_LARGEST_OUTPUTS = 2**22  # numbers, of all samples of a probe: 32 MB whenever the loss is evaluated in float64


def affordable_network(
    trainer: pl.Trainer, objective: TrainingStepObjective, batch: Any, masks: Mapping[str, Tensor], budget: TimeBudget,
    part_of: ProbedNetwork | None = None,
) -> tuple[TrainingStepNetwork, Any]:  # fmt: skip
    """Read the network from few samples and take as many as their time and their outputs allow.

    Returns:
        The network, and its part of the batch.

    Raises:
        UnsupportedTrainingError: As `TrainingStepNetwork`, or not even two samples can be afforded.
    """
    if budget.left <= 0:
        raise UnsupportedTrainingError("time_budget leaves no time")
    batch_size = training_batch_size(trainer)
    size = count = min(2, samples(batch))
    while True:
        part = take(batch, count)
        network = TrainingStepNetwork(trainer.lightning_module, objective, part, masks, part_of)
        with network.evaluated(), torch.no_grad():
            outputs = network.outputs()
            start = perf_counter()
            network.outputs()
            forward = perf_counter() - start
            with torch.enable_grad(), suppress(Exception):  # recording the loss will say what is wrong with it
                network.loss(outputs.detach().requires_grad_())  # of many outputs it takes longer than they do
            seconds = (perf_counter() - start) / max(count, 1)
        if batch_size is not None:
            budget.estimate_step(forward / max(count, 1) * batch_size)
        affordable = budget.portion(PORTION) / (_PASSES * max(seconds, 1e-9))
        if count == size and affordable < count:
            raise UnsupportedTrainingError(
                f"{_PASSES} passes of {count} samples take {_PASSES * seconds * count:.2g} s, too long for the "
                f"{budget.portion(PORTION):.2g} s that time_budget allows for it"
            )
        larger = int(min(samples(batch), max(1, _LARGEST_OUTPUTS // outputs[0].numel()), max(affordable, size)))
        if larger <= count:
            return network, part
        count = larger


def affordable_pool(
    network: TrainingStepNetwork, trainer: pl.Trainer, objective: TrainingStepObjective, pool: Any, budget: TimeBudget
) -> tuple[TrainingStepNetwork, Any] | tuple[None, None]:
    """The network with as much of a pool as can be afforded, and that part; None where it is less than the probe."""
    if pool is None:
        return None, None
    try:
        found, part = affordable_network(trainer, objective, pool, network.masks, budget, part_of=network)
    except UnsupportedTrainingError:
        return None, None
    return (found, part) if samples(part) >= network.count else (None, None)
