"""Watches which modules a `training_step` calls: where the network's inputs and outputs are."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_graphon._shared.model_io import is_float
from lightning_graphon._shared.objects.trees import flatten, tree_leaves, tree_map

T = TypeVar("T")
Place: TypeAlias = tuple[int, int]  # number of a call, and of a value in what it returns


class ModuleCallRecorder:
    """Watches the outermost calls of modules with trainable weights while `training_step` runs.

    Args:
        root: The module whose submodules are watched.
        temperature: Divides the outputs at `cooled`.
        cooled: Places of outputs.
        change: What makes of inputs that are data (no result of weights), in the model's precision, others.
        replace: Place of an output -> what is returned instead.
        convert: Place of an output -> what makes of it what is returned instead.
        among: The modules to watch, of which the outermost are recorded; None: `trainable_modules`.

    Attributes:
        outputs: What each outermost call returned.
        calls: Module, arguments and keyword arguments of each outermost call.
    """

    def __init__(
        self,
        root: nn.Module,
        temperature: float = 1.0,
        cooled: Collection[Place] = (),
        change: Callable[[Tensor], Tensor] | None = None,
        replace: Mapping[Place, Tensor] | None = None,
        among: Sequence[nn.Module] | None = None,
        convert: Mapping[Place, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.outputs: list[Any] = []
        self.calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self._root, self._temperature, self._cooled, self._change = root, temperature, cooled, change
        self._replace, self._among, self._convert = replace or {}, among, convert or {}
        self._depth = 0

    def __enter__(self) -> "ModuleCallRecorder":
        modules = trainable_modules(self._root) if self._among is None else self._among
        self._handles = [
            handle
            for module in modules
            for handle in (
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, always_call=True),
            )
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def output(self, place: Place) -> Any:
        """The value at a place of the outputs."""
        return tree_leaves(self.outputs[place[0]])[place[1]]

    def final_outputs(self, loss: Tensor) -> list[Place]:
        """The network's outputs: what the loss is computed from, and no later call builds on.

        A network may return more than that: hidden states, or the loss itself. Where the graph of the loss shows none,
        all floating-point tensors of the last calls; where it has derivatives of further calls, these calls' too.
        """
        last = frozenset(range(len(self.outputs))) - self._used_calls()
        floats = {
            (call, leaf): x for call in last for leaf, x in enumerate(tree_leaves(self.outputs[call])) if is_float(x)
        }
        edges = {_edge(x): place for place, x in floats.items() if x.grad_fn}
        reached = _reached([_edge(loss)], edges)
        return sorted(reached | self._differentiated(loss, edges, reached)) if reached else sorted(floats)

    def _differentiated(
        self, loss: Tensor, edges: Mapping[tuple[Any, int], Place], reached: Collection[Place]
    ) -> set[Place]:
        """Outputs that the loss knows by derivatives only, as the residual of a PINN beside its boundary term.

        The graph of a derivative does not hold the output, but it does hold the weights that made it.
        """
        others = {place for place in edges.values() if place[0] not in {call for call, _ in reached}}
        weights = {p for call, _ in others for p in self.calls[call][0].parameters() if p.requires_grad}
        leaves = {(get_gradient_edge(p).node, get_gradient_edge(p).output_nr): p for p in weights}
        used = _reached([_edge(loss)], {**edges, **leaves})
        return {place for place in others if any(p in used for p in self.calls[place[0]][0].parameters())}

    def _used_calls(self) -> set[int]:
        """Calls that later ones build on."""
        edges = {_edge(t): call for call, out in enumerate(self.outputs) for t in _tensors(out)}
        used: set[int] = set()
        for number, (_, args, kwargs) in enumerate(self.calls):
            earlier = {edge: call for edge, call in edges.items() if call < number}
            used |= _reached([_edge(t) for t in _tensors((args, kwargs))], earlier)
        return used

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._depth += 1
        if self._depth > 1:
            return None
        self.calls.append((module, args, kwargs))
        change = self._change
        if change is None:
            return None
        dtype = next(p.dtype for p in module.parameters())
        return tree_map(lambda x: change(x.to(dtype)) if _is_data(x) else x, (args, kwargs))

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._depth -= 1
        if self._depth > 0:
            return None
        number = len(self.outputs)
        if any(place[0] == number for place in (*self._replace, *self._cooled, *self._convert)):
            leaves, rebuild = flatten(output)
            cooled = (x / self._temperature if (number, i) in self._cooled else x for i, x in enumerate(leaves))
            converted = (
                self._convert[number, i](x) if (number, i) in self._convert else x for i, x in enumerate(cooled)
            )
            output = rebuild(self._replace.get((number, i), x) for i, x in enumerate(converted))
        self.outputs.append(output)
        return output


def trainable_modules(root: nn.Module) -> list[nn.Module]:
    """`root` and the modules inside it that have a trainable weight."""
    return [m for m in root.modules() if any(p.requires_grad for p in m.parameters())]


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Where a tensor hangs in the autograd graph: an operation may have several results."""
    return tensor.grad_fn, tensor.output_nr


def _reached(starts: list[tuple[Any, int]], targets: Mapping[tuple[Any, int], T]) -> set[T]:
    """Which targets the autograd graph below `starts` contains, none of those behind another."""
    found, seen, stack = set[T](), set[tuple[Any, int]](), list(starts)
    while stack:
        edge = stack.pop()
        if edge in seen or edge[0] is None:
            continue
        seen.add(edge)
        if edge in targets:
            found.add(targets[edge])
        else:
            stack.extend(edge[0].next_functions)
    return found


def _tensors(tree: Any) -> list[Tensor]:
    """Those that hang in an autograd graph."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.grad_fn]


def _is_data(x: Any) -> bool:
    return is_float(x) and x.grad_fn is None
