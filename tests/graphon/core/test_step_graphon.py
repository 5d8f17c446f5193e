import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_graphon._shared.random import generator as seeded
from lightning_graphon.graphon import StepGraphon, common_refinement


def random_graphon(rows, cols, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = torch.rand(rows, generator=g, dtype=torch.float64) + 0.1
    c = torch.rand(cols, generator=g, dtype=torch.float64) + 0.1
    values = torch.rand(rows, cols, generator=g, dtype=torch.float64)
    return StepGraphon(values, r / r.sum(), c / c.sum())


def on_grid(graphon, side=400):
    """Values at midpoints of a fine grid: an evaluation that shares no code with the partitions."""
    x = (np.arange(side) + 0.5) / side
    rows = np.searchsorted(np.cumsum(graphon.row_measure.numpy())[:-1], x, side="right")
    cols = np.searchsorted(np.cumsum(graphon.col_measure.numpy())[:-1], x, side="right")
    return graphon.values.numpy()[np.ix_(rows, cols)]


def test_lists_integers_and_flags_become_float64_and_floats_keep_their_dtype():
    assert StepGraphon([[0, 1]]).dtype == torch.float64
    assert StepGraphon(torch.ones(2, 2, dtype=torch.bool)).dtype == torch.float64
    assert StepGraphon(np.array([[0.5]], dtype=np.float32)).dtype == torch.float64
    assert StepGraphon(torch.rand(2, 2)).dtype == torch.float32


def test_nothing_can_be_set_and_the_source_is_copied():
    source = torch.full((2, 2), 0.5, dtype=torch.float64)
    graphon = StepGraphon(source, energy=source)
    source.fill_(0.9)
    assert graphon.density == 0.5
    assert graphon.energy.max() == 0.5
    with pytest.raises(AttributeError, match="immutable"):
        graphon.values = source
    with pytest.raises(AttributeError, match="immutable"):
        graphon.anything = 1
    with pytest.raises(AttributeError, match="immutable"):
        del graphon.values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [0.5]}, r"\[rows, cols\]"),
        ({"values": [[1.5]]}, r"\[0, 1\], got values from 1.5"),
        ({"values": [[float("nan")]]}, r"\[0, 1\]"),
        ({"values": [[0.5, 0.5]], "col_measure": [0.5, 0.6]}, "divide it by its sum"),
        ({"values": [[0.5, 0.5]], "col_measure": [0.0, 1.0]}, "col_measure must be positive"),
        ({"values": [[0.5, 0.5]], "row_measure": [0.5, 0.5]}, r"row_measure must have shape \(1,\)"),
        ({"values": [[0.5]], "energy": [[-1.0]]}, "energy must be finite and not negative"),
        ({"values": [[0.5]], "drift": [[0.0, 1.0]]}, "drift must have the shape"),
        ({"values": [[0.5]], "sparse_cells": [[True, False]]}, "sparse_cells must have the shape"),
    ],
)
def test_refuses_what_is_no_graphon(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepGraphon(**arguments)


def test_evaluation_density_and_degrees_agree_with_a_fine_grid():
    graphon = StepGraphon([[0.8, 0.2, 0.5], [0.4, 0.0, 1.0]], [0.25, 0.75], [0.5, 0.3, 0.2])
    fine = on_grid(graphon)  # edges of the cells are edges of this grid: sums are exact
    assert graphon.density == pytest.approx(fine.mean(), abs=1e-12)
    np.testing.assert_allclose(graphon.row_degree, [fine[0].mean(), fine[-1].mean()], atol=1e-12)
    np.testing.assert_allclose(graphon.col_degree, fine[:, [0, 250, 399]].mean(0), atol=1e-12)
    x = (torch.arange(400) + 0.5) / 400
    np.testing.assert_array_equal(graphon(x[:, None], x).numpy(), fine)


def test_evaluation_at_edges_and_outside():
    graphon = StepGraphon([[0.1], [0.9]])
    assert graphon(0.5, 0.0) == 0.9  # closed on the left
    assert graphon(1.0, 1.0) == 0.9  # but the last interval holds its right end
    with pytest.raises(ValueError, match=r"u must lie in \[0, 1\]"):
        graphon(1.1, 0.0)


def test_operator_and_adjoint():
    graphon = random_graphon(3, 4)
    f, g = torch.rand(4, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    left = (graphon.apply(f) * g * graphon.row_measure).sum()
    right = (graphon.apply_adjoint(g) * f * graphon.col_measure).sum()
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(graphon.apply(torch.ones(4)), graphon.row_degree)
    assert graphon.apply(torch.ones(4, 2)).shape == (3, 2)


def test_singular_values_of_known_operators():
    torch.testing.assert_close(
        StepGraphon([[0.3, 0.3]], None, [0.1, 0.9]).singular_values(), torch.tensor([0.3]).double()
    )
    # a block diagonal of two blocks of measure a and 1 - a: singular values p a and p (1 - a)
    blocks = StepGraphon([[0.5, 0.0], [0.0, 0.5]], [0.2, 0.8], [0.2, 0.8])
    torch.testing.assert_close(blocks.singular_values(), torch.tensor([0.4, 0.1]).double())


def test_path_graphon_on_different_partitions_is_the_integral():
    first = StepGraphon([[0.9, 0.1], [0.3, 0.6], [0.2, 0.2]], [0.2, 0.3, 0.5], [0.4, 0.6])
    second = StepGraphon([[0.5, 0.8], [1.0, 0.0]], [0.25, 0.75], [0.35, 0.65])
    path = first.compose(second)
    expected = on_grid(second) @ on_grid(first) / 400
    np.testing.assert_allclose(on_grid(path), expected, atol=1e-12)
    assert path == second @ first


@settings(max_examples=50)
@given(rows=st.integers(1, 7), cols=st.integers(1, 7), seed=st.integers(0, 1000))
def test_refinement_keeps_the_function_and_coarsening_keeps_the_mean(rows, cols, seed):
    a, b = random_graphon(rows, cols, seed), random_graphon(cols, rows, seed + 1)
    fine_a, fine_b = common_refinement(a, b)
    assert fine_a.shape == fine_b.shape
    assert max(fine_a.shape) <= rows + cols - 1
    points = torch.rand(50, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(a(*points.T), fine_a(*points.T))
    assert torch.equal(b(*points.T), fine_b(*points.T))
    assert a.coarsen(2, 3).density == pytest.approx(a.density, abs=1e-12)
    assert fine_a.rebin(a.row_measure, a.col_measure).values.sub(a.values).abs().max() < 1e-9


def test_refining_equal_partitions_leaves_no_slivers():
    # cumulative sums of 1/64 and of 1/192 differ by rounding, in float32 by much more
    for dtype in (torch.float64, torch.float32):
        a = StepGraphon(torch.rand(192, 192, dtype=dtype))
        fine, _ = common_refinement(a, StepGraphon(torch.rand(64, 64, dtype=dtype)))
        assert fine.shape == (192, 192)


def test_energy_and_drift_follow_rebinning_and_errors_do_not():
    cells = torch.tensor([[1.0, 3.0], [5.0, 7.0]], dtype=torch.float64)
    graphon = StepGraphon(cells / 10, energy=cells, drift=-cells, std_error=cells, sparse_cells=cells > 2)
    coarse = graphon.coarsen(1, 1)
    assert coarse.energy.item() == pytest.approx(4)
    assert coarse.drift.item() == pytest.approx(-4)
    assert coarse.std_error is None
    assert coarse.sparse_cells is None


def test_relative_values_have_mean_one_and_survive_emptiness():
    graphon = random_graphon(4, 5)
    relative = graphon.row_measure @ graphon.relative_values @ graphon.col_measure
    assert relative.item() == pytest.approx(1)
    assert StepGraphon([[0.0]]).relative_values.item() == 0


def test_sorting_by_degree_carries_measures_and_extra_cells():
    graphon = StepGraphon([[0.1, 0.2], [0.8, 0.9]], [0.3, 0.7], [0.6, 0.4], energy=[[1.0, 2.0], [3.0, 4.0]])
    done = graphon.sort_by_degree()
    assert done.values.tolist() == [[0.9, 0.8], [0.2, 0.1]]
    assert done.energy.tolist() == [[4.0, 3.0], [2.0, 1.0]]
    torch.testing.assert_close(done.row_measure, torch.tensor([0.7, 0.3]).double())
    assert done.density == pytest.approx(graphon.density)


# ---- sampling


def test_sampling_is_seeded_and_leaves_the_global_state_alone():
    graphon, before = random_graphon(3, 3), torch.get_rng_state()
    first = graphon.sample((40, 50), seed=1)
    assert torch.equal(first, graphon.sample((40, 50), seed=1))
    assert torch.equal(first, graphon.sample((40, 50), generator=seeded(1, "sampled masks")))
    assert not torch.equal(first, graphon.sample((40, 50), seed=2))
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_moves_on_between_draws():
    generator = torch.Generator().manual_seed(0)
    graphon = StepGraphon([[0.5]])
    first, second = (graphon.sample((20, 20), generator=generator) for _ in range(2))
    assert not torch.equal(first, second)


def test_float32_and_float64_graphons_draw_the_same_mask():
    # 0.25 and 0.75 are the same number in both
    graphon = StepGraphon([[0.25, 0.75]])
    assert torch.equal(graphon.sample((30, 30)), graphon.to(dtype=torch.float32).sample((30, 30)))


def test_sampled_blocks_have_the_asked_densities():
    graphon = StepGraphon([[1.0, 0.2], [0.0, 0.6]], [0.25, 0.75], [0.5, 0.5])
    mask = graphon.sample((400, 1000), seed=3).double()
    assert mask[:100, :500].min() == 1
    assert mask[100:, :500].max() == 0
    # 50000 and 150000 draws: 5 standard errors are 0.009 and 0.0063
    assert mask[:100, 500:].mean().item() == pytest.approx(0.2, abs=0.009)
    assert mask[100:, 500:].mean().item() == pytest.approx(0.6, abs=0.0063)


def test_sampling_in_several_chunks_keeps_rows_apart():
    mask = StepGraphon([[1.0], [0.0]]).sample((1000, 3000))  # 3 million entries, three chunks
    assert mask[:500].all()
    assert not mask[500:].any()


def test_sampling_convolutions_and_random_positions():
    mask = StepGraphon([[1.0], [0.0]]).sample((4, 3, 2, 2))
    assert mask.shape == (4, 3, 2, 2)
    assert mask[:2].all()
    assert not mask[2:].any()
    rows = StepGraphon([[1.0], [0.0]]).sample((2001, 1), points="random").double().flatten()
    assert rows.mean().item() == pytest.approx(0.5, abs=0.056)  # 5 standard errors of fair positions
    assert rows.diff().abs().sum() > 500  # a grid would have one jump


@pytest.mark.parametrize("shape", [(3,), (0, 3)])
def test_sampling_refuses_shapes_that_are_no_weight(shape):
    with pytest.raises(ValueError, match="shape must be"):
        StepGraphon([[0.5]]).sample(shape)


# ---- keeping


@pytest.mark.parametrize("clone", [lambda g: pickle.loads(pickle.dumps(g)), copy.deepcopy])
def test_survives_pickling_and_copying(clone):
    graphon = StepGraphon([[0.1, 0.2]], energy=[[1.0, 2.0]])
    twin = clone(graphon)
    assert twin == graphon
    with pytest.raises(AttributeError, match="immutable"):
        twin.values = graphon.values


def test_state_dict_survives_a_weights_only_checkpoint(tmp_path):
    graphon = StepGraphon([[0.1, 0.2]], energy=[[1.0, 2.0]], sparse_cells=[[True, False]])
    torch.save(graphon.state_dict(), tmp_path / "graphon.pt")
    state = torch.load(tmp_path / "graphon.pt", weights_only=True)
    assert StepGraphon.from_state_dict(state) == graphon


def test_equality_sees_values_measures_dtype_and_extra_cells():
    graphon = StepGraphon([[0.1, 0.2]])
    assert graphon == StepGraphon([[0.1, 0.2]])
    assert graphon != StepGraphon([[0.1, 0.3]])
    assert graphon != StepGraphon([[0.1, 0.2]], col_measure=[0.3, 0.7])
    assert graphon != StepGraphon([[0.1, 0.2]], energy=[[0.1, 0.2]])
    assert graphon != graphon.to(dtype=torch.float32)
    assert graphon != "a graphon"


def test_to_moves_every_tensor_and_keeps_flags():
    graphon = StepGraphon([[0.1, 0.2]], energy=[[1.0, 2.0]], sparse_cells=[[True, False]])
    moved = graphon.to(device="cpu", dtype=torch.float32)
    assert {t.dtype for t in (moved.values, moved.row_measure, moved.energy)} == {torch.float32}
    assert moved.sparse_cells.dtype == torch.bool


def test_gradients_flow_through_values():
    values = torch.full((2, 2), 0.5, dtype=torch.float64, requires_grad=True)
    StepGraphon(values).row_degree.sum().backward()
    torch.testing.assert_close(values.grad, torch.full((2, 2), 0.5, dtype=torch.float64))


def test_repr_says_size_density_and_extras():
    assert repr(StepGraphon([[0.5]], energy=[[1.0]])) == "StepGraphon(rows=1, cols=1, density=0.5, energy)"


def test_graphons_of_different_dtype_are_not_equal():
    """A quarter is the same number in both."""
    single, double = (StepGraphon(torch.tensor([[0.25]], dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert single != double
    assert single == double.to(dtype=torch.float32)
