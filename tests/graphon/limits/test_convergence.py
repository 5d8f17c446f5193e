"""Each condition of the theorem on convergence, on scores that fulfil it and on scores that do not."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_graphon.graphon import Condition, convergence_conditions
from tests.helpers.modules import digits
from tests.helpers.pruning_oracles import scores_of

PROFILE, FACTORS, NOISE, THRESHOLD, ABSOLUTE = (
    "bounded row profile", "convergent factors", "independent noise", "stable threshold", "absolute scores",
)  # fmt: skip


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=source(seed), dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source(seed), dtype=torch.float64)


def product(n: int, seed: int = 0, m: int | None = None) -> Tensor:
    """a_i b_j |normal| with factors in [1, 3]: all conditions hold."""
    m = m or n
    return (1 + 2 * uniform(seed, m, 1)) * (1 + 2 * uniform(seed + 1, n)) * normal(seed + 2, m, n).abs()


def failing(runs: list[Tensor], density: float = 0.1) -> list[str]:
    return [c.name for c in convergence_conditions(runs, density) if c.holds is False]


@pytest.mark.parametrize("seed", range(4))
def test_all_hold_for_the_model_itself(seed: int) -> None:
    conditions = convergence_conditions([product(200, 10 * seed), product(400, 10 * seed + 5, m=300)], 0.1)
    assert all(c.holds for c in conditions), conditions
    assert [c.name for c in conditions] == [PROFILE, FACTORS, NOISE, THRESHOLD, ABSOLUTE]


def test_a_single_run_says_nothing_of_convergence() -> None:
    found = {c.name: c for c in convergence_conditions([product(300)], 0.1)}
    assert found[FACTORS].holds is None
    assert math.isnan(found[FACTORS].value)
    assert all(c.holds for name, c in found.items() if name != FACTORS)


def test_heavy_tails_have_no_bounded_profile() -> None:
    scores = [product(n) / uniform(9, n, 1) for n in (256, 512)]  # a Pareto tail of power 1
    found = {c.name: c for c in convergence_conditions(scores, 0.1)}
    assert found[PROFILE].holds is False
    assert found[PROFILE].value > 0.5  # the largest of n grows like n^1


@pytest.mark.parametrize("power", [0.3, 1.0, 3.0])
def test_factors_that_spread_with_the_size_do_not_converge(power: float) -> None:
    runs = [(uniform(n, n, 1) * (n / 128) ** power).exp() * normal(n + 1, n, n).abs() for n in (128, 512)]
    assert (FACTORS in failing(runs)) == (power > 0.5)  # at 0.3 one and a half times as wide: sees no more than chance


def test_dead_inputs_that_become_more_do_not_converge() -> None:
    runs = [product(128), product(512)]
    runs[1][:, :200] = 0
    assert failing(runs) == [FACTORS]


def test_a_second_factor_of_random_sign_is_no_independent_noise() -> None:
    """Which has the same law in all cells, so that a comparison of laws does not see it."""
    signs = torch.outer(normal(5, 400).sign(), normal(6, 400).sign())
    scores = product(400) * (1 + 0.3 * signs)
    found = {c.name: c for c in convergence_conditions([scores], 0.1)}
    assert found[NOISE].holds is False
    assert found[NOISE].measure.startswith("largest singular value")


def test_noise_of_another_law_in_one_block_is_not_independent() -> None:
    scores = normal(6, 200, 200).abs()
    scores[:100] *= 3.0
    assert failing([scores]) == []
    scores[:100, :100] = scores[:100, :100].square() * 3
    assert NOISE in failing([scores])


def test_an_atom_at_the_threshold_matters_and_one_elsewhere_does_not() -> None:
    scores = product(300)
    scores[uniform(7, 300, 300) < 0.3] = 0.0  # of the noise: weights that are zero
    assert failing([scores], 0.1) == []
    assert failing([scores], 0.8) == [THRESHOLD]
    rounded = (normal(8, 300, 300).abs() * 4).round()
    assert THRESHOLD in failing([rounded], 0.1)


def test_signed_scores_are_told() -> None:
    assert ABSOLUTE in failing([normal(3, 200, 200)])


def test_methods_on_digits() -> None:
    """SynFlow-L2 and magnitude fulfil what one run can tell; SNIP on many samples has no factorised scores."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    found = {}
    for method in ("magnitude", "synflow-l2", "snip", "grasp"):
        scores = scores_of(method, net, batches=[digits(256)])
        found[method] = failing([scores["2.weight"]])
    assert found["magnitude"] == found["synflow-l2"] == []
    assert found["snip"] == [NOISE]
    assert set(found["grasp"]) >= {NOISE, ABSOLUTE}


def test_arguments() -> None:
    with pytest.raises(ValueError, match="runs is empty"):
        convergence_conditions([], 0.1)
    with pytest.raises(ValueError, match="density"):
        convergence_conditions([product(20)], 1.0)
    tiny = convergence_conditions([torch.ones(3, 3)], 0.5)
    assert all(isinstance(c, Condition) for c in tiny)
