"""Trees of values: what is opened, and what is rebuilt."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field

import torch

from lightning_graphon._shared.objects.trees import flatten, tree_leaves, tree_map

Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: list
    length: int = field(init=False, default=3)


class Own(dict):
    extra = None


class Plain:
    def __init__(self, x):
        self.x, self._hidden = x, 1


class Opaque:
    def __init__(self, x):
        self._x = x


def test_trees_of_any_kind_are_opened_and_rebuilt():
    own = Own(a=torch.ones(1))
    own.extra = "kept"
    tree = [
        Frozen(torch.ones(2), [1, {"z": 2}]),
        Pair(3, 4),
        UserDict(b=5),
        own,
        Plain(torch.ones(3)),
        OrderedDict(c=6),
    ]
    other = tree_map(lambda x: x + 1, tree)
    assert [type(x) for x in other] == [type(x) for x in tree]
    assert torch.equal(other[0].x, torch.full((2,), 2.0))
    assert (other[0].y, other[0].length, other[1], other[2]["b"]) == ([2, {"z": 3}], 4, Pair(4, 5), 6)
    assert (other[3]["a"].item(), other[3].extra) == (2, "kept")
    assert (other[4].x.tolist(), other[4]._hidden, other[5]["c"]) == ([2, 2, 2], 1, 7)
    assert tree[0].y == [1, {"z": 2}], "the original is as it was"
    assert tree[3]["a"].item() == 1


def test_what_is_one_value():
    module, opaque = torch.nn.Linear(1, 1), Opaque(torch.ones(1))
    assert tree_leaves([module, opaque, "text", None, Opaque]) == [module, opaque, "text", None, Opaque]
    assert tree_leaves([[1, 2], [3]], lambda x: x == [3]) == [1, 2, [3]]
    assert flatten(opaque)[1]([5]) == 5
