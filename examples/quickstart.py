"""Prune one network with every method, predict its loss, train it, and see what is left: the demo of `make demo`.

Trains a 4-hidden-layer MLP on scikit-learn's digits (or MNIST) at 90 % sparsity by random, magnitude, SNIP, GraSP and
SynFlow pruning against the dense network. Prints a table, writes TensorBoard logs, and draws the masks, the graphons,
and the predicted against the observed loss of every method.

    python examples/quickstart.py
    python examples/quickstart.py --data mnist --data-root DIR
"""

import argparse
import logging
import warnings
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit
from lightning_graphon.plots import plot_graphon_grid, plot_loss_decays, plot_masks
from lightning_graphon.pruning import Masks

METHODS = ("dense", "random", "magnitude", "snip", "grasp", "synflow")
# A tenth of the weights passes on less than a third of the signal, in each of five layers, unless it takes over from
# the others; the other methods choose weights that pass it on.
RESCALED = ("random", "magnitude")


class Classifier(pl.LightningModule):
    """An MLP with four hidden layers; nothing in it knows of pruning."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        sides = [inputs, width, width, width, width]
        hidden = [layer for a, b in pairwise(sides) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))
        for layer in self.net:
            if isinstance(layer, nn.Linear):  # He et al. 2015: with torch's default little gets through four layers
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        outputs = self.net(batch[0])
        self.log("val/accuracy", (outputs.argmax(1) == batch[1]).float().mean(), prog_bar=True)
        self.log("val/loss", F.cross_entropy(outputs, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def load_data(name: str, root: Path) -> tuple[TensorDataset, int]:
    """Images in [0, 1] with labels, and the number of pixels."""
    if name == "mnist":
        from torchvision.datasets import MNIST

        data = MNIST(root, train=True, download=True)
        return TensorDataset(data.data.float() / 255, data.targets), 784
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)), 64


class Result(NamedTuple):
    """What one method left: masks, graphons, validation accuracy, predicted and observed loss."""

    masks: Masks | None
    monitor: GraphonMonitor
    accuracy: float
    decay: LossDecayMonitor


def train(method: str, args: argparse.Namespace) -> Result:
    """Prune and train by one method."""
    pl.seed_everything(args.seed, verbose=False)
    data, inputs = load_data(args.data, args.data_root)
    train_data, val_data = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    module = Classifier(inputs, args.width)
    rescale = "unit" if method in RESCALED else None
    prune = PruneAtInit(method, args.sparsity, rescale=rescale, verbose=False) if method != "dense" else None
    for old in (args.out / method).glob("events.out.tfevents.*"):
        old.unlink()  # of an earlier demo: TensorBoard would draw both into one curve
    monitor = GraphonMonitor(verbose=False)
    # These networks are small, so whole trainings are rehearsed; by default a hundredth or two of a training is.
    decay = LossDecayMonitor(
        predict=("kernel", "rehearsal", "sibling"), every_n_steps=20, verbose=False, time_budget=None
    )
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[c for c in (prune, monitor, decay) if c],
        logger=TensorBoardLogger(args.out, name=method, version=""),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator=args.accelerator,
        devices=1,
    )
    trainer.fit(module, DataLoader(train_data, 64, shuffle=True), DataLoader(val_data, 512))
    accuracy = float(trainer.callback_metrics["val/accuracy"])
    return Result(prune.masks if prune else None, monitor, accuracy, decay)


def report(results: dict[str, Result]) -> Table:
    """One row a method: sparsity of each layer, accuracy, loss, how long predictions held."""
    title = "Every method on the same network, the same data and the same seed"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("method")
    table.add_column("sparsity of each layer,\ninput to output (%)")
    table.add_column("accuracy,\nvalidation", justify="right")
    for column in ("theory\ntrusted until", "last loss,\nrehearsed", "last loss,\nobserved", "rehearsal\nheld until"):
        table.add_column(column, justify="right")
    for method, (masks, _, accuracy, decay) in results.items():
        sparsities = " ".join(f"{100 * row['sparsity']:.1f}" for row in masks.table()) if masks else "none"
        until = ["the end" if step is None else f"step {step}" for step in (decay.lazy_until, decay.invalid_from)]
        table.add_row(method, sparsities, f"{accuracy:.1%}", until[0], *last_losses(decay), until[1])
    return table


def last_losses(decay: LossDecayMonitor) -> tuple[str, str]:
    """Rehearsed and observed loss of the probe batch at the end of training."""
    rehearsed, observed = (float(decay.curves[name][-1]) for name in ("rehearsed", "observed"))
    return f"{rehearsed:.3f}", f"{observed:.3f}"


def draw(results: dict[str, Result], args: argparse.Namespace) -> None:
    """Masks, graphons with the verdict of the homogeneity test, and losses, of every method side by side."""
    pruned = {method: result for method, result in results.items() if result.masks}
    title = f"Masks at {args.sparsity:.0%} sparsity, rows and columns sorted by degree ({args.data})"
    plot_masks({m: r.masks for m, r in pruned.items()}, title).savefig(args.out / "masks.png", dpi=150)
    title = f"Layer graphons at {args.sparsity:.0%} sparsity, degree functions on the margins ({args.data})"
    graphons, tests = (
        {m: r.monitor.graphons for m, r in pruned.items()},
        {m: r.monitor.tests for m, r in pruned.items()},
    )
    plot_graphon_grid(graphons, tests, title).savefig(args.out / "graphons.png", dpi=150)
    curves = {method: read_curves(args.out / method) for method in results}
    decays = {method: result.decay for method, result in results.items()}
    rehearsals = {method: decay.predictions["rehearsal"] for method, decay in decays.items()}
    title = f"Loss of 128 training samples, predicted before training ({args.data}, {args.sparsity:.0%} pruned)"
    plot_loss_decays(
        curves,
        {method: decay.invalid_from for method, decay in decays.items()},
        title,
        bands={method: (r.steps, *r.band(0.1)) for method, r in rehearsals.items()},
        lazy_until={method: decay.lazy_until for method, decay in decays.items()},
    ).savefig(args.out / "loss_decay.png", dpi=150)


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Step -> loss, as the TensorBoard logs have it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    names = ("observed", "predicted", "rehearsed", "sibling", "power_law")
    logged = [name for name in names if f"loss_decay/{name}" in events.Tags()["scalars"]]
    return {name: {e.step: e.value for e in events.Scalars(f"loss_decay/{name}")} for name in logged}


def main(argv: list[str] | None = None) -> dict[str, Result]:
    """Run the demo; returns method -> result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where torchvision keeps MNIST")
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of weights removed")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=40)
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
    draw(results, args)
    console.print(f"Pictures: masks.png, graphons.png and loss_decay.png in {args.out}")
    console.print("Masks simulate sparsity: pruned weights stay zero, training is not faster by itself.")
    console.print(f"See the curves:  .venv/bin/tensorboard --logdir {args.out}   and open http://localhost:6006")
    console.print("It opens with a picture of predicted and observed loss for each method; the layers are under Text.")
    return results


if __name__ == "__main__":
    main()
