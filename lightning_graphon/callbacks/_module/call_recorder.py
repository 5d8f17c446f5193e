"""Watches which modules a `training_step` calls: where the network's inputs and outputs are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_graphon._shared.model_io import divide_by_temperature, is_float


class ModuleCallRecorder:
    """Watches the outermost calls of modules with trainable weights while `training_step` runs.

    Args:
        root: The module whose submodules are watched.
        temperature: Divides the outputs of the calls in `cooled`.
        cooled: Numbers of calls, from 0.
        ones: If set, inputs that are data (no result of weights) are replaced by ones times this.
        replace: Number of a call -> what it returns instead.
        among: The modules to watch, where their weights do not tell now which are trainable.

    Attributes:
        outputs: What each outermost call returned.
        calls: Module, arguments and keyword arguments of each outermost call.
    """

    def __init__(
        self,
        root: nn.Module,
        temperature: float = 1.0,
        cooled: frozenset[int] = frozenset(),
        ones: float | None = None,
        replace: Mapping[int, Tensor] | None = None,
        among: Sequence[nn.Module] | None = None,
    ) -> None:
        self.outputs: list[Any] = []
        self.calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self._root, self._temperature, self._cooled, self._ones = root, temperature, cooled, ones
        self._replace, self._among = replace or {}, among
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

    def final_calls(self) -> frozenset[int]:
        """Calls whose outputs no later call builds on: the outputs of the network."""
        nodes = {t.grad_fn: call for call, out in enumerate(self.outputs) for t in _tensors(out) if t.grad_fn}
        used: set[int] = set()
        for number, (_, args, kwargs) in enumerate(self.calls):
            earlier = {node: call for node, call in nodes.items() if call < number}
            used |= _reached([t.grad_fn for t in _tensors((args, kwargs)) if t.grad_fn], earlier)
        return frozenset(range(len(self.outputs))) - used

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._depth += 1
        if self._depth > 1:
            return None
        self.calls.append((module, args, kwargs))
        value = self._ones
        if value is None:
            return None
        dtype = next(p.dtype for p in module.parameters())
        return tree_map(lambda x: _constant(x, value, dtype) if _is_data(x) else x, (args, kwargs))

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._depth -= 1
        if self._depth > 0:
            return None
        output = self._replace.get(len(self.outputs), output)
        if len(self.outputs) in self._cooled:
            output = divide_by_temperature(output, self._temperature)
        self.outputs.append(output)
        return output


def trainable_modules(root: nn.Module) -> list[nn.Module]:
    """`root` and the modules inside it that have a trainable weight."""
    return [m for m in root.modules() if any(p.requires_grad for p in m.parameters())]


def _reached(starts: list[Any], targets: dict[Any, int]) -> set[int]:
    """Which targets the autograd graph below `starts` contains."""
    found, seen, stack = set(), set(), list(starts)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in targets:
            found.add(targets[node])
        else:
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found


def _constant(x: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """A constant like `x` that keeps `x` in the graph, for steps that differentiate by their input."""
    return torch.where(torch.ones_like(x, dtype=torch.bool), value, x.to(dtype))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_data(x: Any) -> bool:
    return is_float(x) and x.grad_fn is None
