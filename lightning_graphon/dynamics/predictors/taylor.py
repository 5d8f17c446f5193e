r"""The Taylor expansion of a network in its parameters, as a network that is trained like any other.

.. math:: f(θ) ≈ f(θ_0) + J (θ − θ_0) + ½ (θ − θ_0)^T H (θ − θ_0) + …

Order 1 is the network in the kernel regime: what its tangent kernel predicts, under any optimizer. It is computed by
forward-mode derivatives at θ0 in the direction θ − θ0, and only that direction is in the graph of the loss: about 1.7
times as much work as a step of the network itself.
"""

import copy
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from math import factorial
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_graphon._shared.batch_norm import batch_norms
from lightning_graphon._shared.checks import as_kind
from lightning_graphon._shared.module_state import swap_tensors
from lightning_graphon._shared.objects.trees import flatten, tree_map
from lightning_graphon.dynamics.predictors.elementary import FIRST_ORDER, HIGHER_ORDERS
from lightning_graphon.dynamics.probed_network import UnsupportedTrainingError

_Module = TypeVar("_Module", bound=nn.Module)
_LOSSES = {getattr(F, name) for name in dir(F) if name.endswith(("loss", "cross_entropy", "logits", "kl_div"))}
# What torch says of an operation that has no forward-mode derivative, or of code of the user's own.
_MISSING = re.compile(
    r"forward AD with (\S+) that does not support it|custom (?:autograd\.)?Function|jvp|forward mode AD"
)


def linearize(model: _Module) -> _Module:
    """A copy of the network that is linear in its parameters, equal to it in value and slope at the present ones.

    Args:
        model: Any module; stays as it is.

    Returns:
        As `taylor_expand(model, order=1)`.

    >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> x, linear = torch.randn(4, 2), linearize(net)
    >>> torch.allclose(linear(x), net(x))
    True
    >>> before = linear(x)
    >>> with torch.no_grad():
    ...     step = [p.mul_(1.5) / 3 for p in linear.parameters()]  # what each parameter moves by
    ...     first = linear(x) - before
    ...     _ = [p.add_(s) for p, s in zip(linear.parameters(), step)]
    >>> torch.allclose(linear(x) - before, 2 * first, atol=1e-5)  # twice as far, twice the change
    True
    """
    return taylor_expand(model, 1)


def taylor_expand(model: _Module, order: int = 1) -> _Module:
    """A copy of the network whose outputs are their Taylor polynomial around the present parameters.

    The copy has the same class, the same names of parameters and its own trainable ones, so optimizers, masks and loss
    functions are used with it as with the network. Submodules of the copy are not expanded when called on their own.

    Args:
        model: Any module; stays as it is.
        order: Of the polynomial; 1 is linear. An order costs about as much as all lower ones together.

    Raises:
        ValueError: `order` is below 1.

    >>> net = nn.Linear(1, 1)
    >>> torch.equal(taylor_expand(net, order=2)(torch.ones(3, 1)), net(torch.ones(3, 1)))
    True
    """
    return taylor_expand_(copy.deepcopy(as_kind("model", model, nn.Module)), order)


def taylor_expand_(module: _Module, order: int = 1) -> _Module:
    """Expand a module in place: calling it gives the polynomial from now on, whoever calls it with whatever arguments.

    Every floating-point tensor that `forward` returns is expanded, in tuples, dicts and dataclasses too. Where the
    module computes a loss by one of torch's functions, the expansion ends at what goes into it, so the loss of the
    expanded outputs is returned and not an expanded loss. In train mode batch norm uses the statistics of the batch in
    the network at θ0, and moves its running ones as training would.

    Args:
        module: The module; its class and its parameters keep their identity.
        order: Of the polynomial.

    Returns:
        The module itself.

    Raises:
        ValueError: `order` is below 1, or a module inside is expanded already.

    >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    >>> taylor_expand_(net) is net
    True
    """
    as_kind("module", module, nn.Module)
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"order must be 1 or more, got {order!r}")
    inside = [name for name, inner in module.named_modules() if name and isinstance(inner.forward, Expansion)]
    if inside:
        raise ValueError(f"{inside[0]} is expanded already, and a polynomial of a polynomial is not its own")
    before = vars(module).get("forward")
    if isinstance(before, Expansion):
        before = before.own
    object.__setattr__(module, "forward", Expansion(module, order, before))
    return module


