"""Watch a module's forward pass and write down its steps, function call by function call.

Every torch function that touches the samples, or something that was computed from them, has a rule by its name: layers
of torch.nn, functional calls, operators and methods all end in one of these functions. What has no rule is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_graphon.tracing.steps import Input, Parameter, Step
from lightning_graphon.tracing.views import View, array_layout

# What would let Python decide by the samples.
VALUES = {"__bool__", "__float__", "__int__", "__index__", "__array__", "item", "tolist", "numpy", "nonzero", "equal",
           "allclose"}  # fmt: skip
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HINTS = {"max_pool": "AvgPool", "maxpool": "AvgPool", "instance_norm": "GroupNorm"}  # what to use instead


class NotReadableError(ValueError):
    """A module does something that has no rule; the message names the layer.

    Attributes:
        steps: Number of steps that were read before.
    """

    steps = 0


Rule = Callable[["Tracer", "Call"], None]
RULES: dict[str, Rule] = {}
RULES_OF: dict[type[Step], dict[str, Rule]] = {}  # what functions do to a kind of step that has rules of its own
ON_PARAMETERS: set[str] = set()  # functions that are followed where parameters alone go in: reshapes
ON_WEIGHTS = {"embedding"}  # those that read a parameter as their weight


def rule(*names: str, on_parameters: bool = False, of: type[Step] | None = None) -> Callable[[Rule], Rule]:
    """Register what a torch function of one of these names does; `of` a kind of step alone."""

    def register(function: Rule) -> Rule:
        rules = RULES if of is None else RULES_OF.setdefault(of, {})
        rules.update(dict.fromkeys(names, function))
        if on_parameters:
            ON_PARAMETERS.update(names)
        return function

    return register


@dataclass(frozen=True)
class Call:
    """One call of a torch function.

    Attributes:
        name: Name of the function, without the underscore of in-place ones.
        label: What messages call it.
        func: The function.
        args: Its arguments.
        kwargs: Its named arguments.
        out: What it returned.
        tracked: The arguments that the tracer follows, each once.
    """

    name: str
    label: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    tracked: list[Tensor]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def run(self, *tensors: Tensor) -> Any:
        """The function with other tensors in place of `tracked`."""
        changed = {id(old): new for old, new in zip(self.tracked, tensors, strict=True)}
        args, kwargs = tree_map(lambda leaf: changed.get(id(leaf), leaf), (self.args, self.kwargs))
        return self.func(*args, **kwargs)


class Tracer(TorchFunctionMode):
    """Steps of one forward pass, in order.

    Attributes:
        steps: What was found.
        replays: For each step the views that it reads, the function of them, and the codes of what it gives.
        joined: Pairs of unit ids that are the same units.
        channels_last: Whether the last axis of samples and of added parameters is that of the units, not the first.
    """

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.model, self.channels_last = model, channels_last
        self.steps: list[Step] = []
        self.replays: list[tuple[list[View], Callable[..., Tensor], Tensor]] = []
        self.joined: list[tuple[Tensor, Tensor]] = []
        self.units = 0
        self.path: list[str] = []
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._modules = {id(m): name for name, m in model.named_modules()}
        self._views: dict[int, tuple[Tensor, View]] = {}
        self._computed: dict[int, Tensor] = {}  # from parameters, by something else than a reshape
        self._used: dict[int, str] = {}

    # ---- what rules use

    def new_units(self, count: int) -> Tensor:
        """Ids of units that were not there before."""
        self.units += count
        return torch.arange(self.units - count, self.units)

    def record(self, out: Tensor, step: Step, codes: Tensor, reads: Sequence[View], run: Callable[..., Tensor]) -> View:
        """Add a step whose array holds `out` at `codes`."""
        self.steps.append(step)
        self.replays.append((list(reads), run, codes))
        return self.follow(out, View(len(self.steps) - 1, step, codes))

    def follow(self, tensor: Tensor, view: View) -> View:
        """Remember what a tensor is."""
        self._views[id(tensor)] = (tensor, view)  # kept alive, so that no other tensor gets its id
        return view

    def follows(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the samples or is a moved parameter."""
        return id(tensor) in self._views

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the module's parameters."""
        return id(tensor) in self._names

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on neither samples nor parameters."""
        return not any(id(tensor) in known for known in (self._views, self._names, self._computed))

    def view(self, tensor: Tensor, label: str = "") -> View:
        """What a tensor is; parameters and constants become steps of their own."""
        if id(tensor) in self._views:
            return self._views[id(tensor)][1]
        if id(tensor) in self._computed:
            raise refusal(f"{label}, which reads what is computed from parameters or attention weights,")
        return self._constant(tensor, label)

    def with_units_along(self, view: View, dim: int) -> View:
        """A view of the samples with one unit for each entry of an axis: samples may be reshaped as one likes."""
        if not isinstance(view.step, Input) or bool((view.codes < 0).any()):
            return view
        size = len(view.step.units) * view.step.positions
        entry = view.step.entries.reshape(-1)[view.codes[0] % size].movedim(dim - 1, 0)
        table = entry.reshape(len(entry), -1)
        step = Input("the input", self.new_units(len(table)), table.shape[1], entries=table, inputs=())
        codes = torch.arange(table.numel()).reshape(entry.shape).movedim(0, dim - 1)
        offset = table.numel() * torch.arange(len(view.codes)).reshape(-1, *[1] * codes.ndim)
        return self.record(torch.empty(0), step, codes + offset, [view], lambda tensor: tensor)

    def hide(self, tensor: Tensor) -> None:
        """Refuse whatever reads a tensor."""
        self._computed[id(tensor)] = tensor

    def weight_name(self, tensor: Tensor, key: str, label: str) -> str:
        """Qualified name of a layer's weight or bias.

        Raises:
            NotReadableError: It is computed, or another layer has it too.
        """
        name = self._names.get(id(tensor))
        module = self.module
        if name is None and {f"{key}_orig", f"{key}_mask"} <= _registered(module):
            # torch.nn.utils.prune computes the weight from these two, which is no reparametrisation.
            name = ".".join(part for part in (self.path[-1], key) if part)
        if name is None:
            raise refusal(f"{label}, whose {key} is computed (weight_norm, spectral_norm, a parametrization),")
        self.use(tensor, label)
        return name

    def use(self, tensor: Tensor, label: str) -> None:
        """Note that a layer has this parameter.

        Raises:
            NotReadableError: A layer had it before.
        """
        before = self._used.setdefault(id(tensor), label)
        if before is not label:
            shares = "is used twice" if before == label else f"shares its weight with {before}, an earlier one"
            raise refusal(f"{label}, which {shares},")

    @property
    def module(self) -> nn.Module:
        """The module whose forward runs."""
        return self.model.get_submodule(self.path[-1]) if self.path else self.model

    # ---- watching

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        tensors = list({id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}.values())
        tracked = self._tracked(tensors, name)
        if not tracked:
            out = func(*args, **kwargs)
            if any(id(t) in self._names or id(t) in self._computed or id(t) in self._views for t in tensors):
                self._computed.update({id(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)})
            return out
        if name in VALUES:
            raise refusal(f"control flow that depends on the samples ('{name}' of a tensor)")
        label = self._label(name)
        out = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)) and name != "__setitem__":
            return out
        found = self._rule(name, tracked)
        if found is None:
            raise refusal(label)
        found(self, Call(name, label, func, tuple(args), kwargs, out, tracked))
        return out

    def _rule(self, name: str, tracked: list[Tensor]) -> Rule | None:
        kinds = [type(self._views[id(t)][1].step) for t in tracked if id(t) in self._views]
        own = [RULES_OF[kind][name] for kind in kinds if name in RULES_OF.get(kind, {})]
        return own[0] if own else RULES.get(name)

    def _tracked(self, tensors: list[Tensor], name: str) -> list[Tensor]:
        """The tensors of a call that are followed; none where the samples have no part in it."""
        followed = [t for t in tensors if id(t) in self._views]
        if any(self._views[id(t)][1].step.batched for t in followed):
            return followed
        if name in ON_WEIGHTS:
            return [t for t in tensors if id(t) in self._names]
        if name not in ON_PARAMETERS:
            return []
        for tensor in tensors:
            if id(tensor) in self._names and id(tensor) not in self._views:
                self._constant(tensor, self._label(name))
        return [t for t in tensors if id(t) in self._views]

    def _constant(self, tensor: Tensor, label: str) -> View:
        name = self._names.get(id(tensor))
        if name is not None:
            self.use(tensor, label)
        codes, units, positions, entries = array_layout(tensor.shape, self.channels_last)
        step = Parameter(
            f"parameter {name!r}" if name else "a constant", self.new_units(units), positions, batched=False,
            name=name, tensor=tensor, entries=entries,
        )  # fmt: skip
        return self.record(tensor, step, codes, [], lambda: tensor)

    def _label(self, name: str) -> str:
        module = self.module
        own = type(module).__module__.startswith("torch.nn.") and not isinstance(module, _CONTAINERS)
        if self.path and own:
            return f"layer {self.path[-1]!r} ({type(module).__name__})"
        return f"the operation {name!r}" + (f" in {self.path[-1]!r}" if self.path and self.path[-1] else "")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is called inside."""

        def enter(module: nn.Module, args: Any) -> None:
            self.path.append(self._modules.get(id(module), self.path[-1] if self.path else ""))

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.path.pop()

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


def refusal(what: str) -> NotReadableError:
    """The error for something that has no rule."""
    hint = next((f" (but {instead} has one)" for name, instead in _HINTS.items() if name in what.lower()), "")
    return NotReadableError(f"{what} has no infinite-width limit that is known here{hint}")


def _registered(module: nn.Module) -> set[str]:
    return {*module._parameters, *module._buffers}


def function_name(func: Any) -> str:
    """Name of a torch function, without the underscore of in-place ones."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":  # an attribute, as .T
        return str(getattr(func.__self__, "__name__", name))
    return name if name.startswith("__") or not name.endswith("_") else name[:-1]
