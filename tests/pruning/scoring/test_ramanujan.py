"""Ramanujan masks: degrees, spectral gap, and draws that depend on nothing but the seed."""

import pytest
import torch
from torch import nn

from lightning_graphon.graphon import homogeneity_test
from lightning_graphon.pruning import prune
from lightning_graphon.pruning.scoring.ramanujan import deal, spectral_excess
from tests.helpers.networks import CASES, mlp, seeded


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (30, 100), (100, 30)])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.45])
def test_degrees_are_even_at_every_threshold(outputs: int, inputs: int, density: float) -> None:
    mask = deal(outputs, inputs, torch.Generator().manual_seed(0)) < density * outputs * inputs
    rows, columns = mask.sum(1), mask.sum(0)
    assert int(rows.max() - rows.min()) <= 1
    assert int(columns.max() - columns.min()) <= 1
    assert sorted(deal(5, 7, torch.Generator()).flatten().tolist()) == list(range(35))


@pytest.mark.parametrize("shape", [(128, 128), (60, 200)])
def test_the_second_singular_value_is_that_of_a_ramanujan_graph(shape: tuple[int, int]) -> None:
    """Common inputs of all pairs of outputs, counted one by one; the second eigenvalue of these counts."""
    mask = prune(nn.Linear(*shape[::-1]), "ramanujan", sparsity=0.9)["weight"].double()
    excess = spectral_excess(mask)
    gram = torch.tensor([[sum((a * b).tolist()) for b in mask] for a in mask]).double()
    second = float(torch.linalg.eigvalsh(gram)[-2].sqrt())
    degrees = float(mask.sum()) / torch.tensor(shape).double()
    assert excess == pytest.approx(second / float((degrees - 1).sqrt().sum()) - 1, abs=1e-9)
    assert excess < 0.02  # Friedman's theorem has an ε; measured: -0.06
    uneven = torch.zeros(shape)
    uneven[: shape[0] // 4, : shape[1] // 4] = 1  # two blocks: the second singular value is as large as the first
    uneven[shape[0] // 4 : shape[0] // 2, shape[1] // 4 : shape[1] // 2] = 1
    assert spectral_excess(uneven) > 0.5


def test_it_is_homogeneous_and_more_even_than_chance() -> None:
    mask = prune(nn.Linear(256, 256), "ramanujan", sparsity=0.9)["weight"]
    test = homogeneity_test(mask)
    assert test.verdict == "homogeneous"
    assert test.row_score < -5


def test_every_layer_has_the_density_asked_for_and_the_allocation_may_change_it() -> None:
    masks = prune(mlp(width=40), "ramanujan", sparsity=0.8)
    assert all(abs(row["sparsity"] - 0.8) < 5e-3 for row in masks.table())
    erk = prune(mlp(width=40), "ramanujan", sparsity=0.8, allocation="erk")
    assert erk["2.weight"].double().mean() < 0.15
    assert erk.kept == masks.kept


@pytest.mark.parametrize("name", ["grouped", "conv1d", "residual"])
def test_convolutions(name: str) -> None:
    masks = prune(CASES[name].model(), "ramanujan", sparsity=0.6)
    assert masks.kept == round(0.4 * masks.total)


def test_it_depends_on_the_seed_alone() -> None:
    masks = [prune(seeded(mlp, n), "ramanujan", sparsity=0.8) for n in (0, 1)]
    assert masks[0] == masks[1]
    assert masks[0] != prune(seeded(mlp), "ramanujan", sparsity=0.8, seed=1)


def test_draws_without_a_gap_are_drawn_again_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def excess(mask: torch.Tensor) -> float:
        drawn.append(mask)
        return 0.5 if len(drawn) < 3 else 0.0

    monkeypatch.setattr("lightning_graphon.pruning.scoring.ramanujan.spectral_excess", excess)
    masks = prune(nn.Linear(8, 8), "ramanujan", sparsity=0.5)
    assert len(drawn) == 3
    assert torch.equal(masks["weight"], drawn[-1])
    monkeypatch.setattr("lightning_graphon.pruning.scoring.ramanujan.spectral_excess", lambda mask: 0.5)
    with pytest.warns(UserWarning, match=r"second singular value of 'weight' is 50% above"):
        prune(nn.Linear(8, 8), "ramanujan", sparsity=0.5)
