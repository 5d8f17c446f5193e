"""Layers of all kinds between others: the same function, of random masks with dead units."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_graphon.compact import compact
from tests.helpers.compact_cases import random_masks, same, scramble


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net = kind(8, 8, batch_first=True)

    def forward(self, x):
        return self.net(x.flatten(2).transpose(1, 2))[0].transpose(1, 2)


class Gate(nn.Module):
    """Squeeze and excitation, with one gate for all channels beside."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.one = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        gate = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * gate * self.one(x).sigmoid()


class Blur(nn.Module):
    """A depthwise convolution with a buffer, and the number of its groups in the code."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.rand(8, 1, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.kernel, groups=8)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.zeros(1, 8, 6, 6))

    def forward(self, x):
        return x * self.scale.exp() + self.shift


KINDS = {
    "leaky": nn.LeakyReLU,
    "prelu": lambda: nn.PReLU(8),
    "one prelu": nn.PReLU,
    "batch norm": lambda: nn.BatchNorm2d(8),
    "batch statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "group norm": lambda: nn.GroupNorm(4, 8),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "layer norm": lambda: nn.LayerNorm([8, 6, 6]),
    "local response": lambda: nn.LocalResponseNorm(3),
    "max pool": lambda: nn.MaxPool2d(2, padding=1),
    "average pool": lambda: nn.AvgPool2d(3, 2, padding=1),
    "upsample": lambda: nn.Upsample(scale_factor=2),
    "dropout": nn.Dropout,
    "reflection": lambda: nn.ReflectionPad2d(1),
    "constant pad": lambda: nn.ConstantPad2d(1, 0.7),
    "circular": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "same": lambda: nn.Conv2d(8, 8, 3, padding="same", dilation=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, stride=2, output_padding=1),
    "transposed depthwise": lambda: nn.ConvTranspose2d(8, 8, 3, groups=8),
    "transposed groups": lambda: nn.ConvTranspose2d(8, 8, 3, groups=2),
    "multiplied depthwise": lambda: nn.Sequential(nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 8, 1)),
    "pixel shuffle": lambda: nn.Sequential(nn.Conv2d(8, 32, 1), nn.PixelShuffle(2)),
    "channel shuffle": lambda: nn.ChannelShuffle(4),
    "softmax": lambda: nn.Softmax2d(),
    "glu": lambda: nn.Sequential(nn.Conv2d(8, 16, 1), nn.GLU(1)),
    "halves": lambda: Lambda(lambda x: torch.cat([x[:, :4], x[:, 4:].sin()], 1)),
    "flip": lambda: Lambda(lambda x: x.flip(1)),
    "in place": lambda: Lambda(lambda x: F.relu(x.mul_(2), inplace=True)),
    "item": lambda: Lambda(lambda x: x.index_fill(1, torch.tensor([3]), 1.0)),
    "written": lambda: Lambda(lambda x: _written(x)),
    "mean over channels": lambda: Lambda(lambda x: x - x.mean(1, keepdim=True)),
    "made": lambda: Lambda(lambda x: x + torch.arange(8.0).reshape(8, 1, 1)),
    "like": lambda: Lambda(lambda x: x * torch.full_like(x, 2.0)),
    "where": lambda: Lambda(lambda x: torch.where(x > 0, x, x.exp() - 1)),
    "einsum": lambda: Lambda(lambda x: torch.einsum("nchw,ndhw->nchw", x, x)),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "gate": Gate,
    "blur": Blur,
    "standardised": lambda: Standardised(8, 8, 1),
    "scale": LayerScale,
}


def _written(x):
    x = x.clone()
    x[:, 2] = 1.0
    return x


class Between(nn.Module):
    def __init__(self, middle, recurrent):
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 8, 3), middle
        self.second = (nn.Conv1d if recurrent else nn.Conv2d)(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.tanh(self.second(self.middle(self.first(x))))
        return self.head(x.flatten(2).mean(2))


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_same_function(kind, seed, mode):
    torch.manual_seed(seed)
    model = scramble(Between(KINDS[kind](), kind in ("lstm", "gru")), seed).double()
    masks = random_masks(model, density=0.9, dead=0.25, seed=seed + 4)
    masks["head.weight"][:] = True
    small = compact(model, masks, torch.rand(4, 3, 8, 8).double(), mode=mode)
    same(model, masks, small, torch.rand(3, 3, 8, 8).double())
    if mode == "training" and kind != "dropout":
        model.load_state_dict(small.expand_state_dict())
        same(model, masks, small, torch.rand(3, 3, 8, 8).double())


ALONE = ("leaky", "prelu", "batch norm", "instance norm", "max pool", "average pool", "upsample", "reflection",
         "constant pad", "circular", "same", "transposed", "transposed depthwise", "glu", "where", "gate", "scale",
         "in place", "like")  # fmt: skip


@pytest.mark.parametrize("kind", ALONE)
def test_dead_channels_go_through(kind):
    """That nobody reads: in all of these the first layer loses them, too."""
    torch.manual_seed(0)
    model = scramble(Between(KINDS[kind](), False)).double()
    masks = random_masks(model, density=1.1, dead=0)
    last = [name for name in masks if name != "head.weight"][-1]
    masks[last][:, [0, 5]] = False
    for name in ("middle.one.weight",):
        if name in masks:
            masks[name][:, [0, 5]] = False
    for name in ("middle.down.weight",):
        if name in masks:
            masks[name][:, [0, 5]] = False
    if kind in ("circular", "same", "transposed"):
        masks["middle.weight"][(slice(None), [0, 5]) if kind != "transposed" else [0, 5]] = False
    if kind == "glu":
        masks["middle.0.weight"][:, [0, 5]] = False
    small = compact(model, masks, torch.rand(4, 3, 8, 8).double())
    assert small.model.first.out_channels == 6
    assert small.model.second.in_channels == 6
    same(model, masks, small, torch.rand(3, 3, 8, 8).double())


def test_several_inputs_and_outputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.out = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, left, right):
            hidden = self.left(left).relu() * self.right(right)
            return {"out": self.out(hidden), "norm": hidden[:, :1]}

    model = scramble(Model()).double()
    masks = random_masks(model)
    inputs = {"left": torch.rand(5, 4).double(), "right": torch.rand(5, 3).double()}
    small = compact(model, masks, inputs)
    masks.apply_(model)
    for key, expected in model(**inputs).items():
        torch.testing.assert_close(small.model(**inputs)[key], expected, rtol=1e-12, atol=1e-12)
    assert small.report.parameters.after < small.report.parameters.before
