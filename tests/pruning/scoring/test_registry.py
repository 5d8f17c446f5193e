"""The registry, and methods of the user."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_graphon.pruning import ScoringContext, methods, prune, register_method
from lightning_graphon.pruning.scoring.registry import _METHODS
from tests.helpers.networks import CASES, mlp, seeded


@pytest.fixture(autouse=True)
def _registry_comes_back() -> Iterator[None]:
    kept = dict(_METHODS)
    yield
    _METHODS.clear()
    _METHODS.update(kept)


def first_rows(context: ScoringContext) -> dict[str, Tensor]:
    """Early rows win."""
    return {
        name: -torch.arange(len(weight), dtype=torch.float32)[:, None].expand_as(weight)
        for name, weight in context.weights.items()
    }


def test_the_built_in_methods_are_there() -> None:
    assert {"random", "magnitude", "snip", "grasp", "synflow"} <= set(methods())


def test_a_registered_method_is_known_by_name() -> None:
    register_method("first-rows")(first_rows)
    assert "first-rows" in methods()
    net = mlp(depth=1, inputs=6, outputs=4)
    masks = prune(net, "first-rows", sparsity=0.5)
    assert masks["0.weight"].tolist() == [[True] * 6] * 2 + [[False] * 6] * 2
    assert prune(net, first_rows, sparsity=0.5) == masks


def test_registering_the_same_function_again_is_fine_another_one_is_not() -> None:
    register_method("first-rows")(first_rows)
    register_method("first-rows")(first_rows)  # a notebook cell that runs twice

    with pytest.raises(ValueError, match="a pruning method 'snip' exists already"):
        register_method("snip")(first_rows)


def test_options_and_the_usual_number_of_rounds() -> None:
    rounds = []

    @register_method("powers", steps=4)
    def powers(context: ScoringContext, *, power: float = 1.0) -> dict[str, Tensor]:
        rounds.append(power)
        return {name: weight.detach().abs() ** power for name, weight in context.weights.items()}

    prune(mlp(), "powers", sparsity=0.5)
    prune(mlp(), "powers", sparsity=0.5, steps=2, options={"power": 3.0})
    assert rounds == [1.0] * 4 + [3.0] * 2
    with pytest.raises(TypeError, match=r"method 'powers' has no option 'pwer'\. Did you mean 'power'"):
        prune(mlp(), "powers", sparsity=0.5, options={"pwer": 2})


def test_a_method_that_needs_the_loss_gets_batches_or_an_error() -> None:
    @register_method("curvy", needs="loss")
    def curvy(context: ScoringContext) -> dict[str, Tensor]:
        (loss,) = context.losses()
        grads = context.gradients(loss())
        return context.named([g.square() for g in grads])

    net = seeded(mlp)
    assert prune(net, "curvy", sparsity=0.5, batches=[CASES["mlp"].data()]).kept == 224
    with pytest.raises(ValueError, match=r"curvy scores weights by the loss.*batches="):
        prune(net, "curvy", sparsity=0.5)


def test_a_method_sees_the_masks_and_the_effective_weights_of_each_round() -> None:
    net, seen = seeded(mlp), []

    def spy(context: ScoringContext) -> dict[str, Tensor]:
        for name, weight in context.weights.items():
            assert not weight[~context.masks[name]].any()
        seen.append(sum(int(mask.count_nonzero()) for mask in context.masks.values()))
        return {name: weight.detach().abs() for name, weight in context.weights.items()}

    prune(net, spy, sparsity=0.75, steps=2)
    assert seen == [448, 224]


def test_partial_functions_and_callable_objects_are_methods() -> None:
    def scaled(context: ScoringContext, factor: float) -> dict[str, Tensor]:
        return {name: weight.detach() * factor for name, weight in context.weights.items()}

    class Signed:
        def __call__(self, context: ScoringContext) -> dict[str, Tensor]:
            return {name: weight.detach() for name, weight in context.weights.items()}

    net = seeded(mlp)
    positive = prune(net, Signed(), sparsity=0.5)
    assert prune(net, partial(scaled, factor=2.0), sparsity=0.5) == positive
    assert prune(net, partial(scaled, factor=-1.0), sparsity=0.5) != positive


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda w: w.detach()[:1], r"must score '0\.weight' with shape \(16, 8\), got a tensor of shape \(1, 8\)"),
        (lambda w: None, r"must score '0\.weight' with shape \(16, 8\), got nothing"),
        (lambda w: w.detach().numpy(), r"must score '0\.weight' with shape \(16, 8\), got ndarray"),
        (lambda w: w.detach() / 0, r"scores of layer '0\.weight' are not finite \(128 of 128\)"),
    ],
)
def test_wrong_scores_name_the_layer(scores: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(mlp(), lambda p: {name: scores(w) for name, w in p.weights.items()}, sparsity=0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_score_in_a_later_layer_is_found(bad: float) -> None:
    def scores(context: ScoringContext) -> dict[str, Tensor]:
        found = {name: weight.detach().clone() for name, weight in context.weights.items()}
        found["4.weight"][1, 2] = bad
        return found

    with pytest.raises(ValueError, match=r"scores of layer '4\.weight' are not finite \(1 of 64\)"):
        prune(mlp(), scores, sparsity=0.5)


@pytest.mark.parametrize("method", [None, 3, ["snip"]])
def test_a_method_is_a_name_or_a_function(method: object) -> None:
    with pytest.raises(TypeError, match="method must be a name or a function, got"):
        prune(mlp(), method, sparsity=0.5)


def test_an_unknown_name_lists_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match=r"'synflwo'\. Did you mean 'synflow'\? Allowed: .*'snip'"):
        prune(mlp(), "synflwo", sparsity=0.5)
