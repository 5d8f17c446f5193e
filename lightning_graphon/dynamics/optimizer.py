r"""What an optimizer does to a function: learning rates, momentum, and its diagonal preconditioner.

One step of SGD moves the parameters by :math:`-η b`, Adam and RMSprop by :math:`-η P b` with a diagonal P from
running means of squared gradients. While P stands still this is linear in the gradients, so it carries over to
function space with the kernel :math:`Σ_p P_p ∂_p f ∂_p f'` in place of Θ.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_graphon._shared.checks import checked
from lightning_graphon.dynamics.descent.stability import check_sgd
from lightning_graphon.pruning import full_tensor, is_sharded

RateGroups = tuple[tuple[int, ...], ...]
_ROUNDING = 1e3  # times as small as those of its layer's weight; inputs so large make a bias matter as little
_RATES = ("lr", "initial_lr", "max_lr")  # a group's learning rate, and what schedulers note of the later ones


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step in function space: f ← f − Σ_g η_g Θ_g b, with b as `torch.optim.SGD` has it.

    Attributes:
        rates: learning rate η_g of every parameter group.
        momentum: μ; β1 of Adam.
        nesterov: as in SGD.
        dampening: as in SGD; β1 of Adam, whose buffer is a mean of gradients.
        adaptive: whether a diagonal preconditioner from the optimizer's state belongs to the kernel.
    """

    rates: tuple[float, ...]
    momentum: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0
    adaptive: bool = False


@checked
def read_optimizer_step(optimizer: Optimizer) -> OptimizerStep:
    """Learning rates and momentum that the optimizer will use in its next step.

    Args:
        optimizer: SGD, Adam, AdamW or RMSprop, or a subclass.

    Raises:
        ValueError: another optimizer, groups whose momentum differs, or `maximize`.

    >>> read_optimizer_step(SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9))
    OptimizerStep(rates=(0.1,), momentum=0.9, nesterov=False, dampening=0.0, adaptive=False)
    """
    groups = [_group(optimizer, group) for group in optimizer.param_groups]
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(f"{type(optimizer).__name__}(maximize=True) climbs; what is predicted is descent")
    if len({(g.momentum, g.nesterov, g.dampening) for g in groups}) != 1:
        raise ValueError("parameter groups with different momentum move different functions; give them the same")
    first = groups[0]
    rates = tuple(rate for group in groups for rate in group.rates)
    check_sgd(first.momentum, first.nesterov)
    return OptimizerStep(rates, first.momentum, first.nesterov, first.dampening, first.adaptive)


def _group(optimizer: Optimizer, group: dict[str, Any]) -> OptimizerStep:
    rates = (float(group["lr"]),)
    if isinstance(optimizer, (Adam, AdamW)):
        beta = float(group["betas"][0])
        return OptimizerStep(rates, beta, dampening=beta, adaptive=True)
    if isinstance(optimizer, RMSprop):
        return OptimizerStep(rates, float(group["momentum"]), adaptive=True)
    if isinstance(optimizer, SGD):
        return OptimizerStep(rates, float(group["momentum"]), bool(group["nesterov"]), float(group["dampening"]))
    raise ValueError(f"{type(optimizer).__name__} cannot be told in function space; SGD, Adam, AdamW and RMSprop can")


