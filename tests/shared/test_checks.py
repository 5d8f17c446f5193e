"""Messages that help: what was given, what is allowed, what was meant."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_graphon._shared.checks import ArgumentError, check_choice, check_sparsity, checked, nearest


def test_the_nearest_word_whatever_its_case():
    assert nearest("SNIPP", ["magnitude", "snip"]).startswith("Did you mean 'snip'? Allowed: 'magnitude', 'snip'.")
    assert nearest("qqq", ["magnitude", "snip"]) == "Allowed: 'magnitude', 'snip'."


def test_words_that_are_suggested_but_not_listed():
    assert nearest("Conv2", ["0.weight"], ["Conv2d"]) == "Did you mean 'Conv2d'? Allowed: '0.weight'."


def test_long_lists_are_cut():
    message = nearest("layer7", [f"layer{i}" for i in range(25)])
    assert message.startswith("Did you mean 'layer7'?")
    assert message.endswith("'layer19' and 5 more.")


@pytest.mark.parametrize("value", ["grid ", "rid", None, 3])
def test_a_choice_that_is_none(value):
    with pytest.raises(ValueError, match=r"unknown points .*Allowed: 'grid', 'random'\."):
        check_choice("points", value, ("grid", "random"))


@pytest.mark.parametrize("value", [0, 0.5, 0.999])
def test_sparsities(value):
    assert check_sparsity(value) == value


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1, ValueError, r"must lie in \[0, 1\), got 1$"),
        (90, ValueError, "for 90 % write 0.9"),
        (-0.1, ValueError, "got -0.1"),
        (float("nan"), ValueError, "got nan"),
        (True, TypeError, "of type bool"),
        ("0.9", TypeError, "of type str"),
    ],
)
def test_no_sparsities(value, error, message):
    with pytest.raises(error, match=message):
        check_sparsity(value)


@checked
def function(
    x: Tensor, count: int = 1, scale: float = 1.0, masks: Mapping[str, Tensor] | None = None,
    sides: Sequence[int] | int = (), kind: Literal["a", "b"] = "a",
):  # fmt: skip
    if count < 0:
        raise RuntimeError("connection closed by peer")
    return x @ x, count, scale, masks, sides


def test_numpys_arrays_and_numbers_become_torchs_and_pythons():
    x, count, scale, masks, sides = function(
        np.ones(3), np.int32(2), np.float32(0.5), {"a": np.array([True])}, np.array([1, 2])
    )
    assert x.dtype == torch.float64
    assert (type(count), type(scale), type(sides)) == (int, float, list)
    assert masks["a"].dtype == torch.bool


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": None}, TypeError, "^x must be a tensor, got NoneType$"),
        ({"x": np.array(["a"])}, TypeError, "^x must be a tensor"),
        ({"x": torch.tensor(1.0)}, ValueError, r"^x must have at least one axis, and has shape \(\)$"),
        ({"x": torch.ones(2, device="meta")}, ValueError, "^x must have values, and is on the meta device$"),
        ({"count": 1.5}, TypeError, "^count must be an int, got float$"),
        ({"scale": "a"}, TypeError, "^scale must be a number, got str$"),
        ({"masks": 3}, TypeError, "^masks must be Mapping or None, got int$"),
        ({"masks": {"a": 3}}, TypeError, r"^masks\['a'\] must be a tensor, got int$"),
        ({"sides": [1, "b"]}, TypeError, r"^sides\[1\] must be an int, got str$"),
        ({"sides": "12"}, TypeError, "^sides must be Sequence or int, got str$"),
        ({"kind": 3}, TypeError, "^kind must be str, got int$"),
        ({"x": torch.ones(2, 3)}, ArgumentError, r"^x \(\[2, 3\] float32\) cannot be used together: mat1"),
        ({"x": torch.ones(0, 3)}, ArgumentError, "^x is empty: mat1"),
        ({"x": torch.full((2, 3), torch.nan)}, ArgumentError, "^x is not finite: mat1"),
        ({"count": -1}, RuntimeError, "^connection closed by peer$"),
    ],
)
def test_arguments_of_another_kind_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        function(**{"x": torch.ones(2), **arguments})
