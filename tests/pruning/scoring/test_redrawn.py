"""Scores of weights drawn anew: the mask does not depend on the weights that train."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_graphon._shared.module_state import preserve_random_state
from lightning_graphon._shared.random import seed_for
from lightning_graphon.pruning import methods, prune
from tests.helpers.networks import CASES, mlp, seeded

GRAPHONS = {"graphons": {"family": "product"}}


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("name", ["mlp", "batchnorm"])
def test_the_weights_do_not_matter_and_stay(method: str, name: str) -> None:
    case, masks = CASES[name], []
    arguments = {"sparsity": 0.5, "batches": case.batches(), "options": GRAPHONS if method == "graphon" else None}
    for seed in (0, 1):
        model = case.model(seed)
        before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        masks.append(prune(model, method, rescore="redrawn", steps=2, **arguments))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert torch.equal(state, torch.get_rng_state())
    assert masks[0] == masks[1]
    if method not in ("random", "graphon", "ramanujan", "ntk-sap"):  # which do not look at weights
        assert masks[0] != prune(case.model(0), method, steps=2, **arguments)
        assert masks[0] != prune(case.model(0), method, rescore="redrawn", seed=1, steps=2, **arguments)


@pytest.mark.parametrize("method", ["snip", "magnitude", "synflow"])
def test_it_is_the_mask_of_a_network_initialised_by_hand(method: str) -> None:
    """Every layer's reset_parameters under the seed, last layer first; then all rounds on that one network."""
    case, by_hand = CASES["mlp"], seeded(mlp)
    with preserve_random_state(seed_for(3, "weights to rescore")):
        for layer in reversed([m for m in by_hand if isinstance(m, nn.Linear)]):
            layer.reset_parameters()
    arguments = {"sparsity": 0.8, "batches": case.batches(), "steps": 3, "seed": 3}
    masks = prune(seeded(mlp, 7), method, rescore="redrawn", **arguments)
    different = sum(int((masks[n] != m).count_nonzero()) for n, m in prune(by_hand, method, **arguments).items())
    assert different <= masks.total / 1000


class Bare(nn.Linear):
    reset_parameters = None


class Around(nn.Module):
    """Initialises its layer as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Bare.__new__(Bare)
        nn.Module.__init__(self.layer)
        self.layer.in_features, self.layer.out_features = 8, 4
        self.layer.weight, self.layer.bias = nn.Parameter(torch.ones(4, 8)), None

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Initialising(Around):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.layer.weight)


def test_a_layer_without_initialisation_is_an_error_unless_a_module_around_it_has_one() -> None:
    with pytest.raises(ValueError, match=r"'layer\.weight' cannot be drawn anew: Bare has no reset_parameters"):
        prune(Around(), "magnitude", sparsity=0.5, rescore="redrawn")
    assert prune(Initialising(), "magnitude", sparsity=0.5, rescore="redrawn").kept == 16


def test_frozen_modules_stay_as_they_are() -> None:
    model = seeded(mlp)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="cannot be drawn anew"):
        prune(nn.Sequential(Around()), "magnitude", sparsity=0.5, rescore="redrawn")
    seen: list[Tensor] = []

    def spy(context):
        seen.append(context.model[0].weight.detach().clone())
        return {name: weight.detach().abs() for name, weight in context.weights.items()}

    prune(model, spy, sparsity=0.5, rescore="redrawn")
    assert torch.equal(seen[0], model[0].weight)


def test_unknown() -> None:
    with pytest.raises(ValueError, match=r"rescore.*redrawn"):
        prune(mlp(), "snip", sparsity=0.5, rescore="again")
