"""Predict a training by training copies: of the network itself, or of its Taylor expansion.

Both are one loop over samples that are not those of the probe; only the network differs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from math import inf, isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graphon._shared.module_state import preserve_random_state
from lightning_graphon.dynamics.predictors.pool_batches import PoolBatches
from lightning_graphon.dynamics.predictors.predicted_loss import PredictedLoss
from lightning_graphon.dynamics.predictors.taylor import taylor_expand_
from lightning_graphon.dynamics.predictors.training import Training, evaluated
from lightning_graphon.dynamics.probed_network import UnsupportedTrainingError

ProbeLoss = Callable[[nn.Module], Tensor | float]
Progress = Callable[[int, int], object]


def rehearse(
    training: Training,
    batches: Iterable[Any] | PoolBatches,
    probe_loss: ProbeLoss,
    steps: Iterable[int],
    *,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> PredictedLoss:
    """Predict the loss by training a copy of the network on other samples: no theory, one training step per step.

    Network, optimizer, schedulers and random number generators stay as they are. Every order of batches begins with
    the generators as they are now, so with the batches of the training it is the training, bit for bit.

    Args:
        training: What is to be predicted.
        batches: `PoolBatches` for one curve per order, or batches in the order in which they push, again and again.
        probe_loss: `probe_loss(model)` -> loss of samples that are not among those that push; called in eval mode.
        steps: Optimizer steps since the beginning of training at which the probe's loss is read.
        seconds: Stop after this time, of which every order has an equal share; None: no limit.
        progress: Called with the number of the order and the step, after every step.

    Returns:
        Losses at the asked steps, as far as time allowed, and until one is not finite.

    Raises:
        ValueError: A step has been taken already, or there is no batch.

    >>> net, x = nn.Linear(1, 1), torch.linspace(-1, 1, 64)[:, None]
    >>> loss = lambda model, x: (model(x) - 3 * x).square().mean()
    >>> training = Training(net, torch.optim.SGD(net.parameters(), 0.1), loss)
    >>> predicted = rehearse(training, PoolBatches(x[::2], 8, orders=2), lambda m: loss(m, x[1::2]), range(0, 101, 50))
    >>> predicted.steps, bool((predicted.upper[-1] < 0.01).all())
    (tensor([  0,  50, 100]), True)
    """
    return train_copies("rehearsal", training, batches, probe_loss, steps, seconds=seconds, progress=progress)


def replay(
    training: Training,
    batches: Iterable[Any] | PoolBatches,
    probe_loss: ProbeLoss,
    steps: Iterable[int],
    *,
    order: int = 1,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> PredictedLoss:
    """Predict the loss by training the Taylor expansion of the network with the training's own optimizer.

    The theory of the tangent kernel for any optimizer, weight decay, schedule and clipping, at the training's own batch
    size; exact for a network that is linear in its parameters. Arguments as of `rehearse`.

    Args:
        training: What is to be predicted.
        batches: As of `rehearse`.
        probe_loss: As of `rehearse`; the model that it is given is the expansion.
        steps: As of `rehearse`.
        order: Of the expansion. The second helps some networks and hurts others.
        seconds: As of `rehearse`.
        progress: As of `rehearse`.

    Raises:
        UnsupportedTrainingError: The optimizer needs a closure, or the network has an operation without a forward-mode
            derivative.

    >>> net, x = nn.Linear(1, 1), torch.linspace(-1, 1, 64)[:, None]
    >>> loss = lambda model, x: (model(x) - 3 * x).square().mean()
    >>> training = Training(net, torch.optim.Adam(net.parameters(), 0.1), loss)
    >>> batches, probe = PoolBatches(x[::2], 8), lambda model: loss(model, x[1::2])
    >>> linear = replay(training, batches, probe, [0, 10])
    >>> torch.allclose(linear.losses, rehearse(training, batches, probe, [0, 10]).losses)
    True
    """
    if training.needs_closure:
        raise UnsupportedTrainingError(
            f"{type(training.optimizer).__name__} evaluates the loss several times per step, which a replay does not "
            "follow: predict by a rehearsal"
        )
    cost = 1.7 * 2.4 ** (order - 1)  # measured: 1.7 and 4.1 for multi-layer perceptrons, 2.2 with attention
    return train_copies(
        "replay",
        training,
        batches,
        probe_loss,
        steps,
        change=lambda model: taylor_expand_(model, order),
        cost=cost,
        seconds=seconds,
        progress=progress,
    )


def train_copies(
    name: str,
    training: Training,
    batches: Iterable[Any] | PoolBatches,
    probe_loss: ProbeLoss,
    steps: Iterable[int],
    *,
    change: Callable[[nn.Module], object] | None = None,
    cost: float = 1.0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> PredictedLoss:
    """Train a copy for each order of batches and read the probe's loss; as `rehearse`, which is the plain case.

    Args:
        name: Of the prediction.
        training: What is copied.
        batches: As of `rehearse`.
        probe_loss: As of `rehearse`.
        steps: As of `rehearse`.
        change: Changes a copy of the network in place before it is trained; its parameters keep their identity.
        cost: Of one step, in training steps.
        seconds: As of `rehearse`.
        progress: As of `rehearse`.
    """
    asked = sorted({int(step) for step in steps})
    if asked and asked[0] < training.steps_done:
        raise ValueError(f"step {asked[0]} is over: {training.steps_done} have been done")
    orders = batches.orders if isinstance(batches, PoolBatches) else 1
    end = perf_counter() + (inf if seconds is None else seconds)
    rows: list[list[float]] = []
    for number in range(orders):
        now = perf_counter()
        copied = training.copy()
        if change is not None:
            change(copied.model)
        told = None if progress is None else _of_order(progress, number)
        deadline = now + (end - now) / (orders - number)
        with preserve_random_state():
            rows.append(_losses(copied, _stream(batches, number), probe_loss, asked, deadline, told))
        asked = asked[: len(rows[-1])]
    losses = torch.tensor([row[: len(asked)] for row in rows], dtype=torch.float64).reshape(orders, len(asked))
    return PredictedLoss(name, torch.tensor(asked, dtype=torch.long), losses, cost)


def _losses(
    training: Training,
    batches: Iterator[Any],
    probe_loss: ProbeLoss,
    asked: Sequence[int],
    deadline: float,
    progress: Callable[[int], object] | None,
) -> list[float]:
    losses: list[float] = []
    with closing(training.run(batches)) as run:
        for step in run if asked else ():
            if progress is not None:
                progress(step)
            if step == asked[len(losses)]:
                with evaluated(training.model):
                    losses.append(float(probe_loss(training.model)))
                if not isfinite(losses[-1]):
                    break
            if len(losses) == len(asked) or perf_counter() > deadline:
                break
    return losses


def _stream(batches: Iterable[Any] | PoolBatches, number: int) -> Iterator[Any]:
    if isinstance(batches, PoolBatches):
        yield from batches.order(number)
        return
    while True:
        number = -1
        for number, batch in enumerate(batches):  # noqa: B007
            yield batch
        if number < 0:
            raise ValueError("there is no batch to train on")


def _of_order(progress: Progress, number: int) -> Callable[[int], object]:
    return lambda step: progress(number, step)
