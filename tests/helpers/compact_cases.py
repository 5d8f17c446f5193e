"""Networks that `compact` makes smaller, masks with dead units, and the comparison with the masked network."""

import copy

import torch
from torch import nn

from lightning_graphon.pruning import Masks, select_weights


def all_kept(model):
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in select_weights(model).items()}


def without(model, **dead):
    """Masks in which units are dead: `layer__out=[...]` rows, `layer__in=[...]` columns."""
    masks = all_kept(model)
    for key, units in dead.items():
        path, _, side = key.rpartition("__")
        name = f"{path.replace('__', '.')}.weight"
        masks[name][(slice(None),) * (side == "in") + (units,)] = False
    return masks


def random_masks(model, density=0.6, dead=0.4, seed=0):
    """Random weights, and random rows and columns without any."""
    generator, masks = torch.Generator().manual_seed(seed), {}
    for name, weight in select_weights(model).items():
        mask = torch.rand(weight.shape, generator=generator) < density
        for axis in (0, 1):
            shape = [1] * mask.ndim
            shape[axis] = -1
            if mask.shape[axis] > 4:
                mask = mask & (torch.rand(mask.shape[axis], generator=generator) > dead).reshape(shape)
        masks[name] = mask
    return Masks(masks)


def scramble(model, seed=3):
    """No parameter, and no statistic, is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            tensor.data = 0.5 + noise.abs() if "var" in name else tensor.data + 0.3 * noise
    return model


def same(model, masks, small, *inputs, tolerance=1e-12):
    """Both on other inputs than those that `compact` compared."""
    dense = copy.deepcopy(model).eval()
    if masks is not None:
        Masks(masks).apply_(dense)
    with torch.no_grad():
        expected, found = dense(*inputs), small.model.eval()(*inputs)
    assert (expected[0] - expected[1]).abs().max() > 1e-6  # the output depends on the input
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def chain(bias=True):
    return nn.Sequential(
        nn.Linear(6, 12, bias=bias), nn.ReLU(), nn.Linear(12, 10, bias=bias), nn.Tanh(), nn.Linear(10, 3)
    )


class Image(nn.Module):
    def __init__(self, padding, norm=True):
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Conv2d(8, 6, 3, padding=padding)
        self.head = nn.Linear(6 * (4 if padding else 2) ** 2, 3)

    def forward(self, x):
        x = self.pool(torch.relu(self.norm(self.first(x))))
        return self.head(torch.relu(self.second(x)).flatten(1))


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.up = nn.ModuleList(nn.Linear(8, 10) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(10, 8) for _ in range(2))
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x):
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + self.scale * down(torch.relu(up(x)))
        return self.head(x)


class Attending(nn.Module):
    def __init__(self, kind="torch"):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = self.norm(self.first(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.encoder(x))
