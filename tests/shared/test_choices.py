"""One word has one meaning in all public functions."""

import inspect
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from torch import Tensor

from lightning_graphon import graphon, metrics, ntk, pruning
from lightning_graphon._shared import choices

ONE_TYPE = {
    "get": choices.Get,
    "parameter_term": choices.ParameterTerm,
    "parameterization": choices.Parameterization,
    "points": choices.Points,
    "positions": choices.Positions,
    "propagate": choices.Propagate,
    "schedule": choices.Schedule,
    "ties": choices.Ties,
}


def public():
    """Functions and methods that a user calls, with the types of their arguments."""
    for package in (graphon, metrics, ntk, pruning):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing):
                yield from ((f"{name}.{key}", f) for key, f in vars(thing).items() if inspect.isfunction(f))
            elif inspect.isfunction(thing):
                yield name, thing


def arguments(word):
    """The types of all arguments of that name, without None."""
    found = {}
    for name, function in public():
        if word in inspect.signature(function).parameters:
            hint = get_type_hints(function)[word]
            parts = set(get_args(hint)) if get_origin(hint) not in (Literal, None) else {hint}
            found[name] = parts - {type(None)}
    return found


@pytest.mark.parametrize("word", ONE_TYPE)
def test_words_with_one_set_of_choices(word):
    found = arguments(word)
    assert found
    assert {name for name, types in found.items() if types != {ONE_TYPE[word]}} == set()


def test_words_with_some_of_their_choices():
    """None of the functions has a choice that the word does not have elsewhere."""
    for word, all_choices in (("order", choices.LayerOrder), ("reduce", choices.Reduce)):
        found = arguments(word)
        assert found
        for name, types in found.items():
            assert set().union(*map(get_args, types)) <= set(get_args(all_choices)), name


def test_a_kernel_is_a_matrix_or_an_operator():
    found = arguments("kernel")
    assert found
    assert all(types <= {Tensor, ntk.KernelOperator} for types in found.values())
