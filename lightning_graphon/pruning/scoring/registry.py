"""The registry of pruning methods, and the context in which a method scores weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from lightning_graphon._shared.checks import check_choice
from lightning_graphon.pruning.scoring.objective import Objective


@dataclass(frozen=True)
class ScoringContext:
    """What a method can use in one round.

    Attributes:
        model: The network; pruned entries of its parameters are zero (unless the method is registered with
            `zeroed=False`).
        weights: Name -> parameter to score, in network order.
        masks: Name -> bool mask so far, True = kept.
        batches: Batches for methods that need data.
        objective: Loss and flow of the network.
        density: Fraction of the weights to keep in the end.
        seed: Seed for methods that draw random numbers.
        average: Averages a tensor over the processes of a distributed run; the identity for one process.
    """

    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    masks: Mapping[str, Tensor]
    batches: Sequence[Any]
    objective: Objective
    density: float
    seed: int
    average: Callable[[Tensor], Tensor]

    def gradients(self, output: Tensor, create_graph: bool = False) -> list[Tensor]:
        """Gradient of a scalar with respect to every weight; zeros where it does not depend on one."""
        weights = self._thawed()
        grads = torch.autograd.grad(output, weights, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]

    def stream_gradients(self, output: Tensor, receive: Callable[[str, Tensor], None]) -> None:
        """Call `receive(name, gradient)` for every weight as soon as the backward pass has its gradient of a scalar.

        So the gradients are never all in memory. Do not change them in place: two weights may share one. Weights on
        which the scalar does not depend are left out.
        """
        weights = self._thawed()
        handles = [weight.register_hook(_gradient_hook(name, receive)) for name, weight in self.weights.items()]
        try:
            torch.autograd.grad(output, weights, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()

    def _thawed(self) -> list[nn.Parameter]:
        """The weights, all of which take part: a step of the generator may have frozen the discriminator."""
        weights = list(self.weights.values())
        for weight in weights:
            weight.requires_grad_(True)
        return weights

    def named(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Values in the order of `weights`, by name."""
        return dict(zip(self.weights, values, strict=True))

    def losses(self, temperature: float = 1.0) -> "list[Callable[[], Tensor]]":
        """One function per batch that evaluates its loss.

        It raises ValueError if the loss does not depend on any weight or is not finite.
        """
        return [_checked_loss(self, i, batch, temperature) for i, batch in enumerate(self.batches)]


def _gradient_hook(name: str, receive: Callable[[str, Tensor], None]) -> Callable[[Tensor], Tensor]:
    def hook(grad: Tensor) -> Tensor:
        receive(name, grad.detach())
        # One number in place of the gradient, which autograd would keep until the end.
        return grad.new_zeros(()).expand_as(grad)

    return hook


def _checked_loss(context: ScoringContext, index: int, batch: Any, temperature: float) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        context._thawed()
        loss = context.objective.loss(batch, temperature)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"the loss must be a scalar tensor, got {shown}")
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on the weights: it has no gradient (detached, or under no_grad?)"
            )
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of scoring batch {index} is {loss.item()}: weights cannot be scored by it")
        return loss

    return evaluate


Needs: TypeAlias = Literal["nothing", "inputs", "data", "loss"]
ScoreT = TypeVar("ScoreT", bound=Callable[..., Mapping[str, Tensor]])


@dataclass(frozen=True)
class Method:
    """A registered pruning method; see `register_method`."""

    name: str
    score: Callable[..., Mapping[str, Tensor]]
    needs: Needs = "inputs"
    steps: int = 1
    zeroed: bool = True
    revives: bool = False


_METHODS: dict[str, Method] = {}


def register_method(
    name: str, *, needs: Needs = "inputs", steps: int = 1, zeroed: bool = True, revives: bool = False
) -> Callable[[ScoreT], ScoreT]:
    """Decorator that makes a saliency function available to `prune` and `PruneAtInit` by name.

    Args:
        name: Name of the method.
        needs: What it uses besides the weights: "loss" of batches, "data" (their inputs), "inputs" (the shapes of
            these), or "nothing".
        steps: Default number of rounds.
        zeroed: Whether pruned entries of the parameters are zero from the second round on, which takes a second copy of
            the weights. False for a method that uses `context.masks`.
        revives: Whether weights that a round has pruned may return in a later one. Such a method scores them too, so
            it needs their values: `zeroed` must be False.

    Raises:
        ValueError: The name is taken by another function, `needs` is unknown, or `revives` goes with `zeroed`.

    >>> @register_method("largest-fan-in")
    ... def largest_fan_in(context):
    ...     return {n: w.detach().abs().sum(1, keepdim=True).expand_as(w) for n, w in context.weights.items()}
    >>> "largest-fan-in" in methods()
    True
    """
    check_choice("needs", needs, get_args(Needs))
    if revives and zeroed:
        raise ValueError(f"{name!r}: weights whose values are gone cannot return, so revives=True needs zeroed=False")

    def register(score: ScoreT) -> ScoreT:
        # The same function may be registered again, as when a notebook cell is run twice.
        known = _METHODS.get(name)
        if known is not None and known.score.__qualname__ != score.__qualname__:
            raise ValueError(f"a pruning method {name!r} exists already: {known.score.__qualname__}")
        _METHODS[name] = Method(name, score, needs, steps, zeroed, revives)
        return score

    return register


def methods() -> list[str]:
    """Names of all pruning methods, in the order of registration."""
    return list(_METHODS)


def get_method(method: str | Callable[..., Mapping[str, Tensor]]) -> Method:
    """The method of that name; a function is a method that may use data.

    Raises:
        TypeError: `method` is neither a name nor a function.
        ValueError: Unknown name.
    """
    if callable(method):
        return Method(getattr(method, "__name__", "custom"), method)
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a function, got {method!r}")
    check_choice("pruning method", method, _METHODS)
    return _METHODS[method]
