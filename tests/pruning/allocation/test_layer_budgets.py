"""How many weights each layer keeps: exact totals, capped layers, floors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_graphon.pruning import prune
from lightning_graphon.pruning.allocation.layer_budgets import (
    er_density,
    erk_density,
    floor_counts,
    layer_budgets,
    select_globally,
)
from tests.helpers.networks import CASES, mlp

SHAPES = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(1, 3), st.integers(1, 3)),
)


@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=6),
    sparsity=st.floats(0, 1, exclude_max=True),
    profile=st.sampled_from(["uniform", "er", "erk"]),
)
@settings(max_examples=300)
def test_totals_are_exact_and_no_layer_overflows(shapes: list, sparsity: float, profile: str) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    keep = round((1 - sparsity) * sum(map(math.prod, shapes)))
    budget = layer_budgets(named, keep, profile, {})
    assert sum(budget.values()) == keep
    assert all(0 <= budget[name] <= math.prod(named[name]) for name in named)


@pytest.mark.parametrize("profile", ["er", "erk"])
def test_free_layers_share_one_factor_and_capped_layers_are_dense(profile: str) -> None:
    shapes = {"small": (4, 5), "conv": (64, 32, 3, 3), "wide": (500, 400), "last": (10, 500)}
    keep = round(0.1 * sum(map(math.prod, shapes.values())))
    budget = layer_budgets(shapes, keep, profile, {})
    density = {"er": er_density, "erk": erk_density}[profile]
    assert budget["small"] == 20
    free = [name for name in shapes if budget[name] < math.prod(shapes[name])]
    assert len(free) >= 2
    wanted = {name: math.prod(shapes[name]) * density(shapes[name]) for name in free}
    factors = {name: budget[name] / wanted[name] for name in free}
    first = free[0]
    for name in free:
        # each of the two counts compared is rounded by less than one weight
        assert abs(factors[name] - factors[first]) < 1 / wanted[name] + 1 / wanted[first]


def test_densities_by_hand() -> None:
    assert er_density((10, 20)) == 30 / 200
    assert er_density((16, 8, 3, 3)) == 24 / 128
    assert erk_density((16, 8, 3, 3)) == 30 / 1152
    assert erk_density((10, 20)) == er_density((10, 20))


@pytest.mark.parametrize("allocation", ["uniform", "er", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_a_single_layer_gets_everything(allocation: str, sparsity: float) -> None:
    net = nn.Linear(50, 20)
    assert prune(net, "random", sparsity=sparsity, allocation=allocation).kept == round((1 - sparsity) * 1000)


@pytest.mark.parametrize("allocation", ["global", "uniform", "er", "erk"])
@pytest.mark.parametrize("name", ["grouped", "conv1d", "conv3d", "residual"])
def test_convolutions_of_any_kind_keep_the_exact_total(name: str, allocation: str) -> None:
    model = CASES[name].model()
    masks = prune(model, "random", sparsity=0.7, allocation=allocation)
    assert masks.kept == round(0.3 * masks.total)


def test_uniform_gives_every_layer_the_same_sparsity() -> None:
    masks = prune(mlp(width=20, inputs=10, outputs=10), "magnitude", sparsity=0.9, allocation="uniform")
    assert [row["kept"] for row in masks.table()] == [20, 40, 20]


def test_a_dict_sets_layers_and_the_rest_gets_the_sparsity() -> None:
    net = mlp(width=20, inputs=10, outputs=10)
    masks = prune(net, "random", sparsity=0.9, allocation={"0": 0.5, "re:^4": 0.25})
    assert [row["kept"] for row in masks.table()] == [100, 40, 150]


def test_a_dict_takes_types_and_globs() -> None:
    net = nn.Sequential(nn.Conv1d(4, 5, 5), nn.Linear(10, 10))
    masks = prune(net, "random", sparsity=0.5, allocation={nn.Conv1d: 0.9, "1.*": 0.2})
    assert [row["kept"] for row in masks.table()] == [10, 80]


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ({"0.wieght": 0.5}, r"allocation pattern '0\.wieght' matches no prunable weight\. Did you mean '0\.weight'"),
        ({"0": 0.5, "0.weight": 0.5}, "both match '0.weight'"),
        ({"0": 1.0}, r"allocation\['0'\].*\[0, 1\), got 1\.0"),
    ],
)
def test_wrong_dicts_are_explained(allocation: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(mlp(), "random", sparsity=0.5, allocation=allocation)


def test_floors_hold_and_the_total_stays_exact() -> None:
    net = mlp(width=40, inputs=64)
    with torch.no_grad():
        net[2].weight.mul_(1e-4)
    masks = prune(net, "magnitude", sparsity=0.95, min_density=0.02)
    assert masks.kept == round(0.05 * masks.total)
    assert all(row["kept"] >= math.ceil(0.02 * row["total"]) for row in masks.table())
    assert masks.table()[1]["kept"] == math.ceil(0.02 * 1600)


def test_a_floor_keeps_the_best_of_the_layer_and_the_others_are_a_global_choice() -> None:
    scores = {"strong": torch.tensor([5.0, 6.0, 7.0, 8.0]), "weak": torch.tensor([0.1, 0.3, 0.2, 0.0])}
    masks = select_globally(scores, 4, {"strong": 1, "weak": 2})
    assert masks["weak"].tolist() == [False, True, True, False]
    assert masks["strong"].tolist() == [False, False, True, True]


def test_floors_that_cannot_hold_are_refused() -> None:
    assert floor_counts({"a": (10, 10)}, 0.05, 10) == {"a": 5}
    with pytest.raises(ValueError, match=r"min_density=0\.2 needs 20 weights but the sparsity leaves only 10"):
        floor_counts({"a": (10, 10)}, 0.2, 10)


def test_a_floor_holds_in_every_round() -> None:
    net = mlp(width=40, inputs=64)
    masks = prune(net, "synflow", sparsity=0.98, min_density=0.015, steps=20)
    assert masks.kept == round(0.02 * masks.total)
    assert all(row["kept"] >= math.ceil(0.015 * row["total"]) for row in masks.table())
