"""The flow of a mask, against plain loops."""

import io
import math

import numpy as np
import pytest
import torch

from lightning_graphon.graphon import (
    LayerFlow,
    StepGraphon,
    UnitPositions,
    constant,
    estimate_graphon,
    l2_distance,
    values_at_density,
)
from lightning_graphon.graphon.flow.exchange import cell_distance, chance_distance, churn


def random_mask(shape, density, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def exchanged(mask, count, seed):
    """As many weights dropped and grown, anywhere."""
    random, flat = np.random.default_rng(seed), mask.flatten().clone()
    kept, free = (np.flatnonzero(part.numpy()) for part in (flat, ~flat))
    flat[torch.from_numpy(random.choice(kept, count, replace=False))] = False
    flat[torch.from_numpy(random.choice(free, count, replace=False))] = True
    return flat.reshape(mask.shape)


def cells_by_loops(start, mask, bins):
    """Cell means of a mask at the places of `start`'s units, and the sizes of cells."""
    rows = sorted(range(start.shape[0]), key=lambda i: -int(start[i].sum()))
    cols = sorted(range(start.shape[1]), key=lambda j: -int(start[:, j].sum()))
    parts = [np.array_split(np.array(side), bins) for side in (rows, cols)]
    kept = np.array([[sum(int(mask[i, j].sum()) for i in a for j in b) for b in parts[1]] for a in parts[0]])
    taps = mask[0, 0].numel()
    return kept, np.array([[len(a) * len(b) * taps for b in parts[1]] for a in parts[0]])


@pytest.mark.parametrize("shape", [(13, 22), (12, 9, 3, 2)])
def test_cells_and_distances_are_those_of_plain_loops(shape):
    start = random_mask(shape, 0.3, 0)
    masks = [exchanged(start, 20, 1), exchanged(start, 40, 2)]
    flow = LayerFlow(start, bins=4)
    before = cells_by_loops(start, start, 4)[0]
    first, last = before, before
    for step, mask in enumerate(masks, 1):
        point = flow.look(mask, step)
        kept, sizes = cells_by_loops(start, mask, 4)
        np.testing.assert_allclose(point.cells, kept / sizes, rtol=1e-6)  # float32
        for distance, other in ((point.moved, first), (point.moved_last, last)):
            expected = math.sqrt(((kept - other) ** 2 / sizes**2 * sizes).sum() / sizes.sum())
            assert distance == pytest.approx(expected, rel=1e-12)
        last = kept
    assert flow.points[1].churn == pytest.approx(20 / int(start.sum()))
    assert flow.points[2].churn == pytest.approx(float((masks[1] & ~masks[0]).sum()) / float(start.sum()))


def test_chance_is_the_mean_square_of_random_exchanges():
    start = random_mask((20, 30), 0.2, 3)
    start[:4] |= random_mask((4, 30), 0.7, 4)  # not homogeneous: exchange has a direction, too
    positions = UnitPositions.of(start, 5)
    counts, sizes = positions.counts(start), positions.sizes()
    found = [cell_distance(counts, positions.counts(exchanged(start, 50, seed)), sizes) for seed in range(2000)]
    squares = np.square(found)
    expected = chance_distance(counts, sizes, 50, 50) ** 2
    # Four standard errors of the mean of 2000.
    assert abs(squares.mean() - expected) < 4 * squares.std() / 2000**0.5
    assert squares.std() / 2000**0.5 < 0.02 * expected, "or the test says little"


def test_an_exchange_with_a_direction_is_farther_than_chance():
    start = random_mask((64, 64), 0.1, 0)
    mask = start.clone()
    mask[:, 32:] = False
    free = (~mask[:, :32]).nonzero()[: int(start.sum() - mask.sum())]
    mask[free[:, 0], free[:, 1]] = True
    point = LayerFlow(start, bins=8).look(mask, 1)
    assert point.moved > 1.3 * point.by_chance  # noise alone is 0.05


def test_units_that_die_and_revive_are_counted():
    start = torch.ones(6, 5, dtype=torch.bool)
    start[4:] = False
    flow = LayerFlow(start, bins=2)
    assert flow.points[0].dead == 2
    mask = start.clone()
    mask[0], mask[5, 1] = False, True
    point = flow.look(mask, 1)
    assert (point.dead, point.revived) == (2, 1)
    torch.testing.assert_close(point.row_degrees, torch.tensor([0.0, 0.05, 0.6, 1.0, 1.0]))  # of 0, 0, .2, 1, 1, 1
    again = mask.clone()
    again[4] = True
    assert flow.look(again, 2).revived == 1


def test_a_mask_that_stays_is_no_look():
    mask = random_mask((8, 8), 0.5, 0)
    flow = LayerFlow(mask)
    assert flow.look(mask.clone(), 5) is None
    assert len(flow.points) == 1


def test_the_limit_follows_the_density():
    start, fewer = random_mask((40, 40), 0.4, 0), random_mask((40, 40), 0.1, 1)
    flow = LayerFlow(start, bins=4)
    point = flow.look(fewer, 1)
    expected = l2_distance(estimate_graphon(fewer, 4), constant(float(fewer.double().mean())), align=False)
    assert point.limit_distance == pytest.approx(expected, rel=1e-12)
    limit = StepGraphon([[0.7, 0.4], [0.4, 0.1]])
    point = LayerFlow(start, bins=4, limit=limit).look(fewer, 1)
    moved = StepGraphon(values_at_density(torch.logit(limit.values), float(fewer.double().mean())))
    assert point.limit_distance == pytest.approx(l2_distance(estimate_graphon(fewer, 4), moved, align=False), rel=1e-9)


def test_nothing_kept_has_a_distance_of_zero_from_nothing():
    point = LayerFlow(random_mask((4, 4), 0.5, 0), bins=2).look(torch.zeros(4, 4, dtype=torch.bool), 1)
    assert (point.limit_distance, point.churn, point.dead) == (0, 0, 4)


@pytest.mark.parametrize("order", ["degree", "spectral", "none", "joint"])
def test_a_flow_goes_on_from_its_state(order):
    masks = [random_mask((12, 10, 3, 3), 0.3, seed) for seed in range(4)]
    limit = StepGraphon([[0.6, 0.2]])
    whole, first = (LayerFlow(masks[0], bins=4, order=order, limit=limit) for _ in range(2))
    for step in (1, 2, 3):
        whole.look(masks[step], step)
    first.look(masks[1], 1)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = LayerFlow.from_state(torch.load(file, weights_only=True))
    for step in (2, 3):
        resumed.look(masks[step], step)
    for a, b in zip(whole.points, resumed.points, strict=True):
        assert all(
            torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
            for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
        )


def test_of_many_looks_a_part_is_kept_with_the_first_and_the_last():
    flow = LayerFlow(random_mask((6, 6), 0.5, 0), bins=2)
    for step in range(1, 301):
        flow.look(random_mask((6, 6), 0.5, step), step)
        steps = [point.step for point in flow.points]
        assert (steps[0], steps[-1]) == (0, step)
        assert steps == sorted(set(steps))
        assert len(steps) <= 64
    assert abs(flow.middle.step - 150) <= 16  # of 64 points some are thirty-two steps apart


def test_churn_of_nothing_is_zero():
    assert churn(torch.tensor([True]), torch.tensor([False])) == 0
