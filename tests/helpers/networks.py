"""Small networks with their losses and batches, shared by the tests. Everything is a thunk: call it for a fresh one."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """`build()` under a fixed seed; the global generator is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def classes(shape: tuple[int, ...], count: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Normal inputs of `shape` and class targets."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.arange(shape[0]) % count


def mlp(width: int = 16, depth: int = 3, bias: bool = True, inputs: int = 8, outputs: int = 4) -> nn.Sequential:
    """inputs - width - ... - width - outputs with ReLU; `depth` counts the linear layers."""
    sizes = [inputs, *[width] * (depth - 1), outputs]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """Two blocks with a skip connection and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.block(x)) + self.shortcut(x)
        return self.head(x.mean(dim=(2, 3)))


class Tied(nn.Module):
    """A token model whose output layer shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.body(self.embedding(tokens))))


class Transformer(nn.Module):
    """One encoder layer over a short sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    """An LSTM or a GRU over a short sequence."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(8, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class TwoInputs(nn.Module):
    """A bilinear layer of the two halves of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(4, 4, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x[:, :4], x[:, 4:]))


def _batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 9, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(8, 4),
    )


def _grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(3 * 16, 4),
    )


def _conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 2, 3), nn.Flatten(), nn.Linear(2 * 8, 4))


def _conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2), nn.Flatten(), nn.Linear(2 * 64, 4))


def _frozen() -> nn.Module:
    net = mlp()
    net[0].requires_grad_(False)
    return net


@dataclass(frozen=True)
class Case:
    """A network and what it is trained on."""

    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Any, Any]]
    loss_fn: Callable[[Any, Any], Tensor] | None = None

    def model(self, seed: int = 0) -> nn.Module:
        """A fresh network, the same for the same seed."""
        return seeded(self.build, seed)

    def batches(self) -> list[tuple[Any, Any]]:
        """Two batches."""
        inputs, targets = self.data()
        half = len(targets) // 2
        return [(inputs[:half], targets[:half]), (inputs[half:], targets[half:])]

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The case's loss, cross-entropy unless it has its own."""
        return (self.loss_fn or nn.functional.cross_entropy)(outputs, targets)


def _tokens() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(11, (32,), generator=torch.Generator().manual_seed(3))
    return tokens, (tokens + 1) % 11


CASES: dict[str, Case] = {
    "mlp": Case(mlp, lambda: classes((32, 8))),
    "batchnorm": Case(_batchnorm, lambda: classes((32, 2, 5, 5))),
    "residual": Case(Residual, lambda: classes((32, 2, 5, 5))),
    "grouped": Case(_grouped, lambda: classes((32, 2, 5, 5))),
    "conv1d": Case(_conv1d, lambda: classes((32, 2, 8))),
    "conv3d": Case(_conv3d, lambda: classes((32, 2, 4, 4, 4))),
    "tied": Case(Tied, _tokens),
    "frozen": Case(_frozen, lambda: classes((32, 8))),
    "transformer": Case(Transformer, lambda: classes((16, 5, 8))),
    "lstm": Case(Recurrent, lambda: classes((16, 5, 8))),
    "gru": Case(lambda: Recurrent(nn.GRU), lambda: classes((16, 5, 8))),
    "bilinear": Case(TwoInputs, lambda: classes((32, 8))),
}
