"""`prune` as a whole: exact counts, nested rounds, determinism, every kind of layer, bad input."""

import math
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_graphon.pruning import LayerCollapseWarning, Masks, prune
from lightning_graphon.pruning.enforcer import Enforcer
from lightning_graphon.pruning.scoring.registry import ScoringContext, get_method
from tests.helpers.networks import CASES, mlp, seeded

METHODS = ["random", "magnitude", "snip", "grasp", "synflow"]
pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning_graphon.pruning.LayerCollapseWarning", "ignore:not pruned. fused weights"
)


@pytest.mark.parametrize("allocation", ["global", "uniform", "er", "erk"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 1 / 3, 0.9, 0.95])
def test_the_kept_number_is_exact(method: str, allocation: str, sparsity: float) -> None:
    case = CASES["residual"]
    masks = prune(
        case.model(), method, sparsity=sparsity, batches=case.batches(), allocation=allocation, steps=3, seed=2
    )
    assert masks.kept == round((1 - sparsity) * masks.total)
    assert masks.sparsity == pytest.approx(sparsity, abs=0.5 / masks.total + 1e-12)  # the count is rounded once


@given(
    values=st.sampled_from(["zeros", "equal", "signed zeros", "few", "distinct"]),
    sparsity=st.floats(0, 1, exclude_max=True),
    steps=st.integers(1, 5),
    schedule=st.sampled_from(["exponential", "linear"]),
    allocation=st.sampled_from(["global", "uniform", "er", "erk"]),
    seed=st.integers(0, 10),
)
@settings(max_examples=120)
def test_counts_are_exact_whatever_the_ties(
    values: str, sparsity: float, steps: int, schedule: str, allocation: str, seed: int
) -> None:
    draw = {
        "zeros": lambda w, g: torch.zeros_like(w),
        "equal": lambda w, g: torch.full_like(w, -0.25),
        "signed zeros": lambda w, g: torch.where(torch.rand(w.shape, generator=g) < 0.5, 0.0, -0.0),
        "few": lambda w, g: torch.randint(-2, 3, w.shape, generator=g).float(),
        "distinct": lambda w, g: torch.randn(w.shape, generator=g),
    }[values]
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 1))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(draw(layer.weight, generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapseWarning)
        masks = prune(net, "magnitude", sparsity=sparsity, steps=steps, schedule=schedule, allocation=allocation)
    assert masks.kept == round((1 - sparsity) * 53)


def test_ties_go_to_the_earlier_weight() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    for layer in net:
        nn.init.constant_(layer.weight, 0.5)
    masks = prune(net, "magnitude", sparsity=0.3)
    assert masks["0.weight"].all()
    assert masks["1.weight"].tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("method", METHODS)
def test_pruned_stays_pruned_through_the_rounds(method: str, schedule: str) -> None:
    """The masks a method is shown in each round are nested, and their sizes follow the schedule."""
    case, rounds, sparsity, steps = CASES["batchnorm"], [], 0.9, 12

    def spy(context: Any) -> dict[str, Tensor]:
        rounds.append({name: mask.clone() for name, mask in context.masks.items()})
        return get_method(method).score(context)

    final = prune(case.model(), spy, sparsity=sparsity, batches=case.batches(), steps=steps, schedule=schedule, seed=1)
    assert final == prune(
        case.model(), method, sparsity=sparsity, batches=case.batches(), steps=steps, schedule=schedule, seed=1
    )
    assert len(rounds) == steps
    rounds.append(dict(final))
    for before, after in pairwise(rounds):
        assert all(not (after[name] & ~before[name]).any() for name in final)
    for step, masks in enumerate(rounds):
        fraction = step / steps
        density = 0.1**fraction if schedule == "exponential" else 1 - 0.9 * fraction
        # a round may truncate where the last one rounds
        assert abs(Masks(masks).kept - density * final.total) <= 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 100])
