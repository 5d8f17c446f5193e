import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_graphon.graphon import StepGraphon, block, constant, estimate_graphon, l2_distance, product


def bernoulli(rows, cols, density, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, cols, generator=g) < density


def permuted(mask, seed):
    g = torch.Generator().manual_seed(seed)
    return mask[torch.randperm(mask.shape[0], generator=g)][:, torch.randperm(mask.shape[1], generator=g)]


def sort_and_average(mask, bins_row, bins_col):
    """[P1] with loops: stable sort by degree, cut, average."""
    mask = mask.numpy().astype(np.float64)
    rows = sorted(range(len(mask)), key=lambda i: -mask[i].sum())
    cols = sorted(range(mask.shape[1]), key=lambda j: -mask[:, j].sum())
    cells = [
        [mask[np.ix_(r, c)].mean() for c in np.array_split(cols, bins_col)] for r in np.array_split(rows, bins_row)
    ]
    return torch.tensor(cells, dtype=torch.float64)


@pytest.mark.parametrize(("shape", "bins"), [((20, 20), 5), ((17, 30), 4), ((9, 64), 64), ((100, 7), 10)])
def test_index_ties_are_the_paper_to_the_letter(shape, bins):
    mask = bernoulli(*shape, 0.3)
    found = estimate_graphon(mask, bins, ties="index")
    expected = sort_and_average(mask, min(bins, shape[0]), min(bins, shape[1]))
    torch.testing.assert_close(found.values, expected)


def test_average_ties_is_the_mean_over_all_orders_of_tied_rows_and_columns():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.bool)
    total = torch.zeros(2, 3, dtype=torch.float64)
    orders = list(itertools.permutations(range(4)))
    for rows in orders:
        for cols in orders:
            total += sort_and_average(mask[list(rows)][:, list(cols)], 2, 3)
    torch.testing.assert_close(estimate_graphon(mask, (2, 3)).values, total / len(orders) ** 2)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    bins=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_the_order_of_rows_and_columns_does_not_matter_and_the_mean_is_the_density(rows, cols, density, bins, seed):
    mask = bernoulli(rows, cols, density, seed)
    first, second = estimate_graphon(mask, bins), estimate_graphon(permuted(mask, seed + 1), bins)
    assert first.values.isfinite().all()
    assert first.density == pytest.approx(mask.double().mean().item(), abs=1e-12)
    torch.testing.assert_close(first.values, second.values, rtol=0, atol=1e-12)
    torch.testing.assert_close(first.row_measure, second.row_measure, rtol=0, atol=0)


def test_weighted_graphs_tie_up_to_rounding():
    # sums of tenths depend on their order in the last digit: ties must not
    g = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 11, (60, 50), generator=g).double() / 10
    first, second = estimate_graphon(mask, 8), estimate_graphon(permuted(mask, 1), 8)
    torch.testing.assert_close(first.values, second.values, rtol=0, atol=1e-12)


