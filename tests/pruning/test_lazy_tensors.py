"""Tensors that are computed on access."""

import pytest
import torch

from lightning_graphon.pruning.lazy_tensors import LazyTensorMapping, shapes_of


def test_computed_at_each_access_and_not_before():
    calls = []

    def compute(name):
        calls.append(name)
        return torch.zeros(2)

    lazy = LazyTensorMapping({"a": torch.Size([2]), "b": torch.Size([2])}, compute)
    assert list(lazy) == ["a", "b"]
    assert len(lazy) == 2
    assert "a" in lazy
    assert "c" not in lazy
    assert shapes_of(lazy) == {"a": torch.Size([2]), "b": torch.Size([2])}
    assert calls == []
    lazy["a"], lazy["a"]
    assert calls == ["a", "a"]


def test_unknown_names_are_not_computed():
    with pytest.raises(KeyError, match="c"):
        LazyTensorMapping({}, lambda name: torch.zeros(1))["c"]


def test_shapes_of_plain_tensors():
    assert shapes_of({"a": torch.zeros(2, 3)}) == {"a": torch.Size([2, 3])}
