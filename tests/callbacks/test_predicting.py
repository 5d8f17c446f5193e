"""What a monitor of the loss is asked for: its arguments, and the steps at which copies and training are compared."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_graphon.callbacks import KernelPrediction, LossDecayMonitor
from lightning_graphon.callbacks._analysis.copies_ahead import steps_to_look_at
from lightning_graphon.callbacks._analysis.wanted import Predicting
from lightning_graphon.dynamics import OptimizerView


def view(make, **kwargs):
    net = torch.nn.Linear(2, 2)
    return OptimizerView(make(net.parameters(), **kwargs), net)


@given(st.integers(0, 500), st.integers(1, 2000), st.integers(1, 300))
def test_steps_to_look_at(first, count, every):
    last = first + count
    steps = steps_to_look_at(first, last, every)
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (first, last)
    assert set(range(first, min(last, first + 7))) <= set(steps), "the first ones all"
    assert {step for step in range(first, last + 1) if step % every == 0} <= set(steps)
    later = [b - a for a, b in pairwise(steps)]
    assert all(gap <= max(1, (step - first) // 4) for gap, step in zip(later, steps, strict=False))
    assert len(steps) <= 45 + count / every


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predict": "oracle"}, r"unknown predict 'oracle'.*'kernel'.*'sibling'"),
        ({"predict": ["replay", "kernels"]}, r"unknown predict 'kernels'"),
        ({"horizon": 0}, "horizon must be 1 or more, got 0"),
        ({"batch_orders": 0}, "batch_orders must be 1 or more, got 0"),
        ({"taylor_order": 0}, "taylor_order must be 1 or more, got 0"),
        ({"pool_size": -1}, "pool_size must be 0 or more, got -1"),
    ],
    ids=str,
)
def test_arguments_that_are_not_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossDecayMonitor(**arguments)


@pytest.mark.parametrize("name", ["horizon", "batch_orders", "taylor_order"])
def test_a_count_is_no_text(name):
    with pytest.raises((TypeError, ValueError), match=name):
        LossDecayMonitor(**{name: "many"})


def test_who_predicts():
    kernel, sgd = KernelPrediction(), view(torch.optim.SGD, lr=0.1, momentum=0.9)
    assert Predicting().names(sgd, kernel, clips=False) == ("kernel", "rehearsal")
    others = view(torch.optim.Adam), view(torch.optim.Adagrad), view(torch.optim.SGD, lr=0.1, weight_decay=0.01)
    for optimizer in others:
        assert Predicting().names(optimizer, kernel, clips=False) == ("replay", "rehearsal")
    assert Predicting().names(sgd, kernel, clips=True) == ("replay", "rehearsal")
    assert Predicting().names(None, kernel, clips=False) == ("rehearsal",)
    assert Predicting(["sibling", "kernel"]).names(None, kernel, clips=True) == ("sibling", "kernel")
