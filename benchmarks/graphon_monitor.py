"""What `GraphonMonitor` costs at its defaults.

Interleaved fits of a pruned MLP with and without it, processor time. With `--demo`: the fits of `make demo`, seconds in
the callback against seconds of the fit.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from _timing import machine
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_graphon.callbacks import GraphonMonitor, PruneAtInit


class Module(pl.LightningModule):
    """An MLP with four hidden layers."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        sides = [inputs, *[width] * 4]
        hidden = [layer for a, b in pairwise(sides) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


class TimedMonitor(GraphonMonitor):
    """The callback with a clock around its work."""

    seconds = 0.0
    clock = staticmethod(time.process_time)


def _timed(name: str) -> Any:
    def hook(self: TimedMonitor, *args: Any) -> None:
        start = self.clock()
        getattr(GraphonMonitor, name)(self, *args)
        self.seconds += self.clock() - start

    return hook


# Not `on_train_batch_end`: by default it compares a number with None, and a clock around it would cost more.
for _name in ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_end"):
    setattr(TimedMonitor, _name, _timed(_name))


def load(name: str, root: Path) -> TensorDataset:
    """Images as vectors in [0, 1] with labels."""
    if name == "mnist":
        from torchvision.datasets import MNIST

        data = MNIST(root, train=True, download=True)
        return TensorDataset(data.data[:48000].flatten(1).float() / 255, data.targets[:48000])
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))


def fit(data: TensorDataset, width: int, epochs: int, monitor: TimedMonitor | None) -> float:
    """Seconds of processor time of one fit, SNIP at 90 %, with TensorBoard."""
    torch.manual_seed(0)
    module = Module(data.tensors[0].shape[1], width)
    prune = PruneAtInit("snip", sparsity=0.9, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[prune, monitor] if monitor else [prune], accelerator="cpu", devices=1,
            logger=TensorBoardLogger(folder), log_every_n_steps=5, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        start = time.process_time()
        trainer.fit(module, DataLoader(data, 64, shuffle=True))
        return time.process_time() - start


def demo(epochs: int | None) -> None:
    """Every fit of `make demo` as it is, wall time."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import quickstart

    rows = []

    class Monitor(TimedMonitor):
        clock = staticmethod(time.perf_counter)

        def teardown(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
            rows.append((Path(trainer.logger.log_dir).name, self.seconds))

    class Trainer(pl.Trainer):
        def fit(self, *args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            super().fit(*args, **kwargs)
            rows[-1] = (*rows[-1], time.perf_counter() - start)

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(quickstart, "GraphonMonitor", Monitor),
        patch.object(quickstart.pl, "Trainer", Trainer),
    ):
        quickstart.main([*(["--epochs", str(epochs)] if epochs else []), "--out", folder])
    print(f"## GraphonMonitor in the demo\n\n{machine()}\n")
    print("| method | fit (s) | the callback (s) | share |\n|---|---|---|---|")
    for method, own, whole in [*rows, ("all", *(sum(row[i] for row in rows) for i in (1, 2)))]:
        print(f"| {method} | {whole:.2f} | {own:.3f} | {own / whole:.2%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true", help="the fits of `make demo`")
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where torchvision keeps MNIST")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, help="default: 15, or those of the demo")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*")
    if args.demo:
        demo(args.epochs)
        return
    data, epochs = load(args.data, args.data_root), args.epochs or 15
    without, monitored, monitors = [], [], []
    for _ in range(args.repeats + 1):  # the first of each loads what is loaded once
        monitors.append(TimedMonitor(verbose=False))
        without.append(fit(data, args.width, epochs, None))
        monitored.append(fit(data, args.width, epochs, monitors[-1]))
    own = median(1e3 * monitor.seconds for monitor in monitors[1:])
    base = median(without[1:])
    print(f"## GraphonMonitor, 4x{args.width} on {args.data}, {epochs} epochs, SNIP at 90 %\n\n{machine()}\n")
    print("| fit without, median (s) | with (s) | the callback itself, median (ms) | first in the process (ms) | |")
    print("|---|---|---|---|---|")
    share, first = own / base / 10, 1e3 * monitors[0].seconds
    print(f"| {base:.2f} | {median(monitored[1:]):.2f} | {own:.0f} | {first:.0f} | {share:.1f} % |")


if __name__ == "__main__":
    main()
