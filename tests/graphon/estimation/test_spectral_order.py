import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_graphon.graphon import block, constant, estimate_graphon, layer_graphons, product
from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph
from lightning_graphon.graphon.estimation.singular_vectors import exact_singular_vectors, leading_singular_vectors
from lightning_graphon.graphon.estimation.spectral_order import _lloyd, _Noise, spectral_parts


def draw(probabilities, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(probabilities.shape, generator=g) < probabilities


def communities(sizes, inside, outside, seed=0):
    """Mask with equal expected degrees, and the true part of each row and column in a random order."""
    g = torch.Generator().manual_seed(seed)
    part = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows, cols = (part[torch.randperm(len(part), generator=g)] for _ in range(2))
    return draw(torch.where(rows[:, None] == cols, inside, outside), seed), rows, cols


def same_partition(a, b):
    """Whether two labellings differ by the names of the parts only."""
    pairs = torch.stack([a, b]).unique(dim=1)
    return len(a.unique()) == len(b.unique()) == pairs.shape[1]


def edge_error(mask, probabilities, order):
    """Root mean square error of the probability of each entry, read at the bins of its ends."""
    graph = ChannelGraph(mask)
    rows, cols = spectral_parts(graph, (32, 32))
    if order == "degree":
        rows, cols = (d.argsort(descending=True).argsort() * 32 // len(d) for d in graph.degrees())
    found = estimate_graphon(mask, 32, order=order).values[rows][:, cols]
    return float((found - probabilities).square().mean().sqrt())


@pytest.mark.parametrize(
    ("sizes", "inside", "outside"),
    [([256, 256], 0.6, 0.2), ([200, 200, 200], 0.3, 0.05), ([300, 300], 0.12, 0.03), ([80] * 8, 0.5, 0.05)],
)
def test_communities_of_equal_degree_are_found_exactly(sizes, inside, outside):
    mask, rows, cols = communities(sizes, inside, outside)
    found = spectral_parts(ChannelGraph(mask), (32, 32))
    assert same_partition(found[0], rows)
    assert same_partition(found[1], cols)
    graphon = estimate_graphon(mask, 32, order="spectral")
    assert graphon.shape == (len(sizes), len(sizes))
    # Every cell is a mean of at least 80 x 80 draws: a standard error of 0.006 at most.
    expected = torch.tensor([outside, inside], dtype=torch.float64)
    assert float((graphon.values[..., None] - expected).abs().amin(-1).max()) < 0.03
    assert len(estimate_graphon(mask, 32).values.unique()) > len(sizes) ** 2, "the degree sort sees none of it"


@pytest.mark.parametrize(("rows", "cols"), [(60, 40), (200, 784), (30, 300)])
def test_chance_is_not_cut(rows, cols):
    """At three standard deviations one split in a thousand; 60 chances, so that one is allowed."""
    splits = 0
    for seed in range(10):
        for density in (0.5, 0.1, 0.02):
            row, col = spectral_parts(ChannelGraph(draw(torch.full((rows, cols), density), seed)), (32, 32))
            splits += int(row.max() > 0) + int(col.max() > 0)
    assert splits <= 1


@pytest.mark.parametrize("side", [256, 768])
@pytest.mark.parametrize("graphon", [constant(0.1), block([[0.5, 0.1], [0.2, 0.05]]), product(0.1)], ids=repr)
def test_hardly_worse_than_the_degree_sort_where_degrees_tell_everything(graphon, side):
    g = torch.Generator().manual_seed(side)
    u, v = (torch.rand(side, generator=g, dtype=torch.float64) for _ in range(2))
    probabilities = graphon(u[:, None], v[None])
    mask = draw(probabilities)
    ratio = edge_error(mask, probabilities, "spectral") / edge_error(mask, probabilities, "degree")
    # Fewer bins than 32 are coarser where the graphon is smooth: 1.16 at most here.
    assert ratio < 1.25


def test_error_falls_with_size_where_degrees_say_nothing():
    errors = []
    for side in (128, 384, 1024):
        g = torch.Generator().manual_seed(side)
        u, v = (torch.rand(side, generator=g, dtype=torch.float64) for _ in range(2))
        ring = 0.05 + 0.4 * torch.exp(-10 * (1 - torch.cos(2 * torch.pi * (u[:, None] - v))))
        mask = draw(ring)
        errors.append(edge_error(mask, ring, "spectral"))
        assert edge_error(mask, ring, "degree") > 0.1
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]
    assert errors[2] < 0.04


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    bins=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_any_mask_has_an_estimate_with_its_density(rows, cols, density, bins, seed):
    mask = draw(torch.full((rows, cols), density), seed)
    mask[: rows // 2] = mask[0].clone()  # equal rows
    graphon = estimate_graphon(mask, bins, order="spectral")
    assert graphon.shape[0] <= bins
    assert graphon.shape[1] <= bins
    assert ((graphon.values >= 0) & (graphon.values <= 1)).all()
    assert graphon.density == pytest.approx(float(mask.double().mean()), abs=1e-12)
    labels, _ = spectral_parts(ChannelGraph(mask), (bins, bins))
    assert len(labels[: rows // 2].unique()) <= 1, "equal rows are in one part"


def test_the_order_of_rows_and_columns_does_not_matter():
    for seed in range(4):
        mask, *_ = communities([70, 50, 30], 0.5, 0.1, seed)
        mask |= draw(torch.linspace(0, 0.3, 150).expand(150, 150), seed + 1)
        g = torch.Generator().manual_seed(seed)
        other = mask[torch.randperm(150, generator=g)][:, torch.randperm(150, generator=g)]
        a, b = (estimate_graphon(m, 16, order="spectral") for m in (mask, other))
        torch.testing.assert_close(a.values, b.values)
        torch.testing.assert_close(a.row_measure, b.row_measure)
        turned = estimate_graphon(mask.T, 16, order="spectral")
        torch.testing.assert_close(turned.values, a.values.T)


def test_the_better_connected_come_first():
    mask = draw(torch.tensor([0.05, 0.4, 0.2]).repeat_interleave(100)[:, None].expand(300, 200))
    graphon = estimate_graphon(mask, 8, order="spectral")
    assert graphon.shape == (3, 1)
    torch.testing.assert_close(graphon.values[:, 0].float(), torch.tensor([0.4, 0.2, 0.05]), atol=0.01, rtol=0)


def test_groups_of_a_convolution_are_its_parts():
    mask = draw(torch.full((64, 16, 3, 3), 0.6))
    graphon = estimate_graphon(mask, 16, order="spectral", groups=4)
    assert graphon.shape == (4, 4)
    assert (graphon.values > 0).sum() == 4
    depthwise = estimate_graphon(torch.ones(64, 1, 3, 3).bool(), 16, order="spectral", groups=64)
    assert depthwise.shape == (1, 1), "64 channels with one neighbour each: nothing to tell apart"


def test_entries_that_do_not_scatter():
    assert estimate_graphon(torch.full((20, 30), 0.3), order="spectral").shape == (1, 1)
    rows = torch.tensor([0.2, 0.7]).repeat_interleave(20)[:, None].expand(40, 30)
    found = estimate_graphon(rows, order="spectral")
    torch.testing.assert_close(found.values, torch.tensor([[0.7], [0.2]]).double(), atol=1e-6, rtol=0)


def test_taps_of_a_convolution_are_draws_of_their_own():
    """Means over nine taps scatter three times less than single weights, so weaker communities can be told apart."""
    part = torch.arange(96) % 2
    probabilities = torch.where(part[:, None] == part, 0.30, 0.22)
    mask = draw(probabilities[..., None, None].expand(96, 96, 3, 3))
    found = spectral_parts(ChannelGraph(mask), (32, 32))
    assert same_partition(found[0], part)
    assert same_partition(found[1], part)
    assert spectral_parts(ChannelGraph(mask[..., 0, 0]), (32, 32))[0].max() == 0, "one tap does not show them"
    chance = [spectral_parts(ChannelGraph(draw(torch.full((96, 64, 3, 3), 0.1), s)), (32, 32)) for s in range(30)]
    # 60 chances of one in a thousand each.
    assert sum(int(labels.max() > 0) for pair in chance for labels in pair) <= 1


def test_hubs_of_a_sparse_mask_are_a_part():
    probabilities = torch.full((400, 300), 0.005)
    probabilities[:20] = 0.5
    rows, cols = spectral_parts(ChannelGraph(draw(probabilities)), (16, 16))
    assert torch.equal(rows == 0, torch.arange(400) < 20)
    assert cols.max() == 0


def test_equal_rows_are_not_cut_to_make_room():
    """Three rows of a hundred are special, and no part may have fewer than six of them."""
    for probability in (0.0, 1.0):
        mask = torch.full((100, 50), probability).bool()
        mask[:3] = ~mask[:3]
        rows, _ = spectral_parts(ChannelGraph(mask), (4, 4))
        assert rows.max() == 0


@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_the_edge_is_above_the_noise(scale):
    """Ten draws each; the law's margin leaves one in a thousand above."""
    g = torch.Generator().manual_seed(1)
    probabilities = scale * torch.rand(120, 1, generator=g) * torch.rand(200, generator=g) * 3
    for seed in range(10):
        mask = draw(probabilities, seed)
        noise = torch.linalg.matrix_norm(mask.float() - probabilities, 2)
        assert noise < _Noise.from_graph(ChannelGraph(mask)).edge < 2.5 * noise


def graph_of(a):
    return ChannelGraph(torch.ones(a.shape).bool(), a)


@pytest.mark.parametrize("find", [leading_singular_vectors, exact_singular_vectors])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (40, 25), (5, 300)])
def test_leading_singular_vectors(shape, find):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a[0] *= 10
    u, s, v = find(graph_of(a), rank=3)
    expected = torch.linalg.svd(a, full_matrices=False)
    count = min(3, *shape)
    torch.testing.assert_close(s, expected.S[:count], rtol=1e-12, atol=0)
    # What is left over is 1e-10 of the largest value, over the distance of two values, a hundredth of it.
    torch.testing.assert_close((u * s) @ v.T, (expected.U[:, :count] * s) @ expected.Vh[:count], rtol=1e-7, atol=1e-7)


def test_exact_vectors_of_few_edges_are_orthonormal_and_those_of_nothing_finite():
    a = torch.zeros(6, 9, dtype=torch.float64)
    u, s, v = exact_singular_vectors(graph_of(a), rank=3)
    assert s.tolist() == [0, 0, 0]
    a[0, 1] = a[2, 3] = 1
    u, s, v = exact_singular_vectors(graph_of(a), rank=3)
    torch.testing.assert_close(s, torch.tensor([1.0, 1.0, 0.0]).double())
    for x in (u, v):
        torch.testing.assert_close(x.T @ x, torch.eye(3).double())


def test_all_layers_and_their_weights():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    first, *_ = communities([48, 48], 0.5, 0.1)
    masks = {"0.weight": torch.cat([first, first[:32]]), "2.weight": draw(torch.full((64, 128), 0.3))}
    graphons = layer_graphons(masks, model=net, order="spectral")
    assert graphons["0.weight"].shape == (2, 2)
    assert graphons["2.weight"].shape == (1, 1)
    energy = graphons["2.weight"].energy
    torch.testing.assert_close(energy[0, 0], (net[2].weight.double() ** 2 * masks["2.weight"]).mean())


def test_singular_values_that_lie_close_together_converge():
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(80, 80, generator=g, dtype=torch.float64)).Q for _ in range(2))
    values = torch.linspace(1, 0.2, 80, dtype=torch.float64)
    _, found, _ = leading_singular_vectors(graph_of(u * values @ v.T), rank=3)
    torch.testing.assert_close(found, values[:3], rtol=1e-7, atol=0)  # squares of the vectors' errors


def test_a_value_is_waited_for_until_it_rises_above_the_floor():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(512, 512, generator=g, dtype=torch.float64) / 512**0.5  # values up to 2
    a += 2.2 * torch.outer(*(torch.nn.functional.normalize(torch.randn(2, 512, generator=g, dtype=torch.float64))))
    _, found, _ = leading_singular_vectors(graph_of(a), rank=24, floor=2.5)
    assert found[0] == pytest.approx(float(torch.linalg.matrix_norm(a, 2)), rel=1e-9)


def test_the_widest_part_is_cut_first():
    density = torch.tensor([0.02, 0.2, 0.7, 0.75]).repeat_interleave(60)
    rows, _ = spectral_parts(ChannelGraph(draw(density[:, None].expand(240, 400))), (3, 3))
    assert [row.unique().numel() for row in rows.view(4, 60)] == [1, 1, 1, 1]
    assert rows.view(4, 60)[:, 0].tolist() == [2, 1, 0, 0]


def test_moving_to_the_nearer_mean_leaves_no_part_too_small():
    places = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0]])
    first = torch.arange(8) < 4
    assert torch.equal(_lloyd(places, first, min_size=2), first)
    assert int(_lloyd(places, first, min_size=1).sum()) == 7