DEGENERATE = {
    "all zero": torch.zeros(5, 7),
    "all one": torch.ones(5, 7),
    "one entry": torch.ones(1, 1),
    "one row": torch.tensor([[1, 0, 1]]),
    "one column": torch.tensor([[1], [0]]),
    "side two": torch.eye(2),
    "side three": torch.eye(3),
    "constant degree": torch.eye(12).roll(3, 0) + torch.eye(12),
    "empty rows": torch.cat([torch.zeros(4, 6), torch.ones(2, 6)]),
    "empty columns": torch.cat([torch.zeros(6, 5), torch.ones(6, 1)], 1),
}


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
@pytest.mark.parametrize("ties", ["average", "index"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_masks(name, ties, smoothing):
    mask = DEGENERATE[name].bool()
    graphon = estimate_graphon(mask, ties=ties, smoothing=smoothing)
    assert graphon.shape == tuple(mask.shape)
    for cells in (graphon.values, graphon.std_error):
        assert cells.isfinite().all()
        assert ((cells >= 0) & (cells <= 1)).all()
    assert graphon.density == pytest.approx(mask.double().mean().item(), abs=1e-9)


def test_unequal_bins_have_unequal_measures():
    graphon = estimate_graphon(bernoulli(10, 7, 0.5), bins=4)
    torch.testing.assert_close(graphon.row_measure, torch.tensor([0.3, 0.3, 0.2, 0.2]).double())
    torch.testing.assert_close(graphon.col_measure, torch.tensor([2, 2, 2, 1]).double() / 7)


def test_given_order_is_kept():
    mask = bernoulli(12, 8, 0.4)
    expected = mask.double().reshape(3, 4, 2, 4).mean((1, 3))
    torch.testing.assert_close(estimate_graphon(mask, (3, 2), order="none").values, expected)


def test_chunks_do_not_show():
    # 3000 x 1000 is read in three chunks of rows; blocks of pooled means are the oracle
    mask = bernoulli(3000, 1000, 0.2)
    expected = mask.double().reshape(10, 300, 10, 100).mean((1, 3))
    torch.testing.assert_close(estimate_graphon(mask, 10, order="none").values, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32])
def test_any_dtype_of_a_mask(dtype):
    mask = bernoulli(30, 20, 0.3)
    assert estimate_graphon(mask.to(dtype), 5) == estimate_graphon(mask, 5)


def test_convolutions_average_their_taps():
    mask = torch.rand(8, 6, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    channel = mask.double().mean((2, 3))
    assert estimate_graphon(mask, 4) == estimate_graphon(channel, 4)
    assert estimate_graphon(mask[..., 0], order="none").values.shape == (8, 6)


def test_groups_are_blocks_of_the_channel_graph():
    mask = torch.ones(6, 2, 3, dtype=torch.bool)
    found = estimate_graphon(mask, order="none", groups=3).values
    expected = torch.block_diag(*[torch.ones(2, 2)] * 3).double()
    assert torch.equal(found, expected)


# ---- consistency

GRAPHONS = {
    "constant": constant(0.3),
    "product": product(0.2),
    "block": block([[0.8, 0.4, 0.2], [0.5, 0.1, 0.05]], None, [0.3, 0.7], [0.2, 0.3, 0.5]),
    "smooth": StepGraphon(
        (1 - 0.8 * torch.linspace(0, 1, 512).double()[:, None])
        * (0.2 + 0.6 * torch.linspace(1, 0, 512).double()) ** 1.5
    ),
}


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
@pytest.mark.parametrize("name", GRAPHONS)
def test_error_falls_with_size(name, smoothing):
    truth = GRAPHONS[name].coarsen(32, 32)
    errors = []
    for side in (128, 512, 2048):
        mask = GRAPHONS[name].sample((side, side), seed=side)
        found = estimate_graphon(mask, 32, smoothing=smoothing)
        errors.append(l2_distance(found, truth, align=False))
    # halving is less than the expected side^(-1/2) (a factor of 2 per step) times a margin of 1.3
    assert errors[1] < errors[0] / 1.5
    assert errors[2] < errors[1] / 1.5
    assert errors[2] < 0.03


def test_smoothing_lowers_the_error_and_keeps_the_mean():
    truth, mask = GRAPHONS["smooth"].coarsen(32, 32), GRAPHONS["smooth"].sample((128, 128))
    rough, smooth = (estimate_graphon(mask, 32, smoothing=s) for s in (0.0, 1.0))
    # measured 0.067 against 0.023 over seeds
    assert l2_distance(smooth, truth) < l2_distance(rough, truth) / 2
    assert smooth.density == pytest.approx(mask.double().mean().item(), abs=1e-9)


def test_total_variation_is_the_minimiser():
    from lightning_graphon.graphon.estimation.total_variation import total_variation

    g = torch.Generator().manual_seed(0)
    noisy = 0.5 + 0.1 * torch.randn(6, 5, generator=g, dtype=torch.float64)
    r, c = torch.full((6,), 1 / 6).double(), torch.tensor([0.3, 0.2, 0.2, 0.2, 0.1]).double()
    mass = r[:, None] * c / (r[:, None] * c).mean()

    def objective(x):
        down, right = torch.zeros_like(x), torch.zeros_like(x)
        down[:-1], right[:, :-1] = x.diff(dim=0), x.diff(dim=1)
        return 0.5 * (mass * (x - noisy) ** 2).sum() + 0.05 * (down**2 + right**2).sqrt().sum()

    found = total_variation(noisy, r, c, 0.05, iterations=3000)
    for _ in range(200):  # convex: no small step may lower it
        step = torch.randn(6, 5, generator=g, dtype=torch.float64) * 1e-3
        assert objective(found) <= objective(found + step) + 1e-9
    constant_value = (mass * noisy).sum() / mass.sum()
    torch.testing.assert_close(  # an infinite weight leaves only the mean
        total_variation(noisy, r, c, 100.0, 3000), constant_value.expand(6, 5), rtol=0, atol=1e-3
    )


# ---- errors per cell


def test_standard_errors_cover_the_truth():
    p, hits, total = 0.3, 0, 0
    for seed in range(40):
        found = estimate_graphon(bernoulli(64, 64, p, seed), 8, order="none")
        hits += int(((found.values - p).abs() < 2 * found.std_error).sum())
        total += found.values.numel()
    # 2 standard errors hold 95.4 % of normal errors; 2560 cells give that to within 4 * 0.4 %
    assert hits / total == pytest.approx(0.954, abs=0.017)


def test_certain_cells_are_not_called_certain_and_small_ones_are_flagged():
    found = estimate_graphon(torch.zeros(64, 64, dtype=torch.bool), 8)
    assert (found.std_error > 0).all()
    assert found.sparse_cells.all()
    # cells of 8 x 8 = 64 entries: flagged at 5 % (3.2 expected edges), not at 20 % (12.8)
    assert estimate_graphon(bernoulli(64, 64, 0.05), 8, order="none").sparse_cells.all()
    assert not estimate_graphon(bernoulli(64, 64, 0.2), 8, order="none").sparse_cells.any()


# ---- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: estimate_graphon(m, order="degre"), "Did you mean 'degree'"),
        (lambda m: estimate_graphon(m, ties="first"), "unknown ties 'first'"),
        (lambda m: estimate_graphon(m, 0), "bins must be at least 1"),
        (lambda m: estimate_graphon(m, (1, 2, 3)), "bins must be at least 1"),
        (lambda m: estimate_graphon(m, smoothing=-1.0), "smoothing must be"),
        (lambda m: estimate_graphon(m[0]), "a mask must be"),
        (lambda m: estimate_graphon(m[:0]), "no empty axis"),
        (lambda m: estimate_graphon(m, groups=3), "groups must divide"),
        (lambda m: estimate_graphon(m.double() * 2), r"lie in \[0, 1\]"),
        (lambda m: estimate_graphon(m.double() * float("nan")), r"lie in \[0, 1\]"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 4, dtype=torch.bool))


def test_the_mask_and_the_random_state_are_left_alone():
    mask = bernoulli(20, 20, 0.3)
    copy, state = mask.clone(), torch.get_rng_state()
    estimate_graphon(mask, 4, smoothing=1.0)
    assert torch.equal(mask, copy)
    assert torch.equal(state, torch.get_rng_state())
