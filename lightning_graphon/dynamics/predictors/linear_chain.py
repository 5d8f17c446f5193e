"""Read which Linear layers of a module form a chain, and what stands between them, without running the chain."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from lightning_graphon._shared.evaluation import eval_semantics

_DROPOUTS = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Dropout1d)
_DROPOUT_FUNCTIONS = (nn.functional.dropout, nn.functional.alpha_dropout, torch.dropout)
_PER_UNIT = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.PReLU)
_RESHAPES = ("flatten", "view", "reshape", "squeeze")
_SHAPE_METHODS = ("size", "dim", "numel")


@dataclass(frozen=True)
class LinearChain:
    """Linear layers in the order in which a module calls them.

    Attributes:
        linears: Qualified names of the L Linear layers.
        per_unit: Qualified name of a module with a parameter for each unit (norms, PReLU) -> how many of the Linear
            layers stand before it: 0 is on the network's inputs, L on its outputs.
    """

    linears: tuple[str, ...]
    per_unit: dict[str, int]


def read_linear_chain(model: nn.Module) -> LinearChain:
    """Linear layers of a module whose forward is a chain of them, with pointwise operations and norms between.

    Raises:
        ValueError: Something else is in the chain; the message names it.

    >>> read_linear_chain(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 1)))
    LinearChain(linears=('0', '3'), per_unit={'1': 1})
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no Linear layer; only chains of Linear layers are redrawn")
    device = next((p.device for p in first.parameters()), torch.device("cpu"))
    with eval_semantics(model, device), torch.no_grad():
        reader = _Reader(model) if not isinstance(model, nn.Linear) else _Reader(nn.Sequential(model))
        found = reader.read()
    if isinstance(model, nn.Linear):
        found = LinearChain(("",), {})
    _check_weights(model, found)
    return found