class Expansion:
    """The `forward` of an expanded module; an object, so that copies of the module get one of their own.

    Args:
        module: Whose parameters are θ0 now.
        order: Of the polynomial.
        own: A `forward` that the module had in place of its class's.
    """

    def __init__(self, module: nn.Module, order: int, own: Callable[..., Any] | None = None) -> None:
        self.module, self.order, self.own = module, order, own
        self._origin = [(p, p.detach().clone()) for p in module.parameters() if p.is_floating_point()]
        self._moved = [p.requires_grad for p, _ in self._origin]
        load_derivatives()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs, expanded."""
        forward = self.own or type(self.module).forward.__get__(self.module)
        return self.evaluate(lambda: forward(*args, **kwargs))

    def evaluate(self, run: Callable[[], Any]) -> Any:
        """What a function that calls the module, or modules inside it, returns, expanded."""
        # A parameter that was trained counts when it is frozen later; one that never was is a constant.
        self._moved = [was or p.requires_grad for was, (p, _) in zip(self._moved, self._origin, strict=True)]
        points: dict[Tensor, Tensor] = {
            p: at.to(p) for moved, (p, at) in zip(self._moved, self._origin, strict=True) if moved
        }
        with _differentiable(self.module), _named_errors():
            if self.order == 1:
                return self._linear(run, points)
            with _counted_batches(self.module):
                return self._polynomial(run, points)

    @staticmethod
    def value(x: Any) -> Any:
        """A tensor inside `evaluate`, of order 1, with its part linear in θ − θ0 added; other values as they are."""
        return _value_of_dual(x)

    def _linear(self, run: Callable[[], Any], points: Mapping[Tensor, Tensor]) -> Any:
        with forward_ad.dual_level():
            duals = {p: forward_ad.make_dual(at, p - at) for p, at in points.items()}
            with _holding(self.module, duals), _Operations(_value_of_dual, FIRST_ORDER):
                return tree_map(_value_of_dual, run())

    def _polynomial(self, run: Callable[[], Any], points: Mapping[Tensor, Tensor]) -> Any:
        """By nested forward-mode derivatives, all in the one direction θ − θ0."""
        rebuild: list[Callable[[list[Tensor]], Any]] = []
        steps = [p - at for p, at in points.items()]

        def outputs(*values: Tensor) -> tuple[Tensor, ...]:
            with _holding(self.module, dict(zip(points, values, strict=True))), _Operations(_refuse, HIGHER_ORDERS):
                leaves, build = flatten(run())
            floats = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]

            def with_floats(new: list[Tensor]) -> Any:
                return build([new[floats.index(i)] if i in floats else x for i, x in enumerate(leaves)])

            rebuild[:] = [with_floats]
            return tuple(leaves[i] for i in floats)

        derivatives = _derivatives(outputs, tuple(points.values()), tuple(steps), self.order)
        terms = [[d / factorial(k) for d in of_order] for k, of_order in enumerate(derivatives)]
        return rebuild[0]([torch.stack(of_leaf).sum(0) for of_leaf in zip(*terms, strict=True)])


def _derivatives(
    fn: Callable[..., tuple[Tensor, ...]], at: tuple[Tensor, ...], direction: tuple[Tensor, ...], order: int
) -> list[tuple[Tensor, ...]]:
    """Value and derivatives up to `order` of s ↦ fn(at + s · direction) at 0."""
    if order == 0:
        return [fn(*at)]
    lower: Callable[..., Any] = lambda *a: tuple(_derivatives(fn, a, direction, order - 1))  # noqa: E731
    values, slopes = torch.func.jvp(lower, at, direction)[:2]
    return [*values, slopes[-1]]


def _value_of_dual(x: Any) -> Any:
    """A dual tensor's value where its direction leads; anything else as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    primal, tangent = forward_ad.unpack_dual(x)
    return primal if tangent is None else primal + tangent


def _refuse(x: Any) -> Any:
    if isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise UnsupportedTrainingError(
            "the module computes its loss itself: expand to order 1, or expand the part of it that returns outputs"
        )
    return x


class _Operations(TorchFunctionMode):
    """Lets torch's loss functions see what `convert` makes of their arguments, and others be computed in other ways."""

    def __init__(self, convert: Callable[[Any], Any], others: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._convert, self._others = convert, others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOSSES:
            args, kwargs = tree_map(self._convert, (args, kwargs or {}))
        return self._others.get(func, func)(*args, **(kwargs or {}))


def load_derivatives() -> None:
    """Torch loads some on the first use of forward mode, and warns of a deprecated function of its own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def _holding(module: nn.Module, substitutes: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Other tensors in place of parameters, also where recurrent layers list them a second time."""
    with swap_tensors(module, substitutes), ExitStack() as stack:
        for inner in module.modules():
            if isinstance(inner, nn.RNNBase):
                stack.callback(setattr, inner, "_flat_weights", inner._flat_weights)
                inner._flat_weights = [w if w is None else substitutes.get(w, w) for w in inner._flat_weights]
        yield


@contextmanager
def _counted_batches(module: nn.Module) -> Iterator[None]:
    """Batch norms count their batch here: nested derivatives allow no operation in place on what is not in them."""
    with ExitStack() as stack:
        for layer in batch_norms(module).values():
            if layer.training and layer.momentum is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.add_(1)
                stack.callback(setattr, layer, "num_batches_tracked", layer.num_batches_tracked)
                layer.num_batches_tracked = None
        yield


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Without the fused operations that have no forward-mode derivative, and outside inference mode."""
    grad, dynamo = torch.is_grad_enabled(), "torch._dynamo" in sys.modules
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(inner, nn.RNNBase) for inner in module.modules()):
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False
        # Without dynamo nothing has been compiled in this process, and importing it would take seconds.
        stack.enter_context(torch.compiler.set_stance("force_eager") if dynamo else nullcontext())
        for context in (torch.inference_mode(False), torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH)):
            stack.enter_context(context)
        yield


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except UnsupportedTrainingError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        if (found := _MISSING.search(str(error))) is None:
            raise
        raise UnsupportedTrainingError(
            f"{found[1] or 'code of this network'} cannot be differentiated in forward mode, as a Taylor expansion "
            f"needs it; predict by a rehearsal, which needs no such derivative. Torch says: {error}"
        ) from error
