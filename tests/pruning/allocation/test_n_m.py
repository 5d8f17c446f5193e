"""N:M sparsity: the best of every group of inputs, for every kind of layer."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as compress,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_to_dense_cutlass as decompress,
)

from lightning_graphon.pruning import Masks, prune
from lightning_graphon.pruning.allocation import n_m as pattern
from lightning_graphon.pruning.allocation.n_m import keep_in_groups
from lightning_graphon.pruning.config import PruningConfig
from lightning_graphon.pruning.scoring.registry import get_method
from tests.helpers.networks import CASES, mlp

METHODS = ["random", "magnitude", "snip", "grasp", "synflow"]


def best_of(values: list[float], keep: int) -> list[bool]:
    """The `keep` largest, by sorting a list in Python, whose sort is stable."""
    chosen = sorted(range(len(values)), key=lambda i: -values[i])[:keep]
    return [i in chosen for i in range(len(values))]


@given(
    keep=st.integers(1, 7),
    more=st.integers(1, 6),
    groups=st.integers(1, 3),
    taps=st.lists(st.integers(1, 2), max_size=2),
    few=st.booleans(),
    seed=st.integers(0, 5),
    chunk=st.sampled_from([1, 7, 1 << 20]),
)
@settings(max_examples=80, deadline=None)
def test_every_group_keeps_its_best_and_among_equals_the_first(
    keep: int, more: int, groups: int, taps: list[int], few: bool, seed: int, chunk: int
) -> None:
    generator, size = torch.Generator().manual_seed(seed), keep + more
    shape = (3, groups * size, *taps)
    score = torch.randint(0, 3, shape, generator=generator).float() if few else torch.rand(shape, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pattern, "_CHUNK", chunk)
        mask = keep_in_groups(score, keep, size)
    assert mask.shape == score.shape
    for row, kept in zip(score.flatten(2) if taps else score[..., None], mask.reshape(3, shape[1], -1), strict=True):
        for tap in range(row.shape[1]):
            for start in range(0, shape[1], size):
                group = slice(start, start + size)
                assert kept[group, tap].tolist() == best_of(row[group, tap].tolist(), keep)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_two_of_four(method: str) -> None:
    case = CASES["mlp"]
    model = case.model()
    masks = prune(model, method, allocation="2:4", batches=case.batches())
    assert masks.sparsity == 0.5
    for mask in masks.values():
        assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert masks == prune(model, method, sparsity=0.5, allocation="2:4", batches=case.batches())


def test_the_kept_are_the_large_of_each_group() -> None:
    net = nn.Linear(16, 8)
    mask = prune(net, "magnitude", allocation="1:4")["weight"]
    largest = net.weight.detach().abs().unflatten(1, (-1, 4)).argmax(-1)
    assert torch.equal(mask.unflatten(1, (-1, 4)).int().argmax(-1), largest)
    assert mask.sum() == 8 * 4


def test_what_is_kept_is_what_torch_compresses_for_sparse_tensor_cores() -> None:
    net = nn.Linear(64, 64, bias=False)
    prune(net, "magnitude", allocation="2:4").apply_(net)
    weight = net.weight.detach().half()
    assert torch.equal(decompress(*compress(weight)), weight)
    other = nn.Linear(64, 64, bias=False)
    prune(other, "magnitude", sparsity=0.5).apply_(other)
    weight = other.weight.detach().half()
    assert not torch.equal(decompress(*compress(weight)), weight), "the same sparsity without groups must fail here"


def taps_and_inputs(mask: Tensor, layer: nn.Module) -> Tensor:
    """[groups, units of one group, inputs of one group, taps] of a convolution's mask, by hand."""
    groups = layer.groups
    if layer.transposed:  # [in, out / groups, *taps]
        return mask.flatten(2).reshape(groups, layer.in_channels // groups, -1, mask[0, 0].numel()).transpose(1, 2)
    return mask.flatten(2).reshape(groups, layer.out_channels // groups, -1, mask[0, 0].numel())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(8, 6, 3),
        nn.Conv2d(8, 6, (3, 2), groups=2),
        nn.Conv3d(4, 2, 2),
        nn.ConvTranspose1d(8, 6, 3),
        nn.ConvTranspose2d(8, 6, 3, groups=2),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{layer.groups}",
)
def test_convolutions_are_grouped_by_input_channels_at_each_tap(layer: Any) -> None:
    mask = prune(layer, "random", allocation="2:4", seed=3)["weight"]
    assert mask.is_contiguous()
    by_inputs = taps_and_inputs(mask, layer)
    assert (by_inputs.unflatten(2, (-1, 4)).sum(3) == 2).all()


def test_layers_that_it_does_not_fit_stay_dense_and_are_named_once() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 8, 2, groups=4), nn.Conv2d(8, 5, 1)
    )
    with pytest.warns(UserWarning, match=r"not pruned.*no multiple of 4.*2:4") as said:
        masks = prune(net, "magnitude", allocation="2:4")
    assert [row["sparsity"] for row in masks.table()] == [0, 0, 0, 0.5]
    (warning,) = [str(w.message) for w in said]
    assert "0.weight (3 inputs), 1.weight (1 inputs), 2.weight (2 inputs)" in warning
    assert "3.weight" not in warning
    assert said[0].filename == __file__
    with pytest.raises(ValueError, match=r"no layer to prune.*0\.weight \(3 inputs\)"):
        prune(net[:2], "magnitude", allocation="2:4")