@dataclass
class _Reader:
    """Walks the traced graph from the input to the output, one method for each kind of node."""

    model: nn.Module
    linears: list[str] = field(default_factory=list)
    per_unit: dict[str, int] = field(default_factory=dict)
    shapes: set[torch.fx.Node] = field(default_factory=set)
    current: torch.fx.Node | None = None

    def read(self) -> LinearChain:
        try:
            graph = torch.fx.Tracer().trace(self.model)
        except Exception as error:
            raise ValueError(
                f"{type(self.model).__name__} cannot be read as a chain of Linear layers ({error})"
            ) from error
        for node in graph.nodes:
            getattr(self, f"_{node.op}")(node)
        if not self.linears:
            raise ValueError(f"the forward of {type(self.model).__name__} calls no Linear layer")
        return LinearChain(tuple(self.linears), self.per_unit)

    def _placeholder(self, node: torch.fx.Node) -> None:
        if self.current is None:
            self.current = node
        elif node.users:
            raise ValueError(f"the model takes a second input {node.target!r}; only chains of one input are redrawn")

    def _get_attr(self, node: torch.fx.Node) -> None:
        raise _not_a_chain(f"the use of {node.target!r} outside a layer")

    def _output(self, node: torch.fx.Node) -> None:
        if node.args[0] is not self.current:
            raise _not_a_chain("an output that is not the last layer's")

    def _call_module(self, node: torch.fx.Node) -> None:
        name, module = str(node.target), self.model.get_submodule(str(node.target))
        label = f"layer {name!r} ({type(module).__name__})"
        self._advance(node, label)
        if name in self.linears or name in self.per_unit:
            raise _not_a_chain(f"{label}, which is used twice,")
        if type(module) is nn.Linear:
            self.linears.append(name)
        elif isinstance(module, _PER_UNIT):
            self._note_per_unit(name, module, label)
        elif isinstance(module, nn.Flatten | nn.Identity):
            return
        elif not isinstance(module, _DROPOUTS) and not self._is_pointwise(module):
            raise _not_a_chain(label)

    def _note_per_unit(self, name: str, module: nn.Module, label: str) -> None:
        shape = getattr(module, "normalized_shape", (0,))
        if len(shape) != 1:
            raise _not_a_chain(f"{label}, which is over more than one axis,")
        if getattr(module, "num_parameters", 0) != 1:  # a PReLU with one parameter for all
            self.per_unit[name] = len(self.linears)

    def _call_function(self, node: torch.fx.Node) -> None:
        if self._is_shape(node):
            self.shapes.add(node)
            return
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        name = getattr(function, "__name__", str(function))
        self._advance(node, f"the operation {name!r}")
        if function in _DROPOUT_FUNCTIONS or name in _RESHAPES:
            self._check_reshape(name)
            return
        call = partial(_call_with, function, node.args, node.kwargs)
        if function in (getattr, operator.getitem) or not self._is_pointwise(call):
            raise _not_a_chain(f"the operation {name!r}")

    def _call_method(self, node: torch.fx.Node) -> None:
        name = str(node.target)
        if name in _SHAPE_METHODS:
            self.shapes.add(node)
            return
        self._advance(node, f"the method .{name}()")
        if name in _RESHAPES:
            self._check_reshape(name)
        elif not self._is_pointwise(partial(_call_with, getattr(Tensor, name), node.args, node.kwargs)):
            raise _not_a_chain(f"the method .{name}()")

    def _check_reshape(self, name: str) -> None:
        # A view to a fixed number of units would not fit a network of another width.
        if self.linears and name in _RESHAPES and name != "flatten":
            raise _not_a_chain(f"the reshape {name!r} after layer {self.linears[-1]!r}")

    def _is_shape(self, node: torch.fx.Node) -> bool:
        """Whether the node computes with shapes, not with values."""
        if node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype"):
            return True
        inputs = node.all_input_nodes
        return bool(inputs) and all(i in self.shapes for i in inputs)

    def _advance(self, node: torch.fx.Node, label: str) -> None:
        """Check that the node takes the chain's current value and no other, apart from shapes."""
        if [i for i in node.all_input_nodes if i not in self.shapes] != [self.current]:
            raise _not_a_chain(f"{label}, which joins branches or takes an earlier value,")
        self.current = node

    def _is_pointwise(self, function: Callable[[Tensor], Any]) -> bool:
        """Whether each output depends on its own input only, and all in the same way: asked by trying."""
        like = next(p for p in self.model.parameters() if p.is_floating_point())
        x = torch.linspace(-2, 2, 6, dtype=like.dtype, device=like.device).expand(2, 6)
        moved = x.clone()
        moved[:, 0] = 0.3
        try:
            plain, swapped, other = function(x.clone()), function(x.flip(1)), function(moved.clone())
        except Exception:
            return False
        same_shape = isinstance(plain, Tensor) and plain.shape == x.shape
        return same_shape and torch.equal(plain.flip(1), swapped) and torch.equal(plain[:, 1:], other[:, 1:])


def _call_with(function: Callable[..., Any], args: Any, kwargs: Any, x: Tensor) -> Any:
    """The node's call with x in the place of the chain's value."""
    given = torch.fx.node.map_arg((args, kwargs), lambda _: x)
    return function(*given[0], **given[1])


def _not_a_chain(what: str) -> ValueError:
    return ValueError(f"{what} is no part of a chain of Linear layers, norms and pointwise functions: not redrawn")


def _check_weights(model: nn.Module, chain: LinearChain) -> None:
    """Check that all weights are parameters, each of them of one layer, finite, and there."""
    seen: dict[int, str] = {}
    for name in (*chain.linears, *chain.per_unit):
        module = model.get_submodule(name)
        own = dict(module.named_parameters(recurse=False))
        label = f"layer {name!r} ({type(module).__name__})"
        if isinstance(module, nn.Linear) and "weight" not in own:
            raise _not_a_chain(f"{label}, whose weight is computed (pruning hooks, weight_norm, a parametrization),")
        for parameter in own.values():
            if id(parameter) in seen:
                raise _not_a_chain(f"{label}, which shares a parameter with {seen[id(parameter)]!r},")
            seen[id(parameter)] = name
            if not isinstance(parameter, nn.UninitializedParameter) and not bool(parameter.isfinite().all()):
                raise ValueError(f"{label} has parameters that are not finite")
