"""Memberships of rows in bins, and means of cells."""

from itertools import permutations

import pytest
import torch

from lightning_graphon.graphon.estimation.binning import average_ties, cell_means, effective_count, index_ties, measure
from lightning_graphon.graphon.estimation.channel_graph import ChannelGraph

CPU = torch.device("cpu")


def test_tied_items_share_their_places_as_on_average_over_their_orders():
    keys = torch.tensor([2.0, 5.0, 2.0, 2.0, 1.0])
    orders = [torch.tensor(order) for order in permutations(range(5))]
    single = [index_ties(keys[order], 2)[order.argsort()] for order in orders]
    torch.testing.assert_close(average_ties(keys, 2), torch.stack(single).mean(0))


def test_ties_in_the_given_order_and_no_order_at_all():
    keys = torch.tensor([1.0, 3.0, 3.0, 1.0])
    assert index_ties(keys, 2).argmax(1).tolist() == [1, 0, 0, 1]
    assert index_ties(torch.zeros(4), 2).argmax(1).tolist() == [0, 0, 1, 1]
    assert index_ties(torch.ones(5), 2).argmax(1).tolist() == [0, 0, 0, 1, 1]


def test_the_mean_of_the_cells_is_the_mean_of_the_mask():
    mask = torch.rand(7, 9) < 0.4
    graph = ChannelGraph(mask)
    rows, cols = average_ties(graph.degrees()[0], 3), average_ties(graph.degrees()[1], 4)
    cells = cell_means(graph, rows, cols)
    assert float(measure(rows, 7, CPU) @ cells @ measure(cols, 9, CPU)) == pytest.approx(float(mask.double().mean()))
    assert torch.equal(cell_means(graph, None, None), mask.double())


def test_shared_items_count_less():
    assert effective_count(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double(), 3, CPU).tolist() == [2, 1]
    assert effective_count(torch.full((4, 2), 0.5).double(), 4, CPU).tolist() == [4, 4]
    assert effective_count(None, 3, CPU).tolist() == [1, 1, 1]
