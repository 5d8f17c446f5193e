"""What the callbacks cost at their defaults: fits of five networks without, with each of them and with all.

A fit lasts about `--seconds`, its number of steps found by measuring a step. The fits of a round follow each other in
one process of one thread, and a ratio is that of a fit to the one without callbacks of the same round. Wall time, and
the process's own time, which other work on the machine disturbs less.
"""

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import lightning.pytorch as pl
import torch
from _timing import machine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit
from lightning_graphon.callbacks._analysis.time_budget import TimeBudget

_MEASURED = 20  # steps of the fit that says how long a step takes


class Module(pl.LightningModule):
    """A network, its loss of (outputs, targets), and Adam."""

    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class MinGPT(nn.Module):
    """Embeddings, two blocks of causal attention, scores of all words."""

    def __init__(self, words: int, length: int, width: int = 48, blocks: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.zeros(1, length, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.scores = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, words, bias=False))

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        scores: Tensor = self.scores(x).flatten(0, 1)
        return scores


class UNet(nn.Module):
    """Two levels down and up again, batch norm, class scores of each pixel."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.first, self.down = _convolutions(3, width), _convolutions(width, 2 * width)
        self.up, self.last = nn.ConvTranspose2d(2 * width, width, 2, 2), _convolutions(2 * width, width)
        self.scores = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        down = self.down(F.max_pool2d(first, 2))
        scores: Tensor = self.scores(self.last(torch.cat([self.up(down), first], 1)))
        return scores


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    sides = ((inputs, outputs), (outputs, outputs))
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(i, o, 3, 1, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in sides))


def _resnet18() -> nn.Module:
    """For images of 32 x 32."""
    import torchvision

    net = torchvision.models.resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


def case(name: str) -> tuple[Module, DataLoader[tuple[Tensor, ...]]]:
    """A module and its data, random numbers of a fixed seed."""
    torch.manual_seed(0)
    if name == "autoencoder":  # of Lightning's introduction
        encoder = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 3))
        decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 784))
        x = torch.rand(20_000, 784)
        return Module(nn.Sequential(encoder, decoder), F.mse_loss), DataLoader(TensorDataset(x, x), 32, True)
    if name == "minGPT":
        words = torch.randint(30, (4096, 9))
        module = Module(MinGPT(30, 8), lambda scores, y: F.cross_entropy(scores, y.flatten()))
        return module, DataLoader(TensorDataset(words[:, :-1], words[:, 1:]), 32, True)
    if name == "UNet":
        pixels = TensorDataset(torch.randn(256, 3, 64, 64), torch.randint(19, (256, 64, 64)))
        return Module(UNet(19), F.cross_entropy), DataLoader(pixels, 8, True)
    if name == "ResNet-18":
        images = TensorDataset(torch.randn(512, 3, 32, 32), torch.randint(10, (512,)))
        return Module(_resnet18(), F.cross_entropy), DataLoader(images, 32, True)
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    rows = TensorDataset(torch.randn(20_000, 784), torch.randint(10, (20_000,)))
    return Module(nn.Sequential(*layers), F.cross_entropy), DataLoader(rows, 64, True)


CASES = ("autoencoder", "minGPT", "UNet", "ResNet-18", "MLP")
CALLBACKS: dict[str, Callable[[], list[pl.Callback]]] = {
    "none": list,
    "PruneAtInit": lambda: [_pruning()],
    "GraphonMonitor": lambda: [GraphonMonitor()],
    "LossDecayMonitor": lambda: [LossDecayMonitor()],
    "all": lambda: [_pruning(), GraphonMonitor(), LossDecayMonitor()],
}


def _pruning() -> PruneAtInit:
    return PruneAtInit("magnitude", sparsity=0.9)


@dataclass
class Fits:
    """Of one network with the same callbacks; one entry per round."""

    wall: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    allowed: list[float] = field(default_factory=list)
    computed: str = ""


class Computed(pl.Callback):
    """Says at the end what the monitors have computed; in front of them, as they forget it then."""

    said = ""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        parts = []
        for monitor in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(monitor, GraphonMonitor):
                kernel = monitor._kernel
                parts.append(f"{len(monitor.graphons)} graphons; {kernel.source if kernel else 'no spectrum'}")
            if isinstance(monitor, LossDecayMonitor):
                until = [f"{name} to step {made.until}" for name, made in monitor.predictions.items()]
                parts.append(f"{' and '.join(until) or 'no prediction'}, {len(monitor.curves['step'])} looks")
        self.said = "; ".join(parts)


def fit(name: str, steps: int, callbacks: list[pl.Callback], into: Fits) -> None:
    """One fit in a folder that is thrown away."""
    module, data = case(name)
    computed = Computed()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = pl.Trainer(
            max_steps=steps, callbacks=[computed, *callbacks], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        wall, own = time.perf_counter(), time.process_time()
        trainer.fit(module, data)
        into.wall.append(time.perf_counter() - wall)
        into.own.append(time.process_time() - own)
    budget = TimeBudget.of(trainer)
    into.spent.append(budget.spent)
    into.allowed.append(budget.allowed)
    into.computed = computed.said


def measure(name: str, seconds: float, rounds: int) -> None:
    """Print the rows of one network."""
    trial = Fits()
    for _ in range(2):  # the first holds what is done once in a process
        fit(name, _MEASURED, [], trial)
    steps = max(_MEASURED, round(seconds * _MEASURED / trial.wall[-1]))
    fits = {kind: Fits() for kind in CALLBACKS}
    for _ in range(rounds):
        for kind, make in CALLBACKS.items():
            fit(name, steps, make(), fits[kind])
    base = fits["none"]
    for kind, f in fits.items():
        wall, own = (
            median(a / b for a, b in zip(*pair, strict=True)) for pair in ((f.wall, base.wall), (f.own, base.own))
        )
        budget = f"{median(f.spent):.2f} of {median(f.allowed):.2f}" if f.spent[0] else "–"
        print(
            f"| {name}, {steps} steps | {kind} | {median(f.wall):.1f} | {median(f.own):.1f} | {wall:.3f} | {own:.3f} "
            f"| {budget} | {f.computed} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a fit without callbacks")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.basicConfig(format="<!-- %(message)s -->")
    warnings.filterwarnings("ignore")
    print(f"## Callbacks at their defaults, fits of about {args.seconds:.0f} s\n\n{machine()}\n")
    print("| network | callbacks | wall (s) | own (s) | ratio, wall | ratio, own | monitors (s) | what was computed |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.cases:
        measure(name, args.seconds, args.rounds)


if __name__ == "__main__":
    main()
