"""Graphons of the published methods' masks: homogeneous or not, and the limits that their scores predict."""

import math

import pytest
import torch
from torch import nn

from lightning_graphon.graphon import FactorisedSaliency, estimate_graphon, homogeneity_test, l2_distance
from lightning_graphon.pruning import prune
from tests.helpers.modules import digits
from tests.helpers.pruning_oracles import scores_of

HIDDEN = "2.weight"


def network(width: int = 256, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = digits(256)
    return [(x[:128], y[:128]), (x[128:], y[128:])]


@pytest.mark.parametrize(
    ("method", "verdict"),
    [
        ("px", "heterogeneous"),
        ("synflow-l2", "heterogeneous"),
        ("ntk-sap", "heterogeneous"),
        ("force", "heterogeneous"),
        ("prospr", "heterogeneous"),
        ("ramanujan", "homogeneous"),
    ],
)
def test_the_hidden_layer(method: str, verdict: str) -> None:
    steps = 1 if method in ("prospr", "ramanujan") else 5
    mask = prune(network(), method, sparsity=0.9, batches=batches(), steps=steps)[HIDDEN]
    test = homogeneity_test(mask)
    assert test.verdict == verdict
    assert test.p_value < 1e-20 or verdict == "homogeneous"  # measured: at most 1e-100


@pytest.mark.parametrize("method", ["px", "synflow-l2"])
def test_limits_from_the_exact_factors(method: str) -> None:
    """Factors by the singular vectors of score / θ², noise θ²: masks are as far from the limit as chance says."""
    distances = []
    for width in (128, 512):
        model = network(width)
        scores = scores_of(method, model, batches=batches())[HIDDEN]
        masks = prune(model, method, sparsity=0.9, batches=batches(), steps=1)
        squares = model[2].weight.detach().double().square()
        left, scale, right = torch.linalg.svd(scores / squares)
        limit = FactorisedSaliency(left[:, 0].abs() * scale[0], right[0].abs(), squares)
        density = float(masks[HIDDEN].double().mean())
        found = l2_distance(limit.graphon(density=density, bins=32), estimate_graphon(masks[HIDDEN], 32))
        # What chance gives a constant graphon: the scatter of degrees on both sides, and of cells.
        chance = math.sqrt(density * (1 - density) * (2 / width + (32 / width) ** 2))
        assert found < 1.5 * chance
        distances.append(found)
    # Both terms fall with the width: by 1 / 4 where cells dominate, by 1 / 2 where degrees do.
    assert distances[1] < 0.5 * distances[0]


def test_rounds_of_ntk_sap_are_a_map_from_graphon_to_graphon() -> None:
    """Other weights, inputs and noise in all rounds: the graphons tend to each other as the width grows."""
    apart = []
    for width in (64, 256):
        model = network(width)
        pair = [
            estimate_graphon(prune(model, "ntk-sap", sparsity=0.8, batches=batches(), steps=4, seed=seed)[HIDDEN], 16)
            for seed in (0, 1)
        ]
        apart.append(l2_distance(*pair))
    assert apart[1] < 0.7 * apart[0]  # 1 / √width would halve it; two draws of each