def test_one_and_a_hundred_rounds(method: str, steps: int) -> None:
    case = CASES["mlp"]
    masks = prune(case.model(), method, sparsity=0.8, batches=case.batches(), steps=steps)
    assert masks.kept == round(0.2 * masks.total)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_masks_whatever_the_global_generators(method: str) -> None:
    case, found = CASES["batchnorm"], []
    model = case.model().train()
    for scramble in (1, 2):
        torch.manual_seed(scramble)
        np.random.seed(scramble)
        found.append(prune(model, method, sparsity=0.8, batches=case.batches(), steps=2, seed=3))
    assert found[0] == found[1]
    other = prune(model, method, sparsity=0.8, batches=case.batches(), steps=2, seed=4)
    # Dropout makes the data methods depend on the seed; the deterministic ones do not.
    assert (other != found[0]) == (method in ("random", "snip", "grasp"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_network_is_pruned_and_trains(name: str, method: str) -> None:
    """All prunable weights, fused ones by name; five steps after pruning, masks holding and BatchNorm untouched."""
    case = CASES[name]
    model = case.model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    identity = {key: (id(p), p.data_ptr()) for key, p in model.named_parameters()}
    include = {"lstm": "*weight*", "gru": "*weight*", "bilinear": "*"}.get(name)
    include = ["encoder.*_weight", "encoder.*linear?.weight", "*out_proj*"] if name == "transformer" else include
    masks = prune(model, method, sparsity=0.6, batches=case.batches(), include=include, steps=2)
    assert masks.kept == round(0.4 * masks.total)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    inputs, targets = case.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    with Enforcer(model, masks, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            loss = case.loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            assert torch.isfinite(loss)
            assert all(not p.detach()[~mask].any() for p, mask in masks.pairs(model))
        assert any((p.detach() != before[key])[masks[key]].any() for key, p in model.named_parameters() if key in masks)
        evaluated = model.eval()(inputs)  # attention's fast path reads the weights without calling its layers
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), evaluated.detach())
    assert {key: (id(p), p.data_ptr()) for key, p in model.named_parameters()} == identity


def test_frozen_weights_have_no_mask_and_no_score() -> None:
    case = CASES["frozen"]
    model = case.model()
    masks = prune(model, "snip", sparsity=0.5, batches=case.batches())
    assert list(masks) == ["2.weight", "4.weight"]
    assert not model[0].weight.requires_grad


def test_batchnorm_in_train_mode_keeps_its_running_statistics() -> None:
    case = CASES["batchnorm"]
    model = case.model().train()
    model(case.data()[0])
    before = {n: b.clone() for n, b in model.named_buffers()}
    for method in METHODS:
        prune(model, method, sparsity=0.5, batches=case.batches(), steps=2)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert int(model[1].num_batches_tracked) == 1


def test_layer_collapse_is_loud_and_names_the_layers() -> None:
    """Magnitude at PyTorch's default initialisation: the narrow fan-in of the first layer wins everything."""
    net = seeded(lambda: mlp(width=300, inputs=20, outputs=10))
    with pytest.warns(LayerCollapseWarning, match=r"magnitude at sparsity 0\.98 .*2 of 3 layers.*2\.weight, 4\.weight"):
        masks = prune(net, "magnitude", sparsity=0.98)
    assert [row["kept"] > 0 for row in masks.table()] == [True, False, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error", LayerCollapseWarning)
        rescued = prune(net, "magnitude", sparsity=0.98, min_density=0.005)
    assert rescued.kept == masks.kept
    assert all(row["kept"] >= math.ceil(0.005 * row["total"]) for row in rescued.table())


def test_weights_without_a_path_are_told_though_no_layer_is_empty() -> None:
    def fading(context: ScoringContext) -> dict[str, Tensor]:
        first = all(mask.all() for mask in context.masks.values())
        return {name: torch.full(weight.shape, float(first)) for name, weight in context.weights.items()}

    with pytest.warns(LayerCollapseWarning, match=r"left weights that pass no signal.*zero from round 2 of 3 on"):
        masks = prune(mlp(), fading, sparsity=0.3, steps=3, allocation="uniform")
    assert masks.kept == round(0.7 * masks.total)


def test_sparsity_zero_keeps_everything() -> None:
    masks = prune(mlp(), "snip", sparsity=0.0, batches=CASES["mlp"].batches())
    assert all(mask.all() for mask in masks.values())


def test_compiled_models_are_scored_like_plain_ones() -> None:
    net = seeded(mlp)
    batches = CASES["mlp"].batches()
    compiled = torch.compile(net, backend="aot_eager")
    masks, expected = (prune(m, "grasp", sparsity=0.5, batches=batches) for m in (compiled, net))
    assert [name.removeprefix("_orig_mod.") for name in masks] == list(expected)
    assert all(torch.equal(a, b) for a, b in zip(masks.values(), expected.values(), strict=True))


def test_scoring_works_under_no_grad() -> None:
    net, batches = seeded(mlp), CASES["mlp"].batches()
    with torch.no_grad():
        masks = prune(net, "snip", sparsity=0.5, batches=batches)
        assert not torch.is_grad_enabled()
    assert masks == prune(net, "snip", sparsity=0.5, batches=batches)


def test_a_generator_of_batches_is_read_once_and_serves_all_rounds() -> None:
    net, batches = seeded(mlp), CASES["mlp"].batches()
    once = prune(net, "snip", sparsity=0.8, batches=(b for b in batches), steps=3)
    assert once == prune(net, "snip", sparsity=0.8, batches=batches, steps=3)


BAD = [
    ({"sparsity": 1.0}, ValueError, r"sparsity .*\[0, 1\), got 1\.0"),
    ({"sparsity": -0.1}, ValueError, r"sparsity .*\[0, 1\), got -0\.1"),
    ({"sparsity": float("nan")}, ValueError, r"sparsity .*got nan"),
    ({"sparsity": "0.9"}, TypeError, r"sparsity must be a number in \[0, 1\), got '0\.9' of type str"),
    ({"sparsity": True}, TypeError, "sparsity must be a number"),
    ({"allocation": "erkk"}, ValueError, r"unknown allocation 'erkk'\. Did you mean 'erk'\? Allowed: 'global'"),
    ({"allocation": None}, TypeError, r"allocation must be one of .*'global'.* or a dict .*got None"),
    ({"schedule": "exponetial"}, ValueError, r"unknown schedule 'exponetial'\. Did you mean 'exponential'"),
    ({"steps": 0}, ValueError, r"steps .*at least 1, got 0"),
    ({"steps": 2.5}, ValueError, r"steps .*got 2\.5"),
    ({"steps": True}, ValueError, r"steps .*got True"),
    ({"min_density": 1.5}, ValueError, r"min_density must lie in \[0, 1\], got 1\.5"),
    ({"min_density": "a"}, TypeError, r"min_density must be a number in \[0, 1\], got 'a'"),
    ({"min_density": 0.9}, ValueError, r"min_density=0\.9 needs .* leaves only"),
    ({"seed": "a"}, TypeError, "seed must be an int, got 'a'"),
    ({"seed": 1.0}, TypeError, r"seed must be an int, got 1\.0"),
    ({"options": {"absolut": True}}, TypeError, r"'grasp' has no option 'absolut'\. Did you mean 'absolute'"),
    ({"batches": []}, ValueError, r"grasp scores weights by the loss on data.*batches="),
    ({"batches": None}, ValueError, r"grasp scores weights by the loss on data.*batches="),
    ({"include": "4.wieght"}, ValueError, r"include pattern '4\.wieght' .*Did you mean '4\.weight'"),
    ({"allocation": {"5": 0.5}}, ValueError, r"allocation pattern '5' matches no prunable weight"),
    ({"allocation": {"0": 1.5}}, ValueError, r"allocation\['0'\] .*got 1\.5"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input_names_the_value_and_what_is_allowed(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        prune(mlp(), "grasp", **{"sparsity": 0.5, "batches": CASES["mlp"].batches(), **arguments})


def test_scores_that_overflow_name_the_layer() -> None:
    net = seeded(mlp)
    net[2].weight.data[3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"magnitude scores of layer '2\.weight' are not finite \(1 of 256\)"):
        prune(net, "magnitude", sparsity=0.5)


def test_masks_are_bool_tensors_of_the_weights_shapes() -> None:
    model = CASES["grouped"].model()
    masks = prune(model, "random", sparsity=0.5)
    assert {n: (m.shape, m.dtype) for n, m in masks.items()} == {
        n: (model.get_parameter(n).shape, torch.bool) for n in masks
    }
