"""Watch a forward pass: follow the units of every tensor, function call by function call.

Unlike `tracing`, which reads a network for its infinite-width limit and refuses what has none, nothing is refused here:
of what has no rule all units stay.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lightning_graphon._shared.objects.trees import tree_leaves
from lightning_graphon.compact.reading.records import LayerCall, Record, Used
from lightning_graphon.compact.reading.units import FIXED, Units, Value
from lightning_graphon.tracing.tracer import VALUES, Call, function_name

_LARGEST = 1 << 21  # entries of a parameter, outside layers, that get labels of their own


class NoRuleError(Exception):
    """The units of this call cannot be followed."""


Rule = Callable[["Watcher", Call], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what a torch function of one of these names does to units."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass(eq=False)
class Slot:
    """An axis of a parameter or buffer whose entries are units."""

    tensor: Tensor
    axis: int
    labels: Tensor


@dataclass(eq=False)
class Heads:
    """A module that splits its units into heads, by the labels [heads] of one unit of each, and their width."""

    path: str
    labels: Tensor
    width: int


@dataclass(eq=False)
class Stored:
    """A parameter or buffer that is added or multiplied, with a label for each entry."""

    tensor: Tensor
    labels: Tensor


@dataclass
class Reading:
    """What was read.

    Attributes:
        units: Labels, and which belong together.
        records: What the forward pass does, in order.
        slots: Axes of parameters and buffers, by tensor id and axis.
        stored: Parameters outside layers, by id.
        heads: Attention modules.
        groups: Group labels [groups] of grouped convolutions, by path.
        calls: Calls of each weight, by its id.
    """

    units: Units = field(default_factory=Units)
    records: list[Record] = field(default_factory=list)
    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)
    stored: dict[int, Stored] = field(default_factory=dict)
    heads: list[Heads] = field(default_factory=list)
    groups: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[int, list[LayerCall]] = field(default_factory=lambda: defaultdict(list))

    def slot(self, tensor: Tensor, axis: int, labels: Tensor) -> None:
        """An axis has these units; a shared tensor has them several times, which are the same then."""
        known = self.slots.setdefault((id(tensor), axis), Slot(tensor, axis, labels))
        self.units.join(known.labels, labels)


class Watcher(TorchFunctionMode):
    """Values of all tensors of forward passes.

    Args:
        model: The module.
        kept: Masks by parameter id, True = kept; a weight without one is kept where it is not zero.
        training: Whether only zeros are constants, since everything else is learnt.
    """

    def __init__(self, model: nn.Module, kept: Mapping[int, Tensor], training: bool) -> None:
        super().__init__()
        self.model, self.kept, self.training = model, kept, training
        self.reading = Reading()
        self.units = self.reading.units
        self.path: list[str] = []
        tensors = [*model.parameters(), *model.buffers()]
        self._own = {id(t): t for t in tensors}
        self._modules = {id(m): name for name, m in model.named_modules()}
        self._values: dict[int, tuple[Tensor, Value]] = {}
        self._seen: dict[int, Tensor] = {}

    # ---- what rules use

    def is_own(self, tensor: Any) -> bool:
        """Whether a tensor is a parameter or buffer of the module."""
        return id(tensor) in self._own

    def follows(self, tensor: Tensor) -> bool:
        """Whether something is known of a tensor."""
        return id(tensor) in self._values or id(tensor) in self._own

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor."""
        if id(tensor) in self._values:
            return self._values[id(tensor)][1]
        if id(tensor) in self._own:
            return self._own_value(tensor)
        fixed = torch.zeros((), dtype=torch.long).expand(tensor.shape)
        # What is drawn or made in the forward pass may be another number in training.
        varies = torch.tensor(self.training or id(tensor) not in self._seen).expand(tensor.shape)
        return Value(fixed, varies, torch.zeros_like(tensor) if bool(varies.all()) else tensor)

    def _own_value(self, tensor: Tensor) -> Value:
        labels = torch.full((), FIXED).expand(tensor.shape)
        if 1 < tensor.numel() <= _LARGEST:
            known = self.reading.stored.get(id(tensor))
            labels = known.labels if known else self.units.new(tensor.numel()).reshape(tensor.shape)
            self.reading.stored[id(tensor)] = Stored(tensor, labels)
        varies = torch.tensor(self.training).expand(tensor.shape)
        constant = torch.zeros_like(tensor) if self.training else tensor.detach()
        return Value(labels, varies, constant, fresh=tensor.numel() > 1)

    def set(self, tensor: Tensor, labels: Tensor, varies: Tensor, constant: Tensor, fresh: bool = False) -> None:
        """Remember what a tensor is."""
        varies = varies.expand(tensor.shape)
        if self.training:
            varies = varies | (constant != 0)
        elif constant.is_floating_point():
            varies = varies | constant.isnan()
        constant = torch.where(varies, torch.zeros_like(constant), constant)
        known = Value(labels.expand(tensor.shape), varies, constant.detach(), fresh)
        self._values[id(tensor)] = (tensor, known)  # kept alive, so that no other tensor gets its id

    def set_fixed(self, tensor: Tensor) -> None:
        """A tensor that varies and whose units stay."""
        none = torch.zeros((), dtype=torch.long)
        self.set(tensor, none, torch.tensor(True), torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))

    def record(self, record: Record) -> None:
        """Remember what is read."""
        self.reading.records.append(record)

    def support(self, weight: Tensor) -> Tensor:
        """Where a weight counts."""
        if id(weight) in self.kept:
            kept = self.kept[id(weight)]
            return kept if self.training else kept & (weight.detach() != 0)
        return torch.ones_like(weight, dtype=torch.bool) if self.training else weight.detach() != 0

    @property
    def module(self) -> nn.Module:
        """The module whose forward runs."""
        return self.model.get_submodule(self.path[-1]) if self.path else self.model

    @property
    def where(self) -> str:
        """Its name."""
        return self.path[-1] if self.path else ""

    # ---- watching

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        tensors = list({id(t): t for t in _tensors((args, kwargs))}.values())
        tracked = [t for t in tensors if self.follows(t)]
        out = func(*args, **kwargs)
        made = _tensors(out)
        if not tracked:
            self._seen.update({id(t): t for t in made})
            return out
        if not made and name != "__setitem__":
            if name in VALUES:  # from here on Python computes
                for tensor in tracked:
                    self.use(self.value(tensor).labels, f"{name!r} gives it to Python")
            return out
        call = Call(
            name, f"{name!r}" + (f" in {self.where!r}" if self.where else ""), func, tuple(args), kwargs, out, tracked
        )
        try:
            if name not in RULES:
                raise NoRuleError
            RULES[name](self, call)
        except (NoRuleError, IndexError, RuntimeError):  # or shapes that the rule does not expect
            self._no_rule(call, made)
        return out

    def _no_rule(self, call: Call, made: list[Tensor]) -> None:
        for tensor in call.tracked:
            self.use(self.value(tensor).labels, f"{call.label} has no rule")
        for tensor in [*made, *([call.args[0]] if call.name == "__setitem__" else [])]:
            self.set_fixed(tensor)

    def use(self, labels: Tensor, reason: str) -> None:
        """All of these are needed, and stay."""
        self.units.pin(labels, reason)
        self.record(Used(labels.unique()))

    def run(self, call: Callable[[], Any], inputs: Any) -> None:
        """Watch one forward pass."""
        for tensor in _tensors(inputs):
            self.set_fixed(tensor)
        with self._following_modules(), self:
            out = call()
        for tensor in _tensors(out):
            self.use(self.value(tensor).labels, "it is an output of the network")

    @contextmanager
    def _following_modules(self) -> Iterator[None]:
        def enter(module: nn.Module, args: Any) -> None:
            self.path.append(self._modules.get(id(module), self.where))

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.path.pop()

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