@checked
def optimizer_preconditioner(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    r"""The diagonal P of Adam, AdamW or RMSprop as its state has it now.

    :math:`P = 1/(\sqrt{\hat v} + ε)` with Adam's bias-corrected (or AMSGrad's largest) second moment, or RMSprop's
    (centred) mean square. Entries that never had a gradient, and parameters that the optimizer does not move, get 0:
    1/ε would let the first gradient, which is divided by itself, move them without bound.

    Args:
        optimizer: after at least one step.
        model: whose parameters are named.

    Returns:
        Qualified parameter name -> P of its shape; for `empirical_ntk(..., preconditioner=...)`. Empty for SGD.

    Raises:
        ValueError: the optimizer has taken no step yet, or is not one that is known.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> optimizer = RMSprop(model.parameters(), lr=0.1, alpha=0.0, eps=0.0)
    >>> model(torch.tensor([[2.0]])).sum().backward()
    >>> optimizer.step()
    >>> optimizer_preconditioner(optimizer, model)["weight"].item()  # one over the gradient, 2
    0.5
    """
    if not read_optimizer_step(optimizer).adaptive:
        return {}
    moved = {p: group for group in optimizer.param_groups for p in group["params"]}
    if not any(optimizer.state.get(p) for p in moved):
        raise ValueError(f"{type(optimizer).__name__} has no state yet: its preconditioner is known after some steps")
    return {
        name: _diagonal(optimizer, p, moved[p])
        if p in moved and optimizer.state.get(p)
        else torch.zeros_like(p.detach())
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@torch.no_grad()
def _diagonal(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    state = optimizer.state[parameter]
    if isinstance(optimizer, RMSprop):
        square = state["square_avg"]
        if group["centered"]:
            square = square - state["grad_avg"].square()
    else:
        second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        square = second / (1 - float(group["betas"][1]) ** float(state["step"]))
    return torch.where(square > 0, 1 / (square.clamp_min(0).sqrt() + float(group["eps"])), 0.0)


def optimizer_momentum(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Momentum buffers as the optimizer's state has them now, not preconditioned: qualified parameter name -> buffer.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> model(torch.tensor([[2.0]])).sum().backward()
    >>> optimizer.step()
    >>> optimizer_momentum(optimizer, model)
    {'weight': tensor([[2.]])}
    """
    states = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}
    found = {name: state.get("momentum_buffer", state.get("exp_avg")) for name, state in states.items()}
    return {name: buffer for name, buffer in found.items() if buffer is not None}


def adam_steps(optimizer: Optimizer) -> int | None:
    """Steps that Adam has taken, by which it corrects its buffer, a mean that began at 0; None for other optimizers."""
    if not isinstance(optimizer, (Adam, AdamW)):
        return None
    taken = (optimizer.state[p]["step"] for g in optimizer.param_groups for p in g["params"] if optimizer.state.get(p))
    return int(max(map(float, taken), default=0))


def rate_groups(optimizer: Optimizer) -> RateGroups:
    """Parameter groups by learning rate: those of one tuple share it now, and have to go on sharing it.

    Groups that warm up from 0 share a rate that will differ; so what schedulers have noted counts, too.
    """
    keys = [tuple(float(group.get(name, -1.0)) for name in _RATES) for group in optimizer.param_groups]
    return tuple(tuple(i for i, key in enumerate(keys) if key == value) for value in dict.fromkeys(keys))


class OptimizerView:
    """An optimizer and the names of what it trains.

    Args:
        optimizer: Trains parameters of the module.
        module: Names them.
        keep: Whether this process wants what is gathered; where it does not, it only takes part.
    """

    @checked
    def __init__(self, optimizer: Optimizer, module: nn.Module, keep: bool = True) -> None:
        self.optimizer, self._module, self._keep = optimizer, module, keep
        self._named: dict[Tensor, str] | None = None
        self._gathered: tuple[dict[str, Tensor], dict[str, Tensor]] | ValueError | None = None

    @contextmanager
    def read(self) -> Iterator[None]:
        """Inside, names and state need no other process, and know the parameters as they are on entering.

        Needed where parameters are cut over processes: to be entered by every process before the weights are gathered.
        """
        self._named = self._names()
        try:
            if any(map(is_sharded, self._named)):
                self._gathered = self._gather()
            yield
        finally:
            self._named = self._gathered = None

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._module.named_parameters()}

    def _gather(self) -> tuple[dict[str, Tensor], dict[str, Tensor]] | ValueError:
        try:
            diagonal = optimizer_preconditioner(self.optimizer, self._module)
        except ValueError as error:  # on every process; raised where it is asked for
            return error
        return self._whole(diagonal), self._whole(optimizer_momentum(self.optimizer, self._module))

    def _whole(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = ((name, full_tensor(part)) for name, part in parts.items())
        return {name: tensor for name, tensor in whole if self._keep}

    def names(self, group: int) -> set[str]:
        """Names of the parameters in a parameter group."""
        names = self._names() if self._named is None else self._named
        return {names[p] for p in self.optimizer.param_groups[group]["params"] if p in names}

    def diagonal(self) -> dict[str, Tensor]:
        """The preconditioner by names, whole; empty for SGD. 0 for biases whose gradients are rounding errors.

        Raises:
            ValueError: As `optimizer_preconditioner`.
        """
        whole = self._state()[0]
        return {name: _without_rounding(name, whole) for name in whole}

    def velocity(self) -> dict[str, Tensor]:
        """The direction in which momentum moves the parameters without any gradient, by names, whole; empty without.

        SGD's and RMSprop's buffer, and Adam's times its preconditioner.

        Raises:
            ValueError: As `optimizer_preconditioner`.
        """
        buffers = self._state()[1]
        diagonal = {} if adam_steps(self.optimizer) is None else self.diagonal()
        return {name: b * diagonal[name] if name in diagonal else b for name, b in buffers.items()}

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Preconditioner and momentum buffers."""
        if isinstance(self._gathered, ValueError):
            raise self._gathered
        if self._gathered is not None:
            return self._gathered
        of = self.optimizer, self._module
        return optimizer_preconditioner(*of), optimizer_momentum(*of)

    @property
    def adaptive(self) -> bool:
        """Whether there is a preconditioner."""
        return read_optimizer_step(self.optimizer).adaptive


def relative_rates(rates: Sequence[float]) -> list[float]:
    """Learning rates relative to the largest; 1 where all are 0."""
    largest = max(rates)
    return [rate / largest if largest > 0 else 1.0 for rate in rates]


def _without_rounding(name: str, diagonal: dict[str, Tensor]) -> Tensor:
    """P of a parameter; 0 for a bias all of whose gradients are nothing beside those of its layer's weight.

    A batch norm takes away what the bias before it adds. That bias has no gradient in training, and Adam divides by its
    rounding error; in eval mode it has one, and would move the outputs without bound. Single entries may be as small
    elsewhere, as those of units that are nearly dead.
    """
    own, weight = diagonal[name], diagonal.get(name.removesuffix("bias") + "weight")
    if not name.endswith("bias") or weight is None or not bool((own > 0).any() and (weight > 0).any()):
        return own
    typical = 1 / weight[weight > 0].reciprocal().mean()
    return torch.zeros_like(own) if bool(own[own > 0].min() > _ROUNDING * typical) else own
