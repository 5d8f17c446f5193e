"""Remember what objects hold and restore what has changed: tensors, containers, attributes, random generators."""

import types
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_graphon._shared.objects.reachable import (
    Restore,
    generator_restorer,
    is_left_alone,
    package_of,
    slots_of,
    used_by_class,
    used_by_function,
)

# Values that cannot change in place.
_CONSTANT = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, torch.dtype, torch.device, Path)
_CONTAINERS = (OrderedDict, dict, list, set, deque)  # the first that fits knows how to refill a subclass
_WALKED = (nn.Module, Dataset, Sampler, DataLoader, UserDict, UserList, types.SimpleNamespace)
# Who holds something of these works with threads, files or other processes, which go on meanwhile.
_LIVE = {"_thread", "threading", "_io", "socket", "_queue", "queue", "multiprocessing", "concurrent", "asyncio"}
_MOST_OBJECTS = 100_000
_LARGEST_CONTAINER = 100_000  # members; a larger one is data and not state
_MANY = 1000  # members that are visited after all else, so that samples do not hide a generator


@contextmanager
def preserve_objects(
    *roots: Any,
    skip: Iterable[Any] = (),
    always: Iterable[Tensor] = (),
    room: float = 0,
    told: Callable[[Tensor], object] = lambda tensor: None,
) -> Iterator[None]:
    """Restore on leaving what the roots hold, to any depth; what has not changed is not touched.

    Restored are tensors and arrays in place, the members of lists, dicts, sets and deques, the attributes of objects,
    and the states of random generators, also of those that functions use by a closure or a global name. Left alone are
    other objects of torch, Lightning and the standard library, what works with threads or files, and containers that
    are too large to be state.

    Args:
        roots: Where to begin.
        skip: Objects that are restored elsewhere.
        always: Tensors that are copied whatever their size.
        room: Bytes of other tensors and of arrays that are copied, at most.
        told: Called with each tensor that found no room and has changed.

    >>> model = nn.Linear(1, 1)
    >>> import random
    >>> model.history, model.rng = [], random.Random(0)
    >>> with preserve_objects(model):
    ...     model.history.append(model.rng.random())
    >>> model.history, model.rng.random() == random.Random(0).random()
    ([], True)
    """
    walk = _Walk(told)
    walk.seen.update((id(x), x) for x in skip)
    walk.visit(always)
    walk.room = room
    walk.visit(roots)
    with ExitStack() as stack:  # which goes on after an error
        for restore in walk.restores:
            stack.callback(restore)
        yield


