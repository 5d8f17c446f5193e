"""Matrices of one layer of infinite width."""

import torch

from lightning_graphon.graphon import StepGraphon
from lightning_graphon.ntk.infinite.layer_building import build_layers
from lightning_graphon.ntk.infinite.layers import expand_inputs, merge_positions

OPTIONS = {
    "propagate": "density", "parameterization": "ntk", "widths": None, "weight_variance": 2.0, "bias_variance": 0.1,
    "parameter_term": "kept", "train_bias": None,
}  # fmt: skip


def layers(*values):
    x = torch.ones(2, 4, dtype=torch.float64)
    return build_layers([StepGraphon(v) for v in values], x, **OPTIONS)


def test_one_column_stands_for_all_inputs():
    (one,), (all_four,) = layers([[0.5], [0.2]]), layers([[0.5] * 4, [0.2] * 4])
    torch.testing.assert_close(one.covariance_map, all_four.covariance_map)
    torch.testing.assert_close(one.parameter_map, all_four.parameter_map)
    assert expand_inputs(one, 4) is one


def test_equal_positions_become_one_and_their_columns_are_added():
    whole = layers([[0.5] * 4, [0.2] * 4, [0.5] * 4], [[0.3, 0.4, 0.6]])
    first, last = merge_positions(whole)
    assert sorted(first.covariance_map[:, 0].tolist()) == [2 * 0.2 / 4, 2 * 0.5 / 4]
    # What reaches the output from the inputs is the same.
    torch.testing.assert_close(
        last.covariance_map @ first.covariance_map, whole[1].covariance_map @ whole[0].covariance_map
    )
    torch.testing.assert_close(first.row_measure.sort().values, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))


def test_outputs_are_averaged_by_their_measure():
    x, graphon = torch.ones(2, 4, dtype=torch.float64), StepGraphon([[0.2] * 4, [0.6] * 4], row_measure=[0.25, 0.75])
    (layer,) = build_layers([graphon], x, **OPTIONS)
    average = layer.averaged()
    torch.testing.assert_close(average.covariance_map, torch.full((1, 4), 2 * 0.5 / 4, dtype=torch.float64))
    assert average.row_measure.tolist() == [1]
