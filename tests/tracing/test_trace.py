"""What is read of a forward pass, and which of its units are the same."""

import pytest
import torch
from torch import nn

from lightning_graphon.tracing import NotReadableError, trace
from lightning_graphon.tracing.axes import exchangeable_groups, same_units
from tests.helpers.layers import Beside, Function, Residual, conv


def kinds(model, x):
    return [type(step).__name__ for step in trace(model, x).steps]


def test_a_functional_network_reads_as_its_modules():
    layers = conv(1, 4), conv(4, 6, stride=2), nn.Linear(6 * 16, 3)

    def forward(x):
        h = torch.relu(layers[0](x))
        h = nn.functional.dropout(layers[1](h).tanh_(), training=False)
        return nn.functional.linear(h.reshape(x.size(0), -1), layers[2].weight, layers[2].bias)

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            return forward(x)

    modules = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Tanh(), nn.Flatten(), layers[2])
    x = torch.rand(3, 1, 8, 8)
    left, right = trace(Written(), x), trace(modules, x)
    assert [type(s) for s in left.steps] == [type(s) for s in right.steps]
    for a, b in zip(left.steps, right.steps, strict=True):
        assert torch.equal(a.units, b.units)
        assert a.positions == b.positions
        if hasattr(a, "taps"):
            assert torch.equal(a.taps, b.taps)
            assert torch.equal(a.features, b.features)


def test_taps_of_a_convolution_are_what_it_reads():
    x = torch.rand(2, 3, 7, 5, dtype=torch.float64)
    layer = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), dtype=torch.float64)
    step = trace(layer, x).steps[1]
    flat = torch.cat([x.flatten(2), torch.zeros(2, 3, 1, dtype=x.dtype)], 2)  # the last position is outside: zero
    read = flat[:, step.features[:, None], step.taps[step.tap_of]]  # [N, F, P]
    found = torch.einsum("of,nfp->nop", step.matrix(step.weight), read) + step.bias[:, None]
    torch.testing.assert_close(found.view_as(layer(x)), layer(x))


def test_groups_are_zero_blocks():
    layer = nn.Conv1d(4, 6, 3, groups=2)
    step = trace(layer, torch.rand(2, 4, 9)).steps[1]
    matrix = step.matrix(step.weight).unflatten(1, (4, 3))
    assert not matrix[:3, 2:].any()
    assert not matrix[3:, :2].any()
    assert torch.equal(matrix[:3, :2], layer.weight[:3])


def test_hand_written_functions_are_one_step():
    model = nn.Sequential(nn.Linear(4, 5), Function(lambda x: x * torch.sigmoid(1.7 * x) + 0.1), nn.Linear(5, 2))
    assert kinds(model, torch.rand(2, 4)) == ["Input", "Affine", "Pointwise", "Affine"]


def test_a_residual_stream_has_one_set_of_units():
    model = nn.Sequential(conv(1, 6), *(Residual(nn.ReLU(), conv(6, 8), nn.ReLU(), conv(8, 6)) for _ in range(3)))
    found = trace(model, torch.rand(2, 1, 5, 5))
    classes = same_units(found)
    assert int(classes.max()) + 1 == 1 + 6 + 3 * 8  # the input, the stream, three insides
    sums = [step for step in found.steps if type(step).__name__ == "Sum"]
    assert all(torch.equal(classes[step.units], classes[sums[0].units]) for step in sums)


def test_concatenated_units_stay_themselves():
    model = nn.Sequential(nn.Linear(4, 6), Beside(nn.Linear(6, 3), nn.Linear(6, 5)), nn.ReLU(), nn.Linear(8, 2))
    found = trace(model, torch.rand(2, 4))
    groups = exchangeable_groups(found, same_units(found))
    assert sorted(groups.bincount().tolist() if (groups >= 0).all() else groups[groups >= 0].bincount().tolist())
    joined = next(step for step in found.steps if type(step).__name__ == "Concatenation")
    left, right = groups[same_units(found)[joined.units]].split([3, 5])
    assert len(left.unique()) == len(right.unique()) == 1
    assert left[0] != right[0]


def test_tokens_and_images_differ_in_where_units_are():
    tokens = trace(nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)), torch.rand(2, 7, 5))
    assert [(len(s.units), s.positions) for s in tokens.steps] == [(5, 7), (4, 7), (4, 7), (3, 7)]
    images = trace(nn.Sequential(conv(2, 4), nn.AvgPool2d(2)), torch.rand(2, 2, 6, 6))
    assert [(len(s.units), s.positions) for s in images.steps] == [(2, 36), (4, 36), (4, 9)]


def test_what_is_not_used_is_left_out():
    model = nn.Sequential(nn.Linear(4, 4), Function(lambda x: (x.relu(), x)[1]))
    assert kinds(model, torch.rand(2, 4)) == ["Input", "Affine"]


class Sneaky(nn.Linear):
    """Changes its result where torch functions do not see it."""

    def forward(self, x):
        out = super().forward(x)
        with torch._C.DisableTorchFunction():
            out.mul_(2)
        return out


def test_the_steps_must_give_the_outputs():
    with pytest.raises(NotReadableError, match="Sneaky does more"):
        trace(Sneaky(4, 3), torch.rand(2, 4))


def test_samples_must_not_meet():
    with pytest.raises(NotReadableError, match="mixes units or samples"):
        trace(nn.Sequential(nn.Linear(4, 3), Function(lambda x: x - x.mean(0))), torch.rand(2, 4))


def test_a_layer_over_tokens_is_refused_by_what_it_does():
    mixer = nn.Sequential(nn.Linear(5, 4), Function(lambda h: h.mT), nn.Linear(7, 7))
    with pytest.raises(
        NotReadableError, match=r"'2' \(Linear\), which mixes positions \(tokens\) with weights that all"
    ):
        trace(mixer, torch.rand(2, 7, 5))
    padded = nn.Sequential(nn.Linear(5, 4), Function(lambda h: nn.functional.pad(h, (0, 0, 0, 1))), nn.Linear(4, 2))
    with pytest.raises(NotReadableError, match="reads zero padding, has no infinite-width limit"):
        trace(padded, torch.rand(2, 7, 5))