class _Walk:
    """Visits objects breadth first and keeps what restores each.

    Args:
        told: Called with each tensor that found no room and has changed.
    """

    def __init__(self, told: Callable[[Tensor], object]) -> None:
        self.room, self.told = float("inf"), told
        self.seen: dict[int, Any] = {}  # keeps the objects alive, so that no other gets their id
        self.restores: list[Restore] = []

    def visit(self, roots: Iterable[Any]) -> None:
        """Visit everything below the roots, then what their functions and classes use: of that, generators alone."""
        near, far = deque(roots), deque[Any]()
        self._used: deque[Any] = deque()
        for queues, stateful in (((near, far), True), ((self._used,), False)):
            while (queue := next(filter(None, queues), None)) is not None and len(self.seen) < _MOST_OBJECTS:
                value = queue.popleft()
                if isinstance(value, _CONSTANT) or id(value) in self.seen:
                    continue
                self.seen[id(value)] = value
                members = self._keep(value, stateful)
                later = far if stateful and len(members) > _MANY else queue
                later.extend(member for member in members if not isinstance(member, _CONSTANT))

    def _keep(self, value: Any, stateful: bool) -> list[Any]:
        """Remember one object, of one that is not `stateful` only a generator; what is to be visited next."""
        if type(value) in _CONTAINERS:
            if value or not stateful:
                return self._keep_members(value, stateful)
            self.restores.append(value.clear)  # most objects are the empty dicts of hooks that modules hold
            return []
        if (restore := generator_restorer(value)) is not None:
            self.restores.append(restore)
        elif isinstance(value, Tensor) or type(value).__name__ == "ndarray":
            if stateful:
                self._keep_numbers(value)
        elif isinstance(value, types.FunctionType):
            self._used.extend(used_by_function(value))
        elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            return [value.__self__, getattr(value, "__func__", None)]
        elif isinstance(value, partial):
            return [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, tuple):
            return list(value)
        elif isinstance(value, _CONTAINERS):
            return self._keep_members(value, stateful) + self._keep_attributes(value, stateful)
        elif isinstance(value, _WALKED) or not is_left_alone(type(value)):
            return self._keep_attributes(value, stateful)
        return []

    def _keep_members(self, container: Any, stateful: bool) -> list[Any]:
        if len(container) > _LARGEST_CONTAINER:
            return []
        # By the base class's methods: a subclass may refuse to be changed, or answer otherwise.
        base = next(kind for kind in _CONTAINERS if isinstance(container, kind))
        content = _content(base, container)
        if stateful:
            self.restores.append(partial(_refill, base, container, content))
        return content

    def _keep_attributes(self, owner: Any, stateful: bool) -> list[Any]:
        attributes: dict[str, Any] = getattr(owner, "__dict__", {})
        slots = [(name, getattr(owner, name)) for name in slots_of(type(owner)) if hasattr(owner, name)]
        values = [*attributes.values(), *(value for _, value in slots)]
        self._used.extend(used_by_class(type(owner)))
        if not isinstance(owner, DataLoader) and any(package_of(type(value)) in _LIVE for value in values):
            self._used.extend(values)
            return []
        if stateful and attributes:
            self.restores.append(partial(_refill, dict, attributes, _content(dict, attributes)))
        if stateful:
            self.restores.extend(partial(_set_again, owner, name, value) for name, value in slots)
        return values

    def _keep_numbers(self, numbers: Any) -> None:
        if is_lazy(numbers):
            return
        array = not isinstance(numbers, Tensor)
        size = numbers.nbytes if array else numbers.numel() * numbers.element_size()
        if size <= self.room:
            self.room -= size
            self.restores.append((_array_restorer if array else _tensor_restorer)(numbers))
        elif not array:
            version = _version(numbers)
            self.restores.append(lambda: _version(numbers) != version and self.told(numbers))


def _content(base: Any, container: Any) -> list[Any]:
    """Members; of a dict, keys and values in turns."""
    if issubclass(base, dict):
        return [x for item in base.items(container) for x in item]
    return list(base.__iter__(container))


def _refill(base: Any, container: Any, content: list[Any]) -> None:
    """Give a container its members again; compared by identity, as each is restored for itself."""
    now = _content(base, container)
    if len(now) == len(content) and all(map(is_, now, content)):
        return
    base.clear(container)
    if issubclass(base, dict):
        base.update(container, zip(content[::2], content[1::2], strict=True))
    else:
        (base.update if base is set else base.extend)(container, content)


def _set_again(owner: Any, name: str, value: Any) -> None:
    if getattr(owner, name, None) is not value:
        object.__setattr__(owner, name, value)


def _tensor_restorer(tensor: Tensor) -> Restore:
    content, grad, requires_grad = (
        tensor.detach().clone(),
        tensor.grad if tensor.is_leaf else None,
        tensor.requires_grad,
    )
    memory, version = tensor.data, _version(tensor)
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta

    def restore() -> None:
        if _version(tensor) != version or (plain and not _equal(memory, content)):
            # In place, as others may look into the same memory; what was made in inference mode is written to in it.
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                (memory if plain else tensor).copy_(content)
        if plain and not tensor.is_set_to(memory):
            tensor.data = memory  # it was cast, or has another shape now
        if tensor.is_leaf and tensor.grad is not grad:
            tensor.grad = grad
        if tensor.is_leaf and tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)

    return restore


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _version(tensor: Tensor) -> int:
    """How often the tensor has been written to; private, as torch has no other name for it."""
    return 0 if tensor.is_inference() else tensor._version


def _array_restorer(array: Any) -> Restore:
    content = array.copy()

    def restore() -> None:
        if array.tobytes() != content.tobytes():
            array[...] = content

    return restore
