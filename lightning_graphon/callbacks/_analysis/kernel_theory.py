"""The tangent kernel's prediction of a fit: the network, its probe and its pool, as far as there is time for them."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_graphon.callbacks._analysis.affordable_network import PORTION, affordable_network, affordable_pool
from lightning_graphon.callbacks._analysis.masks_in_use import mask_updates
from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._module.network import TrainingStepNetwork
from lightning_graphon.callbacks._module.pool import TrainingData
from lightning_graphon.callbacks._module.probe import repeat_batch, samples, take, training_batch_size
from lightning_graphon.callbacks._module.training_step import TrainingStepObjective
from lightning_graphon.dynamics import (
    KernelPrediction,
    LossCurves,
    LossTracker,
    OptimizerView,
    UnsupportedTrainingError,
)
from lightning_graphon.pruning import Masks

log = logging.getLogger(__name__)
_HORIZON = 1000  # steps for which there must be time to follow a prediction; few hold longer


@dataclass
class KernelTheory:
    """A tracker, and the samples that it follows.

    Attributes:
        tracker: Predicts and measures.
        probe: Batch whose loss is measured.
        pool: Samples that push; 0 where the probe pushes itself.
    """

    tracker: LossTracker
    probe: Any
    pool: int


def kernel_theory(
    trainer: pl.Trainer, objective: TrainingStepObjective, optimizer: OptimizerView | None, data: TrainingData,
    masks: Masks, options: KernelPrediction, curves: LossCurves, budget: TimeBudget, *,
    every_n_steps: int, tolerance: float, drawn: Mapping[str, int], band: Callable[[int], tuple[float, float] | None],
) -> KernelTheory:  # fmt: skip
    """Read the network and make what predicts its loss.

    Args:
        trainer: Fits the module.
        objective: Runs its `training_step`.
        optimizer: Trains it; None where there are several.
        data: What is measured and what pushes.
        masks: In force.
        options: Which kernel predicts.
        curves: Is written to.
        budget: Says how long kernels may take.
        every_n_steps: Measure the loss so often.
        tolerance: Largest relative error of a prediction that holds.
        drawn: "samples" of the probe and "pool" of the run that is resumed, which cut them to the time that there was.
        band: As of `LossTracker`.

    Raises:
        UnsupportedTrainingError: No kernel predicts this training; one sentence says why.
    """
    if optimizer is None:
        raise UnsupportedTrainingError(f"there are {len(trainer.optimizers)} optimizers, and one is needed")
    module = trainer.lightning_module
    probe = take(data.probe, drawn.get("samples", samples(data.probe)))
    network, part = affordable_network(trainer, objective, probe, masks, budget)
    if samples(part) < samples(probe):
        log.info("LossDecayMonitor: the probe has %d of %d samples", samples(part), samples(probe))
    coupled = (data.apart or training_batch_size(trainer) != network.count) and network.couples_samples()
    # Where samples are coupled their number matters, and no pool can stand for training batches.
    joined = data.joined(trainer, module) if not coupled and drawn.get("pool", 1) else None
    joined = take(joined, drawn["pool"]) if joined is not None and "pool" in drawn else joined
    pool, pushing = affordable_pool(network, trainer, objective, joined, budget)
    scale = _gradient_scale(trainer, objective, network, part, pushing)
    tracker = LossTracker(
        network, optimizer, options, curves, pool=pool, every_n_steps=every_n_steps, tolerance=tolerance,
        step=trainer.global_step, gradient_scale=scale,
        seconds=lambda: budget.portion(PORTION), clips=bool(trainer.gradient_clip_val), band=band,
        horizon=min(_HORIZON, budget.planned), weights=_weights(data, scale, part, pushing),
        # A refresh after an update of the masks costs a kernel: half of the time is for measuring.
        mask_updates=lambda: mask_updates(trainer) if 2 * budget.left >= budget.allowed else 0,
    )  # fmt: skip
    _tell_limits(trainer, tracker, samples(part), coupled)
    return KernelTheory(tracker, part, 0 if pushing is None else samples(pushing))


def _gradient_scale(
    trainer: pl.Trainer, objective: TrainingStepObjective, network: TrainingStepNetwork, probe: Any, pool: Any | None
) -> float:
    """Gradient of a training batch over that of what pushes: 1 for mean losses, the ratio of their sizes for sums.

    Raises:
        UnsupportedTrainingError: The loss is a sum, and the size of training batches is not known.
    """
    with network.evaluated(), torch.no_grad():
        once = float(objective.loss(probe))
        try:
            twice = float(objective.loss(repeat_batch(probe)))
        except (ValueError, TypeError, RuntimeError, IndexError):
            return 1.0  # a batch that cannot be repeated; most losses are means
    if not math.isclose(twice, 2 * once, rel_tol=1e-3, abs_tol=1e-12) or once == 0:
        return 1.0
    batch_size = training_batch_size(trainer)
    if batch_size is None:
        raise UnsupportedTrainingError(
            "the loss in training_step is a sum over the batch, whose size is not known: use a mean"
        )
    return float(batch_size / samples(probe if pool is None else pool))


def _weights(data: TrainingData, scale: float, probe: Any, pool: Any | None) -> tuple[float, float]:
    """Of the pool's and of the probe's loss in what training descends; of sums, in units of the pool's."""
    if pool is None:
        return 1.0, 0.0
    sums = scale != 1.0
    return 1 - data.share, data.share * (samples(pool) / samples(probe) if sums else 1.0)


def _tell_limits(trainer: pl.Trainer, tracker: LossTracker, probe: int, coupled: bool) -> None:
    size = training_batch_size(trainer)
    if coupled and size != probe:
        log.warning(
            "LossDecayMonitor: the loss in training_step couples the samples of a batch, as contrastive losses do. "
            "Training batches of %s and the probe of %d have different losses, so the predicted fall is biased: "
            "probe_size=%s compares like with like.",
            size or "another size", probe, size or "the batch size",
        )  # fmt: skip
    elif tracker.pool is None:
        log.info(
            "LossDecayMonitor: there is no pool of other samples than the probe's, so the probe pushes itself: "
            "where training has more samples, the loss is predicted to fall too fast."
        )
    if tracker.leaves_out:
        log.info("LossDecayMonitor: the kernel's prediction leaves out %s.", tracker.leaves_out)
