"""Small modules for networks with branches."""

import torch
from torch import nn


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers):
        super().__init__()
        self.f = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.f(x)


class Beside(nn.Module):
    """Two branches, concatenated."""

    def __init__(self, left, right):
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x):
        return torch.cat([self.left(x), self.right(x)], 1)


class Function(nn.Module):
    """Any function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def conv(inputs, outputs, bias=False, **options):
    return nn.Conv2d(inputs, outputs, 3, bias=bias, **({"padding": 1} | options))


def linear(inputs, outputs, bias=False):
    return nn.Linear(inputs, outputs, bias=bias)
