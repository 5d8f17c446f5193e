"""Read a module that is a chain of Linear layers and activations; errors name what else it contains."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from lightning_graphon._shared.evaluation import eval_semantics
from lightning_graphon.ntk.activations.base import DualActivation, HermiteDual
from lightning_graphon.ntk.activations.elu import celu, elu
from lightning_graphon.ntk.activations.piecewise_linear import ReLULike
from lightning_graphon.ntk.activations.registry import dual_activation

_ALTERNATIVE = "use `empirical_ntk`, which takes any module"
_SKIPPED = (nn.Flatten, nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Dropout1d)
_SKIPPED_FUNCTIONS = (torch.flatten, nn.functional.dropout, nn.functional.alpha_dropout)
_SKIPPED_METHODS = ("flatten", "view", "reshape", "contiguous", "float", "double", "squeeze")
_SHAPE_METHODS = ("size", "dim", "numel")
_NOT_ELEMENTWISE = (nn.MultiheadAttention, nn.GLU, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
_ELEMENTWISE = {
    "relu", "leaky_relu", "gelu", "silu", "elu", "selu", "celu", "tanh", "sigmoid", "softplus", "softsign", "mish",
    "hardtanh", "relu6", "hardsigmoid", "hardswish", "logsigmoid", "tanhshrink", "erf", "sin", "cos", "exp", "abs",
    "square", "atan", "sinh", "asinh",
}  # fmt: skip


@dataclass(frozen=True)
class Affine:
    """One Linear layer of a chain.

    Attributes:
        name: The module's qualified name; its weight is `name + ".weight"`.
        module: The layer.
        dual: Activation after it; None after the last.
    """

    name: str
    module: nn.Linear
    dual: DualActivation | None

    @property
    def weight_name(self) -> str:
        """Qualified name of the weight."""
        return f"{self.name}.weight" if self.name else "weight"


def read_chain(model: nn.Module, x: Tensor) -> list[Affine]:
    """Linear layers in order, with the activations between them.

    Flatten, reshapes that keep the samples, Identity and Dropout are ignored; two Linear layers in a row have the
    identity between them. The chain is run on the first samples of `x` and must give the model's outputs.

    Raises:
        ValueError: Something else is in the chain; the message names it and suggests `empirical_ntk`.
    """
    with eval_semantics(model, x.device):
        chain = [Affine("", model, None)] if isinstance(model, nn.Linear) else _Reader(model).read()
        _check_weights(chain)
        with torch.no_grad():
            _check_outputs(chain, model, x[:4])
    return chain


class _Reader:
    """Walks the traced graph from the input to the output."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        try:
            self.graph = _sequential_graph(model) or torch.fx.Tracer().trace(model)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be read as a chain of Linear layers ({error}); {_ALTERNATIVE}"
            ) from error
        self.found: list[tuple[str, nn.Linear]] = []
        self.duals: list[DualActivation | None] = []
        self.shapes: set[torch.fx.Node] = set()
        self.current: torch.fx.Node | None = None

    def read(self) -> list[Affine]:
        # One method per kind of node: placeholder, get_attr, call_module, call_function, call_method, output.
        for node in self.graph.nodes:
            getattr(self, f"_{node.op}")(node)
        if not self.found:
            raise ValueError(f"{type(self.model).__name__} has no Linear layer in its chain; {_ALTERNATIVE}")
        if self.duals[-1] is not None:
            raise ValueError(
                f"an activation follows the last Linear layer {self.found[-1][0]!r}: the kernel is that of a "
                f"linear readout; return the logits, or {_ALTERNATIVE}"
            )
        identity = dual_activation("identity")
        inner = [identity if d is None else d for d in self.duals[:-1]]
        return [Affine(n, m, d) for (n, m), d in zip(self.found, [*inner, None], strict=True)]

    def _placeholder(self, node: torch.fx.Node) -> None:
        if self.current is None:
            self.current = node
        elif node.users:
            raise ValueError(f"the model takes a second input {node.target!r}; {_ALTERNATIVE}")

    def _get_attr(self, node: torch.fx.Node) -> None:
        raise _not_a_chain(f"the use of {node.target!r} outside a layer")

    def _output(self, node: torch.fx.Node) -> None:
        if node.args[0] is not self.current:
            raise _not_a_chain("an output that is not the last layer's")

    def _call_module(self, node: torch.fx.Node) -> None:
        name, module = str(node.target), self.model.get_submodule(str(node.target))
        label = f"layer {name!r} ({type(module).__name__})"
        # Dropout and Flatten pass the chain's value on as well.
        self._advance(node, label)
        if isinstance(module, nn.Linear):
            if any(name == other for other, _ in self.found):
                raise _not_a_chain(f"{label}, which is used twice,")
            self.found.append((name, module))
            self.duals.append(None)
        elif isinstance(module, _SKIPPED):
            return
        elif type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, _NOT_ELEMENTWISE):
            self._activate(dual_activation(module), label)
        else:
            raise _not_a_chain(label)

    def _call_function(self, node: torch.fx.Node) -> None:
        if self._is_shape(node):
            self.shapes.add(node)
            return
        if node.target in (getattr, operator.getitem):
            raise _not_a_chain(f"the operation {node.name!r}")
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        name = getattr(function, "__name__", str(function))
        label = f"the operation {name!r}"
        self._advance(node, label)
        if function in _SKIPPED_FUNCTIONS:
            return
        if name not in _ELEMENTWISE:
            raise _not_a_chain(label)
        self._activate(_function_dual(function, name, node), label)

    def _call_method(self, node: torch.fx.Node) -> None:
        name = str(node.target)
        if name in _SHAPE_METHODS:
            self.shapes.add(node)
            return
        self._advance(node, f"the method .{name}()")
        if name in _SKIPPED_METHODS:
            return
        if name.rstrip("_") not in _ELEMENTWISE:
            raise _not_a_chain(f"the method .{name}()")
        self._activate(dual_activation(getattr(torch, name.rstrip("_"))), f"the method .{name}()")

    def _is_shape(self, node: torch.fx.Node) -> bool:
        """Whether the node computes with shapes, not with values."""
        if node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype"):
            return True
        inputs = node.all_input_nodes
        return bool(inputs) and all(i in self.shapes for i in inputs)

    def _advance(self, node: torch.fx.Node, label: str) -> None:
        """Check that the node takes the chain's current value and no other, apart from shapes."""
        values = [i for i in node.all_input_nodes if i not in self.shapes]
        if values != [self.current]:
            raise _not_a_chain(f"{label}, which joins branches or takes an earlier value,")
        self.current = node

    def _activate(self, dual: DualActivation, label: str) -> None:
        if not self.duals:
            raise _not_a_chain(f"{label} before the first Linear layer")
        if self.duals[-1] is not None:
            raise _not_a_chain(f"{label} right after another activation")
        self.duals[-1] = dual


