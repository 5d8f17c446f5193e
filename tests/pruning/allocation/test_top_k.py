"""Exact selection: counts, ties, memory."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_graphon.pruning.allocation.top_k import keep_largest
from lightning_graphon.pruning.lazy_tensors import LazyTensorMapping
from tests.helpers.pruning_oracles import keep_largest_by_sorting

# Few distinct values make heavy ties; both zeros and -inf (pruned in an earlier round) are among them.
VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 0.5, 3.0e-39, 1e30, float("-inf"), float("inf")])


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Tensor], int]:
    values = draw(st.one_of(st.just(VALUES), st.just(st.floats(-10, 10, width=32)), st.just(st.just(0.0))))
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    scores = {f"layer{i}": torch.tensor(draw(st.lists(values, min_size=n, max_size=n))) for i, n in enumerate(lengths)}
    return scores, draw(st.integers(0, sum(lengths)))


@given(problems())
@settings(max_examples=300)
def test_equals_sorting_with_ties_by_position(context: tuple[dict[str, Tensor], int]) -> None:
    scores, keep = context
    masks, expected = keep_largest(scores, keep), keep_largest_by_sorting(scores, keep)
    assert list(masks) == list(scores)
    assert all(torch.equal(masks[name], expected[name]) for name in scores)


BIG = 200_003  # beyond the sample of 2^15, so that the bracket search runs; odd, so that no stride divides it


def _rounded(scores: Tensor) -> Tensor:
    return (scores * 20).round() / 20


BIG_SCORES = {
    "normal": lambda g: torch.randn(BIG, generator=g),
    "sorted": lambda g: torch.linspace(0, 1, BIG),
    "heavy ties": lambda g: _rounded(torch.rand(BIG, generator=g)),
    "70 % zeros": lambda g: torch.rand(BIG, generator=g).sub(0.7).clamp(min=0),
    "both zeros": lambda g: torch.where(torch.rand(BIG, generator=g) < 0.5, 0.0, -0.0),
    "all equal": lambda g: torch.full((BIG,), 2.5),
    "mostly pruned": lambda g: torch.where(torch.rand(BIG, generator=g) < 0.97, -torch.inf, 1.0),
    "rare peak": lambda g: torch.zeros(BIG).index_fill(0, torch.tensor([7, 100_001]), 1.0),
    "wide range": lambda g: torch.randn(BIG, generator=g).mul(40).exp(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", BIG_SCORES)
def test_many_scores_equal_a_stable_sort(kind: str, dtype: torch.dtype) -> None:
    scores = BIG_SCORES[kind](torch.Generator().manual_seed(5)).to(dtype)
    parts = {"a": scores[:70_000].reshape(700, 100), "b": scores[70_000:]}
    order = scores.sort(descending=True, stable=True).indices
    for keep in (1, 2, 1000, BIG // 2, BIG - 1):
        expected = torch.zeros(BIG, dtype=torch.bool)
        expected[order[:keep]] = True
        masks = keep_largest(parts, keep)
        assert torch.equal(torch.cat([masks["a"].reshape(-1), masks["b"]]), expected), keep


@pytest.mark.parametrize("keep", [-1, 4])
def test_a_number_out_of_range_is_named(keep: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {keep} of 3"):
        keep_largest({"a": torch.ones(3)}, keep)


def test_scores_are_not_changed() -> None:
    scores = {"a": torch.tensor([[1.0, -2.0], [3.0, 3.0]])}
    before = scores["a"].clone()
    keep_largest(scores, 2)
    assert torch.equal(scores["a"], before)


MEMORY = """
import sys, torch
from lightning_graphon.pruning.allocation.top_k import keep_largest
torch.set_num_threads(1)
kind = sys.argv[1]
n = 20_000_000
scores = torch.rand(n, generator=torch.Generator().manual_seed(0))
if kind == "relu":
    scores.sub_(0.7).clamp_(min=0)
keep_largest({"warm": torch.rand(1000)}, 10)
before = peak()
masks = keep_largest({"a": scores[: n // 2], "b": scores[n // 2 :]}, n // 10)
kept = sum(int(mask.count_nonzero()) for mask in masks.values())
print((peak() - before) / (4 * n), kept)
"""


@pytest.mark.parametrize("kind", ["uniform", "relu"])
def test_selection_needs_less_than_the_scores(measured: Callable[..., list[float]], kind: str) -> None:
    needed, kept = measured(MEMORY, kind)
    assert kept == 2_000_000
    assert 0.25 < needed < 1  # measured: 0.43; the masks alone are a quarter


def test_ties_of_one_dtype_are_no_ties_of_another():
    """0.3 in float32 is above 0.3 in float64."""
    scores = {"a": torch.full((1000,), 0.3), "b": torch.full((1000,), 0.3, dtype=torch.float64)}
    masks = keep_largest(scores, 1500)
    assert bool(masks["a"].all())
    assert masks["b"].tolist() == [True] * 500 + [False] * 500


def test_every_score_is_looked_at_twice():
    scores = {
        name: torch.rand(50_000, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("abc")
    }
    looks = []
    keep_largest(
        LazyTensorMapping({n: s.shape for n, s in scores.items()}, lambda name: looks.append(name) or scores[name]),
        15_000,
    )
    assert sorted(looks) == ["a", "a", "b", "b", "c", "c"]
