"""One training as a loop of plain torch, and copies of it that share nothing with the original."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_graphon._shared.module_state import preserve_random_state
from lightning_graphon.pruning import Enforcer, as_masks

Scheduler: TypeAlias = LRScheduler | tuple[LRScheduler, int]


@dataclass
class Training:
    """What is done in every optimizer step of a training.

    Args:
        model: The network, in the mode in which it is trained.
        optimizer: Any optimizer of torch, or one like them, over the network's parameters; with its state, in the
            middle of a training.
        training_step: `training_step(model, batch)` -> scalar loss. It must use the model that it is given, as copies
            of the network are trained with it.
        schedulers: Stepped after every optimizer step, or in pairs (scheduler, n) after every n-th.
        masks: Masks of the weights by name, where pruned ones are to stay zero.
        accumulate: Batches per optimizer step, of whose losses the mean is taken.
        clip_grad_norm: Largest norm of the gradients of all parameters that the optimizer moves.
        clip_grad_value: Largest absolute value of a gradient's entries.
        steps_done: Optimizer steps that have been taken; counts on.

    Raises:
        ValueError: The optimizer moves no parameter of the model, a number is not positive, or a scheduler waits for a
            metric.

    >>> net = nn.Linear(1, 1)
    >>> training = Training(net, torch.optim.SGD(net.parameters(), 0.1), lambda model, x: model(x).square().mean())
    >>> for step in training.run([torch.ones(4, 1)] * 3):
    ...     pass
    >>> step, training.steps_done
    (3, 3)
    """

    model: nn.Module
    optimizer: Optimizer
    training_step: Callable[[nn.Module, Any], Tensor]
    schedulers: Sequence[Scheduler] = ()
    masks: Mapping[str, Tensor] | None = None
    accumulate: int = 1
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    steps_done: int = 0

    def __post_init__(self) -> None:
        own = {id(p) for p in self.model.parameters()}
        if not any(id(p) in own for p in self._moved()):
            raise ValueError("the optimizer moves no parameter of this model")
        for name in ("accumulate", "clip_grad_norm", "clip_grad_value"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        for scheduler, _ in self._schedulers():
            if isinstance(scheduler, ReduceLROnPlateau):
                raise ValueError("ReduceLROnPlateau waits for a metric, which is not known ahead of training")

    @property
    def needs_closure(self) -> bool:
        """Whether the optimizer evaluates the loss itself, several times per step, as LBFGS does."""
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        return closure is not None and closure.default is inspect.Parameter.empty

    def copy(self) -> "Training":
        """The same training of a copy of the network, with a copy of the optimizer's state and of the schedulers.

        Pruned weights are zero in the copy, so that an expansion of it is one around the pruned network. Hooks of the
        optimizer and replacements of its methods belong to the original and are not copied.
        """
        memo: dict[int, Any] = {}
        model = copy.deepcopy(self.model, memo)
        if self.masks is not None:
            as_masks(self.masks).apply_(model)
        optimizer = _copy_optimizer(self.optimizer, memo)
        schedulers = [(copy.deepcopy(s, memo), every) for s, every in self._schedulers()]
        return replace(self, model=model, optimizer=optimizer, schedulers=schedulers)

    def run(self, batches: Iterable[Any]) -> Generator[int]:
        """Train until the batches end or nobody asks for more; number of steps done, first before the first step."""
        feed = iter(batches)
        masks = None if self.masks is None else as_masks(self.masks)
        with nullcontext() if masks is None else Enforcer(self.model, masks, self.optimizer):
            yield self.steps_done
            while len(group := list(islice(feed, self.accumulate))) == self.accumulate:
                self._step(group)
                self.steps_done += 1
                for scheduler, every in self._schedulers():
                    if self.steps_done % every == 0:
                        scheduler.step()
                yield self.steps_done

    def _step(self, group: Sequence[Any]) -> None:
        def closure() -> Any:  # a tensor, where torch's annotations say float
            self.optimizer.zero_grad()
            total: Tensor | float = 0.0
            for batch in group:
                loss = self.training_step(self.model, batch) / len(group)
                loss.backward()
                total = total + loss.detach()
            self._clip()
            return total

        with torch.enable_grad():
            if self.needs_closure:
                self.optimizer.step(closure)
            else:
                closure()
                self.optimizer.step()

    def _clip(self) -> None:
        if self.clip_grad_value is not None:
            clip_grad_value_(self._moved(), self.clip_grad_value)
        if self.clip_grad_norm is not None:
            clip_grad_norm_(self._moved(), self.clip_grad_norm)

    def _moved(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _schedulers(self) -> list[tuple[LRScheduler, int]]:
        return [given if isinstance(given, tuple) else (given, 1) for given in self.schedulers]


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients; the modules' modes and the random number generators are restored on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), preserve_random_state():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _copy_optimizer(optimizer: Any, memo: dict[int, Any]) -> Any:
    """A copy with all attributes: `Optimizer.__getstate__` keeps three of them, and a subclass may have its own."""
    new = object.__new__(type(optimizer))
    memo[id(optimizer)] = new
    wrapped = False
    for name, value in vars(optimizer).items():
        if callable(value) and hasattr(type(optimizer), name):
            wrapped = wrapped or name == "step"  # by a scheduler, an enforcer or a scaler: it calls the original
        elif name.startswith("_optimizer_") and name.endswith("_hooks"):
            vars(new)[name] = OrderedDict()
        elif isinstance(value, Optimizer) and id(value) not in memo:  # that another one looks after
            vars(new)[name] = _copy_optimizer(value, memo)
        else:
            vars(new)[name] = copy.deepcopy(value, memo)
    if wrapped:
        _tell_schedulers(new)
    return new


def _tell_schedulers(optimizer: Any) -> None:
    """Mark the optimizer as schedulers do, which warn where they do not find it marked."""
    step = optimizer.step

    @wraps(step)
    def shadow(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True
        return step(*args, **kwargs)

    vars(shadow)["_wrapped_by_lr_sched"] = True
    optimizer.step = shadow