def test_a_tied_weight_counts_once() -> None:
    masks = prune(CASES["tied"].model(), "magnitude", allocation="1:3", include="Linear")
    assert [row["kept"] for row in masks.table()] == [11 * 2, 6 * 2]


@pytest.mark.parametrize("method", ["synflow", "snip", "magnitude"])
def test_groups_lose_one_weight_a_round_and_none_comes_back(method: str) -> None:
    case, rounds = CASES["mlp"], []
    model = case.model()

    def note(context: Any) -> Any:
        rounds.append({name: mask.clone() for name, mask in context.masks.items()})
        return get_method(method).score(context)

    final = prune(model, note, allocation="1:4", steps=3, schedule="linear", batches=case.batches())
    rounds.append(dict(final))
    for left, (before, after) in zip((3, 2, 1), pairwise(rounds), strict=True):
        for name, mask in after.items():
            assert (mask.unflatten(1, (-1, 4)).sum(-1) == left).all()
            assert not (mask & ~before[name]).any()
    if method == "magnitude":
        assert final == prune(model, method, allocation="1:4")


def test_a_method_that_scores_pruned_weights_highest_brings_none_back() -> None:
    net = nn.Linear(8, 8)

    def perverse(context: Any) -> dict[str, Tensor]:
        masks = context.masks
        return {n: torch.where(masks[n], w.detach().abs(), 9.0) for n, w in context.weights.items()}

    assert prune(net, perverse, allocation="1:4", steps=3) == prune(net, "magnitude", allocation="1:4")


@pytest.mark.parametrize(("allocation", "rounds"), [("2:4", 2), ("1:2", 1), ("1:16", 15), ("global", 100)])
def test_synflow_takes_no_more_rounds_than_a_group_has_weights_to_lose(allocation: str, rounds: int) -> None:
    assert (
        PruningConfig("synflow", {"2:4": 0.5, "1:2": 0.5, "1:16": 15 / 16}.get(allocation, 0.9), allocation).rounds
        == rounds
    )
    assert PruningConfig("synflow", 0.5, "2:4", steps=7).rounds == 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"allocation": "2:4", "sparsity": 0.9}, ValueError, r"'2:4' means sparsity 0\.5, but sparsity=0\.9.*leave"),
        ({"allocation": "2:4", "sparsity": "half"}, TypeError, "must be a number"),
        ({"allocation": "4:4"}, ValueError, r"0 < N < M.*'4:4'"),
        ({"allocation": "0:4"}, ValueError, r"0 < N < M.*'0:4'"),
        ({"allocation": "2:4:6", "sparsity": 0.5}, ValueError, r"unknown allocation '2:4:6'.*'2:4'"),
        ({"allocation": "2:4", "min_density": 0.6}, ValueError, r"min_density=0\.6 needs 77 weights.*only 64"),
        ({"allocation": 124, "sparsity": 0.5}, TypeError, r"'2:4'.*got 124"),
        ({}, TypeError, "method and a sparsity are needed"),
    ],
)
def test_what_contradicts_itself_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prune(mlp(), "magnitude", **arguments)


def test_a_plan_holds_no_other_sparsity() -> None:
    with pytest.raises(ValueError, match="leave sparsity out"):
        PruningConfig("magnitude", 0.9, "2:4")
    assert str(PruningConfig("snip", 0.5, "2:4")) == "snip, sparsity 0.5 (2:4)"
    assert str(PruningConfig("snip", 0.5, {"a": 0.1})) == "snip, sparsity 0.5 except where given by layer"


def test_third_parts_may_be_given_as_a_float() -> None:
    assert isinstance(prune(nn.Linear(9, 2), "magnitude", sparsity=2 / 3, allocation="1:3"), Masks)
