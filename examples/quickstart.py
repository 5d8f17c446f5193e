"""Prune one network with every method, train it, and see what is left: the demo of `make demo`.

Trains a 4-hidden-layer MLP on scikit-learn's digits (or MNIST) at 90 % sparsity by random, magnitude, SNIP, GraSP and
SynFlow pruning against the dense network. Prints a table, writes TensorBoard logs and one picture of all masks.

    python examples/quickstart.py
    python examples/quickstart.py --data mnist --data-root DIR
"""

import argparse
import logging
import warnings
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_graphon.callbacks import PruneAtInit
from lightning_graphon.plots import plot_masks
from lightning_graphon.pruning import Masks

METHODS = ("dense", "random", "magnitude", "snip", "grasp", "synflow")


class Classifier(pl.LightningModule):
    """An MLP with four hidden layers; nothing in it knows of pruning."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        sides = [inputs, width, width, width, width]
        hidden = [layer for a, b in pairwise(sides) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        outputs = self.net(batch[0])
        self.log("val/accuracy", (outputs.argmax(1) == batch[1]).float().mean(), prog_bar=True)
        self.log("val/loss", F.cross_entropy(outputs, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class LossAtStep(pl.Callback):
    """Loss over the whole training set after a given optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.loss = float("nan")

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if trainer.global_step == self.step:
            losses = [
                F.cross_entropy(pl_module.net(x.to(pl_module.device)), y.to(pl_module.device), reduction="sum")
                for x, y in DataLoader(trainer.train_dataloader.dataset, 1024)
            ]
            self.loss = float(torch.stack(losses).sum()) / len(trainer.train_dataloader.dataset)


def load_data(name: str, root: Path) -> tuple[TensorDataset, int]:
    """Images in [0, 1] with labels, and the number of pixels."""
    if name == "mnist":
        from torchvision.datasets import MNIST

        data = MNIST(root, train=True, download=True)
        return TensorDataset(data.data.float() / 255, data.targets), 784
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)), 64


def train(method: str, args: argparse.Namespace) -> tuple[Masks | None, float, float]:
    """Masks, validation accuracy, and training loss at step 50 of one method."""
    pl.seed_everything(args.seed, verbose=False)
    data, inputs = load_data(args.data, args.data_root)
    train_data, val_data = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    module = Classifier(inputs, args.width)
    prune = PruneAtInit(method, sparsity=args.sparsity, verbose=False) if method != "dense" else None
    loss = LossAtStep(50)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[c for c in (prune, loss) if c],
        logger=TensorBoardLogger(args.out, name=method, version=""),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator=args.accelerator,
        devices=1,
    )
    trainer.fit(module, DataLoader(train_data, 64, shuffle=True), DataLoader(val_data, 512))
    return (prune.masks if prune else None), float(trainer.callback_metrics["val/accuracy"]), loss.loss


def report(results: dict[str, tuple[Masks | None, float, float]]) -> Table:
    """One row a method: sparsity of each layer, accuracy, early loss."""
    table = Table(title="Every method on the same network, the same data and the same seed", title_justify="left")
    table.add_column("method")
    table.add_column("sparsity of each layer,\ninput to output (%)")
    table.add_column("accuracy,\nvalidation", justify="right")
    table.add_column("loss at step 50,\ntraining set", justify="right")
    for method, (masks, accuracy, loss) in results.items():
        sparsities = " ".join(f"{100 * row['sparsity']:5.1f}" for row in masks.table()) if masks else "none"
        table.add_row(method, sparsities, f"{accuracy:.1%}", f"{loss:.3f}")
    return table


def main(argv: list[str] | None = None) -> dict[str, tuple[Masks | None, float, float]]:
    """Run the demo; returns method -> (masks, accuracy, loss at step 50)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where torchvision keeps MNIST")
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of weights removed")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="TensorBoard logs and the picture")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*")

    console = Console()
    results = {}
    for method in METHODS:
        console.print(f"[bold]{method}[/bold]")
        results[method] = train(method, args)
    console.print(report(results))
    picture = args.out / "masks.png"
    title = f"Masks at {args.sparsity:.0%} sparsity, rows and columns sorted by degree ({args.data})"
    plot_masks({m: masks for m, (masks, _, _) in results.items() if masks}, title).savefig(picture, dpi=150)
    console.print(f"Picture of all masks: {picture}")
    console.print("Masks simulate sparsity: pruned weights stay zero, training is not faster by itself.")
    console.print(f"See the curves:  .venv/bin/tensorboard --logdir {args.out}   and open http://localhost:6006")
    return results


if __name__ == "__main__":
    main()
