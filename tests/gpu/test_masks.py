"""Masks found on a GPU are those found on the CPU."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_graphon.graphon import cut_distance, homogeneity_test, layer_graphons
from lightning_graphon.pruning import methods, prune, read_masks
from lightning_graphon.pruning.allocation.top_k import keep_largest
from tests.helpers.networks import CASES, mlp, seeded

OPTIONS = {
    "synflow": {"steps": 10},
    "graphon": {"options": {"graphons": {"family": "power-law", "exponent": 0.5}}},
}
BUDGETS = {
    "uniform": {"allocation": "uniform"},
    "er": {"allocation": "er"},
    "erk": {"allocation": "erk"},
    "by hand": {"allocation": {"0.weight": 0.5}},
    "floor": {"min_density": 0.05},
    "rounds": {"steps": 7, "schedule": "linear"},
    "2:4": {"allocation": "2:4", "sparsity": None},
    "1:8": {"allocation": "1:8", "sparsity": None},
}


def built_in():
    return [name for name in methods() if name in {"random", "magnitude", "snip", "grasp", "synflow", "graphon"}]


def on(device, batches):
    return [(inputs.to(device), targets.to(device)) for inputs, targets in batches]


def both(model, device, method, batches, **options):
    """Masks on the CPU and on the device, of the same network on the same data."""
    twin = copy.deepcopy(model).to(device)
    expected = prune(model, method, batches=batches, **options)
    found = prune(twin, method, batches=on(device, batches), **options)
    assert {mask.device for mask in found.values()} == {device}
    return expected, found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", built_in())
@pytest.mark.filterwarnings("ignore:not pruned", "ignore:layer collapse")
def test_every_method_on_every_kind_of_layer(method, case, device):
    """In float64: two sums of float32 numbers in another order would rank near ties in another way."""
    model = CASES[case].model().double().eval()  # dropout draws other numbers on another device
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in CASES[case].batches()]
    options = {"loss_fn": CASES[case].loss, "include": "*weight*" if case in ("lstm", "gru") else None}
    expected, found = both(model, device, method, batches, sparsity=0.8, **options, **OPTIONS.get(method, {}))
    assert found == expected


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", ["magnitude", "snip"])
@pytest.mark.filterwarnings("ignore:layer collapse")
def test_every_budget(method, budget, device):
    batches = [(torch.randn(32, 16, dtype=torch.float64), torch.arange(32) % 8)]
    model = seeded(lambda: mlp(width=32, inputs=16, outputs=8)).double()
    expected, found = both(model, device, method, batches, **{"sparsity": 0.8, **BUDGETS[budget]})
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_ties_are_broken_by_position(method, dtype, device):
    model = nn.Sequential(nn.Linear(300, 200, bias=False), nn.Linear(200, 100, bias=False)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    expected, found = both(model, device, method, [], sparsity=0.7)
    assert found == expected
    assert found.kept == round(0.3 * found.total)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60_000), min_size=1, max_size=3),
    levels=st.integers(1, 50_000),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_selection(sizes, levels, share, dtype, seed, device):
    """From all distinct to all equal, below and above the number that is sorted to find a bracket."""
    source = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.randint(levels, (n,), generator=source).to(dtype) for i, n in enumerate(sizes)}
    keep = round(share * sum(sizes))
    expected = keep_largest(scores, keep)
    found = keep_largest({name: score.to(device) for name, score in scores.items()}, keep)
    assert all(torch.equal(found[name].cpu(), mask) for name, mask in expected.items())


def test_near_ties_apart_float32_scores_give_the_same_masks(device):
    """A few in ten thousand may differ, where single precision cannot tell two scores apart."""
    batches = [(torch.randn(64, 64), torch.arange(64) % 10)]
    for method in ("snip", "grasp"):
        expected, found = both(mlp(256, 4, inputs=64, outputs=10), device, method, batches, sparsity=0.9)
        wrong = sum(int((expected[name] != found[name].cpu()).sum()) for name in expected)
        assert wrong <= 4e-4 * expected.total
        assert found.kept == expected.kept


def test_graphons_of_masks(device):
    model = mlp(96, 3, inputs=64, outputs=10)
    masks = prune(model, "synflow", sparsity=0.8, steps=5)
    for order in ("degree", "joint", "spectral"):
        here, there = (layer_graphons(masks.to(place), bins=16, order=order) for place in ("cpu", device))
        for name, graphon in here.items():
            assert torch.equal(there[name].values.cpu(), graphon.values)
            assert cut_distance(graphon, there[name].to("cpu")).upper <= 1e-12
    for name, mask in masks.items():
        here, there = homogeneity_test(mask), homogeneity_test(mask.to(device))
        assert (here.verdict, here.p_value) == (there.verdict, pytest.approx(there.p_value, rel=1e-9))
        del name


def test_masks_read_from_the_weights_and_saved(device, tmp_path):
    model = mlp().to(device)
    masks = prune(model, "random", sparsity=0.5).apply_(model)
    masks.save(tmp_path / "masks.pt")
    assert type(masks).load(tmp_path / "masks.pt") == masks
    assert read_masks(model) == masks