def _sequential_graph(model: nn.Module) -> torch.fx.Graph | None:
    """The graph of an `nn.Sequential` of torch's own layers; None for anything else."""
    # In a tenth of the time of tracing.
    steps = list(_steps(model)) if type(model) is nn.Sequential else []
    # Subclasses and foreign layers may do anything in their forward, so they are traced.
    foreign = any(not module.__module__.startswith("torch.nn") for _, module in steps)
    if not steps or foreign or len({module for _, module in steps}) < len(steps):
        return None
    graph = torch.fx.Graph()
    value = graph.placeholder("input")
    for name, _ in steps:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def _steps(model: nn.Sequential, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    for key, module in model.named_modules(remove_duplicate=False):  # named_children has a module twice used once only
        if not key or "." in key:
            continue
        if type(module) is nn.Sequential:
            yield from _steps(module, f"{path}{key}.")
        else:
            yield f"{path}{key}", module


def _not_a_chain(what: str) -> ValueError:
    return ValueError(f"{what} is no part of a chain of Linear layers and elementwise activations; {_ALTERNATIVE}")


def _function_dual(function: Callable[..., Any], name: str, node: torch.fx.Node) -> DualActivation:
    # Arguments other than the input and `inplace` change the function, so its registered dual does not hold.
    extra, options = node.args[1:], {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
    if name == "leaky_relu":
        return ReLULike(float(options.get("negative_slope", extra[0] if extra else 0.01)), 1.0, name)  # type: ignore[arg-type]
    plain = all(isinstance(value, bool) for value in extra) and set(options) <= {"approximate"}
    if plain and options.get("approximate", "none") == "none":
        known = dual_activation(name) if name in ("relu", "relu6", "hardtanh", "hardsigmoid") else None
        return known or dual_activation(function)
    if name in ("elu", "celu"):
        alpha = float(options.get("alpha", extra[0] if extra else 1.0))  # type: ignore[arg-type]
        return elu(alpha) if name == "elu" else celu(alpha)
    if name in ("selu", "softsign"):
        return dual_activation(name)
    return HermiteDual(lambda z: function(z, *extra, **options), name=name)


def _check_weights(chain: list[Affine]) -> None:
    """Check that the weights are parameters, each of them of one layer."""
    seen: set[nn.Parameter] = set()
    for layer in chain:
        module, label = layer.module, f"layer {layer.name!r} ({type(layer.module).__name__})"
        parameters, buffers = dict(module.named_parameters(recurse=False)), dict(module.named_buffers(recurse=False))
        # torch.nn.utils.prune computes the weight from these two, which is no reparametrisation.
        pruned = parameters.get("weight_orig") if "weight_mask" in buffers else None
        weight = parameters.get("weight", pruned)
        if weight is None:
            raise _not_a_chain(f"{label}, whose weight is computed (weight_norm, spectral_norm, a parametrization),")
        if weight in seen:
            raise _not_a_chain(f"{label}, which shares its weight with an earlier one,")
        seen.add(weight)


def _check_outputs(chain: list[Affine], model: nn.Module, x: Tensor) -> None:
    x = x.to(chain[0].module.weight.dtype)  # the kernel is float64 whatever the dtypes of model and samples
    h = x.flatten(1)
    for layer in chain:
        h = nn.functional.linear(h, layer.module.weight, layer.module.bias)  # without hooks
        h = h if layer.dual is None else layer.dual.forward(h)
    out = model(x)
    if not isinstance(out, Tensor):
        raise ValueError(f"the model returns {type(out).__name__}, not a tensor; {_ALTERNATIVE}")
    out = out.reshape(len(x), -1)
    tolerance = 100 * torch.finfo(out.dtype).eps ** 0.5
    if out.shape != h.shape or float((out - h).abs().max()) > tolerance * max(float(out.abs().max()), 1e-30):
        raise ValueError(
            f"the model is not the chain of layers {[a.name for a in chain]} that it looks like; {_ALTERNATIVE}"
        )
