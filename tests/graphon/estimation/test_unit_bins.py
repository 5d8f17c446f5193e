"""Positions of the units of networks with branches."""

import pytest
import torch
from torch import nn

from lightning_graphon.graphon import layer_graphons
from tests.helpers.layers import Residual, conv


def random_masks(model, density=0.4):
    random = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=random) < density for n, p in model.named_parameters() if p.ndim > 1}


def test_a_chain_has_the_positions_that_it_has_without_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 3))
    masks = random_masks(model)
    for positions in ("degree", "energy"):
        options = {"model": model, "order": "joint", "bins": 9, "positions": positions}
        traced = layer_graphons(masks, inputs=torch.rand(2, 6), **options)
        for name, expected in layer_graphons(masks, **options).items():
            assert traced[name] == expected
            torch.testing.assert_close(traced[name].energy, expected.energy)
            torch.testing.assert_close(traced[name].drift, expected.drift)


def test_a_flattened_convolution_too():
    model = nn.Sequential(conv(1, 12), nn.ReLU(), conv(12, 10), nn.ReLU(), nn.Flatten(), nn.Linear(160, 3))
    masks = random_masks(model)
    options = {"model": model, "order": "joint", "bins": 6}
    traced = layer_graphons(masks, inputs=torch.rand(2, 1, 4, 4), **options)
    assert all(traced[name] == expected for name, expected in layer_graphons(masks, **options).items())


def test_a_stream_has_one_order():
    model = nn.Sequential(
        conv(1, 12), *(Residual(nn.ReLU(), conv(12, 8), nn.ReLU(), conv(8, 12)) for _ in range(2)), nn.Flatten(),
        nn.Linear(12 * 16, 3),
    )  # fmt: skip
    masks = random_masks(model)
    found = layer_graphons(masks, model=model, order="joint", bins=6, inputs=torch.rand(2, 1, 4, 4))
    writers, readers = ("0.weight", "1.f.3.weight", "2.f.3.weight"), ("1.f.1.weight", "2.f.1.weight", "4.weight")
    stream = [*(found[n].row_measure for n in writers), *(found[n].col_measure for n in readers)]
    assert len(stream[0]) > 2
    for other in stream[1:]:
        torch.testing.assert_close(other, stream[0])
    # In the first bin are the channels with the most edges into the stream and out of it.
    degrees = sum(masks[n].flatten(1).sum(1) for n in writers)
    written = sum(float(found[n].values[0].mean()) for n in ("1.f.3.weight", "2.f.3.weight"))
    last = sum(float(found[n].values[-1].mean()) for n in ("1.f.3.weight", "2.f.3.weight"))
    assert degrees.max() > degrees.min()
    assert written > last


def test_attention_has_the_rows_of_one_weight():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 2))
    found = layer_graphons(random_masks(model), model=model, order="joint", bins=4, inputs=torch.rand(2, 3, 5))
    assert found["1.self_attn.in_proj_weight"].shape[1] == found["1.linear1.weight"].shape[1]
    torch.testing.assert_close(found["1.self_attn.in_proj_weight"].col_measure, found["0.weight"].row_measure)


def test_masks_of_other_parameters_are_named():
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))
    with pytest.raises(KeyError, match=r"Did you mean '0\.weight'"):
        layer_graphons({"0.wieght": torch.ones(16, 5)}, model=model, order="joint", inputs=torch.rand(2, 5))
