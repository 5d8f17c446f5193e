import itertools

import pytest
import torch

from lightning_graphon.graphon import (
    StepGraphon,
    constant,
    estimate_graphon,
    motif_densities,
    path_density,
    product,
)


def bernoulli(rows, cols, density, seed=0):
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density


def by_loops(mask, distinct):
    """All motifs, one vertex tuple at a time."""
    M, (m, n) = mask.int().tolist(), mask.shape
    choose = itertools.permutations if distinct else lambda r, k: itertools.product(r, repeat=k)
    rows2, cols2 = list(choose(range(m), 2)), list(choose(range(n), 2))

    def mean(terms):
        terms = list(terms)
        return sum(terms) / len(terms) if terms else 0.0

    return (
        mean(M[i][j] for i in range(m) for j in range(n)),
        mean(M[i][j] * M[i][k] for i in range(m) for j, k in cols2),
        mean(M[i][j] * M[k][j] for j in range(n) for i, k in rows2),
        mean(M[a][j] * M[a][k] * M[b][j] * M[b][k] for a, b in rows2 for j, k in cols2),
    )


@pytest.mark.parametrize("counting", ["distinct", "homomorphism"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2), (6, 5), (4, 9), (9, 4)])
def test_masks_agree_with_loops(shape, counting):
    for seed, density in ((0, 0.5), (1, 0.2), (2, 1.0), (3, 0.0)):
        mask = bernoulli(*shape, density, seed)
        found = motif_densities(mask, counting=counting)
        expected = by_loops(mask, counting == "distinct")
        assert (found.edge, found.row_cherry, found.col_cherry, found.c4) == pytest.approx(expected)


def test_homomorphisms_of_a_mask_are_the_integrals_of_its_own_step_graphon():
    mask = bernoulli(30, 20, 0.3)
    mine = motif_densities(mask, counting="homomorphism")
    limit = motif_densities(StepGraphon(mask))
    assert (mine.edge, mine.row_cherry, mine.col_cherry, mine.c4) == pytest.approx(
        (limit.edge, limit.row_cherry, limit.col_cherry, limit.c4)
    )


def test_blocks_of_rows_do_not_show():
    # 1300 rows are two blocks of the product; every motif from float64 products of the whole
    mask = bernoulli(1300, 1500, 0.1)
    found, M = motif_densities(mask, counting="homomorphism"), mask.double()
    assert found.c4 == pytest.approx(float(((M @ M.T) ** 2).sum()) / (1300 * 1500) ** 2, rel=1e-12)
    flat = motif_densities(mask.T, counting="homomorphism")
    assert (flat.row_cherry, flat.c4) == pytest.approx((found.col_cherry, found.c4), rel=1e-12)


def test_c4_of_a_graphon_by_quadrature_with_unequal_cells():
    graphon = StepGraphon([[0.8, 0.2], [0.4, 0.1]], [0.3, 0.7], [0.6, 0.4])
    w, r, c = graphon.values, graphon.row_measure, graphon.col_measure
    expected = torch.einsum("aj,ak,bj,bk,a,b,j,k->", w, w, w, w, r, r, c, c)
    assert motif_densities(graphon).c4 == pytest.approx(expected.item())


def test_c4_ratio_is_one_for_random_masks_of_any_size_and_more_for_others():
    ratios = [motif_densities(bernoulli(40, 60, 0.3, seed)).c4_ratio for seed in range(50)]
    # unbiased up to the fluctuation of the density: standard deviation 0.04 over the seeds, 50 of them
    assert sum(ratios) / 50 == pytest.approx(1.0, abs=0.025)
    assert motif_densities(product(0.2)).c4_ratio > 2
    assert motif_densities(constant(0.2)).c4_ratio == pytest.approx(1)
    assert motif_densities(constant(0.0)).c4_ratio == 1


def test_degree_cv():
    assert motif_densities(constant(0.3)).row_degree_cv == pytest.approx(0, abs=1e-7)
    # degrees 0.6 and 0.2 on halves: mean 0.4, deviation 0.2
    found = motif_densities(StepGraphon([[0.6], [0.2]]))
    assert found.row_degree_cv == pytest.approx(0.5)
    assert found.col_degree_cv == pytest.approx(0, abs=1e-7)


def test_convolution_masks_are_read_with_their_taps_as_columns():
    mask = bernoulli(6, 20, 0.4).reshape(6, 5, 2, 2)
    assert motif_densities(mask) == motif_densities(mask.flatten(1))


def test_weights_are_refused():
    with pytest.raises(ValueError, match="entries 0 or 1"):
        motif_densities(torch.rand(3, 3))
    with pytest.raises(ValueError, match="unknown counting"):
        motif_densities(torch.ones(3, 3), counting="both")


# ---- paths


def test_path_density_of_masks_counts_paths():
    masks = [bernoulli(4, 3, 0.5, 0), bernoulli(5, 4, 0.5, 1), bernoulli(2, 5, 0.5, 2)]
    total = sum(
        masks[0][j, i] and masks[1][k, j] and masks[2][o, k]
        for i in range(3)
        for j in range(4)
        for k in range(5)
        for o in range(2)
    )
    assert path_density(masks) == pytest.approx(int(total) / (3 * 4 * 5 * 2))


def test_path_density_of_graphons():
    layers = [StepGraphon([[0.2], [0.6]]), StepGraphon([[0.5, 0.1]], col_measure=[0.25, 0.75])]
    # u in [0, 1/4): 0.2 * 0.5, in [1/4, 1/2): 0.2 * 0.1, then 0.6 * 0.1
    assert path_density(layers) == pytest.approx(0.25 * 0.1 + 0.25 * 0.02 + 0.5 * 0.06)
    mask = bernoulli(50, 40, 0.3)
    full = [estimate_graphon(m, 64, order="none") for m in (mask, mask.T)]
    assert path_density(full) == pytest.approx(path_density([mask, mask.T]))


def test_path_density_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"outputs of layer 0 \(4\) are not the inputs of layer 1 \(5\)"):
        path_density([bernoulli(4, 3, 0.5), bernoulli(2, 5, 0.5)])
    with pytest.raises(ValueError, match="at least one layer"):
        path_density([])
    with pytest.raises(ValueError, match="not a mixture"):
        path_density([constant(0.1), bernoulli(2, 5, 0.5)])


def test_degrees_that_vary_less_than_chance_do_not_vary():
    """Of a permutation no two edges share a vertex: the unbiased variance of its degrees is negative."""
    found = motif_densities(torch.eye(3))
    assert found.row_cherry == found.col_cherry == 0
    assert found.row_degree_cv == found.col_degree_cv == 0.0
