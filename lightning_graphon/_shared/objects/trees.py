"""Batches and outputs of any kind as trees of values.

Open are tuples, lists, dicts and what torch's pytrees know, subclasses of dict, dataclasses, UserDict (of which are
transformers' batches), and objects with tensors as public attributes. Anything else is one value.
"""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree  # private; its public twin, optree, would be one more package


def flatten(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """Values of a tree in order, and what builds a tree like it of other values.

    Args:
        tree: Anything.
        is_leaf: Says which parts are one value, besides those that cannot be opened.

    >>> leaves, rebuild = flatten({"a": 1, "b": [2, 3]})
    >>> leaves, rebuild([4, 5, 6])
    ([1, 2, 3], {'a': 4, 'b': [5, 6]})
    """
    nodes, spec = pytree.tree_flatten(tree, is_leaf)
    opened = [None if is_leaf is not None and is_leaf(node) else _fields(node) for node in nodes]
    if not any(fields is not None for fields in opened):
        return nodes, lambda values: pytree.tree_unflatten(list(values), spec)
    parts = [([node], None) if f is None else flatten(f, is_leaf) for node, f in zip(nodes, opened, strict=True)]

    def rebuild(values: Iterable[Any]) -> Any:
        rest = iter(values)
        own = [[next(rest) for _ in leaves] for leaves, _ in parts]
        built = [
            given[0] if build is None else _with_fields(node, build(given))
            for node, given, (_, build) in zip(nodes, own, parts, strict=True)
        ]
        return pytree.tree_unflatten(built, spec)

    return [leaf for leaves, _ in parts for leaf in leaves], rebuild


def tree_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """Values of a tree in order; as `flatten`."""
    return flatten(tree, is_leaf)[0]


def tree_map(fn: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """A tree with `fn` of each value; as `flatten`."""
    leaves, rebuild = flatten(tree, is_leaf)
    return rebuild(map(fn, leaves))


def _fields(node: Any) -> dict[Any, Any] | None:
    """The values of an object that pytrees do not open, by name; None where it is one value."""
    if isinstance(node, (Tensor, nn.Module, type)):
        return None
    if isinstance(node, (dict, UserDict)):
        return dict(node.items())
    if dataclasses.is_dataclass(node):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if hasattr(node, f.name)}
    public = {name: value for name, value in getattr(node, "__dict__", {}).items() if not name.startswith("_")}
    return public if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(public)) else None


def _with_fields(node: Any, fields: dict[Any, Any]) -> Any:
    new = copy.copy(node)
    if isinstance(node, UserDict):
        new.data = fields
    elif isinstance(node, dict):
        dict.update(new, fields)
    else:
        for name, value in fields.items():
            object.__setattr__(new, name, value)
    return new
