"""Does the tangent kernel predict how fast a sparse network trains? Figures 2 and 11 of arXiv:2510.17515.

Trains an MLP with four hidden layers that was pruned by every method, by SGD and by Adam, while `LossDecayMonitor`
draws its prediction beside the loss, and asks which number of the kernel at initialisation says best how fast the loss
falls: Spearman's correlation over methods, sparsities and seeds. Writes pictures, tables and one small file for every
network, so that a stopped run goes on where it was.

    python examples/loss_decay.py
    python examples/loss_decay.py --paper --data mnist --data-root DIR
    python examples/loss_decay.py --paper --sparsities 0.9 --seeds 1
"""

import argparse
import copy
import csv
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from graphon_convergence import network
from image_data import add_data_arguments, images
from loss_decay_figures import MEASURES, NAMES, draw_correlations, draw_curves, draw_scatter
from loss_decay_metrics import LABELS, Sample, kernel_metrics
from rank_correlation import Correlation, correlate
from resumable import Cell, dense_and_pruned, finish
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_graphon.callbacks import KernelPrediction, LossDecayMonitor, PruneAtInit
from lightning_graphon.pruning import LayerCollapseWarning, Masks

METHODS = ("random", "snip", "synflow")
OPTIMIZERS = ("sgd", "adam")
LAYERS = 4
SMALL: dict[str, Any] = {"width": 128, "sparsities": [0.5, 0.9], "seeds": 2}
PAPER: dict[str, Any] = {
    "width": 1024,
    "sparsities": [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95],
    "seeds": 3,
}
DATA = {"digits": "digits", "mnist": "MNIST"}
# Tables that fit 80 columns.
NARROW: dict[str, Any] = {"title_justify": "left", "box": box.SIMPLE_HEAD, "pad_edge": False, "padding": 0}
# A quarter of the largest stable rate of the dense network on MNIST: beyond that rate a kernel predicts nothing.
SGD_RATE = {"digits": 0.05, "mnist": 0.03}

# ---- one network


class Classifier(pl.LightningModule):
    """A network and its optimizer; nothing in it knows of pruning or of kernels."""

    def __init__(self, net: nn.Module, optimizer: str, rate: float) -> None:
        super().__init__()
        self.net, self.optimizer, self.rate = net, optimizer, rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[self.optimizer]
        return kind(self.parameters(), lr=self.rate)


def fit(cell: Cell, optimizer: str, args: argparse.Namespace) -> tuple[dict[str, Any], nn.Module, Masks | None]:
    """Prune and train; what the monitor saw, the dense network at initialisation, and its masks."""
    inputs, labels = images(args.data, args.data_root)
    torch.manual_seed(cell.seed)
    # He's initialisation: with PyTorch's default four hidden layers begin on a plateau, sparse or not.
    module = Classifier(network(inputs.shape[1], args.width, LAYERS, "he"), optimizer, rate(optimizer, args))
    initial = copy.deepcopy(module.net)
    # Another seed than the weights': random scores from the same one would be the weights in disguise.
    pruned = cell.method != "dense"
    prune = PruneAtInit(cell.method, cell.sparsity, seed=10_000 + cell.seed, verbose=False) if pruned else None
    monitor = LossDecayMonitor(
        predict="kernel",
        probe_size=args.probe,
        pool_size=args.pool,
        every_n_steps=10,
        figure=False,
        verbose=False,
        raise_errors=True,
        kernel=KernelPrediction(refresh_every_n_steps=50),
        time_budget=None,  # what is found must not depend on how fast the machine is
    )
    order = torch.Generator().manual_seed(cell.seed)
    loader = DataLoader(TensorDataset(inputs, labels), args.batch, shuffle=True, drop_last=True, generator=order)
    trainer = pl.Trainer(
        max_steps=args.steps,
        callbacks=[c for c in (prune, monitor) if c],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    masks = Masks({name.removeprefix("net."): mask for name, mask in prune.masks.items()}) if prune else None
    return observed(monitor), initial, masks


def rate(optimizer: str, args: argparse.Namespace) -> float:
    """Learning rate."""
    return args.adam_rate if optimizer == "adam" else args.sgd_rate or SGD_RATE[args.data]


def observed(monitor: LossDecayMonitor) -> dict[str, Any]:
    """Curves, and how well they agree; NaN is None in JSON."""
    curves = {name: values.numpy() for name, values in monitor.curves.items()}
    agreement = {key: float(value) for key, value in monitor.metric.compute().items()}
    found = {
        "predicted_fall": float(np.log(curves["observed"][0] / curves["predicted"][-1])),
        "refreshed_error": float(np.nanmean(np.abs(curves["refreshed"] / curves["observed"] - 1))),
        "invalid_from": monitor.invalid_from,
    }
    found |= {key: agreement[key] for key in ("relative_error", "relative_error_last", "rate_ratio")}
    return found | {"curves": {k: [None if np.isnan(x) else x for x in v.tolist()] for k, v in curves.items()}}


def probe(args: argparse.Namespace) -> Sample:
    """The samples of the kernel at initialisation, the same for all networks."""
    inputs, labels = images(args.data, args.data_root)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: args.probe]
    return Sample(inputs[chosen], labels[chosen], len(labels))


def compute(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Train by every optimizer, and measure the kernels at initialisation, which are the same for all of them."""
    start = time.perf_counter()
    fits = {optimizer: fit(cell, optimizer, args) for optimizer in OPTIMIZERS}
    _, initial, masks = fits["sgd"]
    metrics = kernel_metrics(initial, masks, probe(args), rate("sgd", args), args.steps)
    return {"metrics": metrics, "seconds": time.perf_counter() - start} | {o: found[0] for o, found in fits.items()}


# ---- all networks, resumable

Results = dict[Cell, dict[str, Any]]


def run(args: argparse.Namespace, console: Console) -> Results:
    """Compute what is not there yet, then read everything."""
    rates = f"{rate('sgd', args):g}sgd_{rate('adam', args):g}adam"
    setting = f"{args.data}_w{args.width}_{args.batch}batch_{args.probe}probe_{args.pool}pool_{args.steps}steps_{rates}"
    folder = args.out / "cells" / setting
    return finish(
        folder,
        dense_and_pruned(args.methods, args.sparsities, args.seeds),
        stem=lambda c: c.stem,
        work=lambda c: compute(c, args),
        describe=lambda c: c.description,
        console=console,
    )


# ---- which number says how fast the loss falls

Correlations = dict[tuple[str, str, str], Correlation]


def decay(curves: Mapping[str, list[float]]) -> dict[str, float]:
    """How fast the observed loss fell, by the keys of MEASURES, and its whole fall."""
    step, loss = np.array(curves["step"]), np.log(curves["observed"])
    return {
        "rate": -float(np.polyfit(step, loss, 1)[0]),
        "mean_fall": float((loss[0] - loss).mean()),
        "fall": float(loss[0] - loss[-1]),
    }


def correlations(results: Results) -> Correlations:
    """(optimizer, measure, metric) -> correlation of the number at initialisation with the observed decay."""
    points = dict.fromkeys(cell[:2] for cell in results)
    groups = np.array([sparsity for _, sparsity in points])
    by_point = [[r for cell, r in results.items() if cell[:2] == point] for point in points]
    found = {}
    for optimizer, measure in product(OPTIMIZERS, MEASURES):
        seen = np.array([[decay(r[optimizer]["curves"])[measure] for r in seeds] for seeds in by_point])
        for metric in numbers(next(iter(results.values())), optimizer):
            said = np.array([[numbers(r, optimizer)[metric] for r in seeds] for seeds in by_point])
            found[optimizer, measure, metric] = correlate(said, seen, groups)
    return found


def numbers(result: Mapping[str, Any], optimizer: str) -> dict[str, float]:
    """What is known at initialisation, and what the callback predicted: for Adam, at step 10."""
    return {**result["metrics"], "callback": result[optimizer]["predicted_fall"]}


# ---- what is written


def write_networks(results: Results, path: Path) -> None:
    """One row for each network and optimizer: what the kernel said and what was observed."""
    columns = ("relative_error", "relative_error_last", "rate_ratio", "refreshed_error", "invalid_from")
    rows = []
    for (cell, result), optimizer in product(results.items(), OPTIMIZERS):
        row: dict[str, Any] = {**cell._asdict(), "optimizer": optimizer}
        said = decay(result[optimizer]["curves"]) | {key: result[optimizer][key] for key in columns}
        rows.append(row | {key: _short(value) for key, value in (said | numbers(result, optimizer)).items()})
    _write(rows, path)


def write_correlations(found: Correlations, path: Path) -> None:
    """One row for each optimizer, measure of decay and number, the strongest correlation first."""
    order = sorted(found, key=lambda key: (key[0] != "sgd", key[1] != "rate", -abs(found[key].rho)))
    names = ("optimizer", "measure", "metric")
    rows = [dict(zip(names, key, strict=True)) | _rounded(found[key]) for key in order]
    _write(rows, path)


def _rounded(correlation: Correlation) -> dict[str, str]:
    return {name: f"{value:.3f}" for name, value in correlation._asdict().items()}


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def errors_table(results: Results, args: argparse.Namespace) -> Table:
    """How far the predictions of the callback are off."""
    table = Table("optimizer", "sparsity", "method", title="Predictions, means over seeds", **NARROW)
    for label in ("loss, step 0", "last", "predicted", "off", "refreshed, off", "held\nuntil"):
        table.add_column(label, justify="right")
    for optimizer, (method, sparsity) in product(OPTIMIZERS, dict.fromkeys(cell[:2] for cell in results)):
        chosen = [r[optimizer] for cell, r in results.items() if cell[:2] == (method, sparsity)]
        table.add_row(NAMES[optimizer], f"{sparsity:.0%}", method, *_row(chosen, args.steps))
    return table


def _row(chosen: list[dict[str, Any]], steps: int) -> Iterator[str]:
    yield from (f"{np.mean([c['curves']['observed'][end] for c in chosen]):.3f}" for end in (0, -1))
    yield f"{np.mean([c['curves']['predicted'][-1] for c in chosen]):.3f}"
    yield from (f"{np.mean([c[key] for c in chosen]):.1%}" for key in ("relative_error", "refreshed_error"))
    yield f"{np.mean([steps if c['invalid_from'] is None else c['invalid_from'] for c in chosen]):.0f}"


def correlations_table(found: Correlations) -> Table:
    """The exact kernel's numbers and those without a kernel; the Graphon NTK's are in the CSV."""
    title = "Spearman's ρ with the mean fall of log L: all networks [95 %], and inside a sparsity"
    table = Table("number at initialisation", title=title, **NARROW)
    for optimizer in OPTIMIZERS:
        table.add_column(NAMES[optimizer], justify="right", no_wrap=True)
        table.add_column("inside", justify="right")
    by_metric = {metric: [found[o, "mean_fall", metric] for o in OPTIMIZERS] for _, _, metric in found}
    for metric, both in sorted(by_metric.items(), key=lambda item: -abs(item[1][0].rho)):
        if not metric.startswith("graphon"):
            cells = [cell for c in both for cell in (f"{c.rho:.2f} [{c.low:.2f}, {c.high:.2f}]", _or_dash(c.inside))]
            table.add_row(LABELS[metric.removeprefix("exact ")], *cells)
    return table


def _or_dash(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; --paper changes the defaults only, so parts of the table can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--paper", action="store_true", help="the setting of the paper; hours, resumable")
    parser.add_argument("--width", type=int, help="neurons in each hidden layer")
    parser.add_argument("--sparsities", type=float, nargs="+", help="fraction of weights removed")
    parser.add_argument("--seeds", type=int, help="networks for each point")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=64, help="samples of a step")
    parser.add_argument("--probe", type=int, default=128, help="samples whose loss is predicted")
    parser.add_argument("--pool", type=int, default=512, help="other samples, which push them")
    parser.add_argument("--sgd-rate", type=float, help="learning rate; 0.05 on digits, 0.03 on MNIST")
    parser.add_argument("--adam-rate", type=float, default=0.001, help="learning rate; the paper's")
    add_data_arguments(parser, "loss_decay")
    parser.set_defaults(**(PAPER if parser.parse_args(argv).paper else SMALL))
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.probe < 5:
        parser.error("at least 1 seed and a probe of 5 samples are needed")
    if args.steps < 60:
        parser.error("at least 60 steps are needed: the prediction is refreshed at step 50")
    args.sparsities = sorted(set(args.sparsities))
    return args


def title(args: argparse.Namespace) -> str:
    """What the pictures are of."""
    return (
        f"MLP with {LAYERS} hidden layers of {args.width} on {DATA[args.data]}, batches of {args.batch}, "
        f"{args.seeds} seeds for each point"
    )


def main(argv: list[str] | None = None) -> Results:
    """Run what is missing, write figures and tables; returns what was found of every network."""
    args = parse(argv)
    warnings.simplefilter("ignore", LayerCollapseWarning)  # it is seen in the loss
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*GPU available but not used.*|.*LeafSpec.*")
    for name in ("lightning.pytorch", "lightning_graphon"):
        logging.getLogger(name).setLevel(logging.ERROR)  # that predictions cease to hold is in the tables
    console = Console()
    results = run(args, console)
    found = correlations(results)
    rates = {optimizer: rate(optimizer, args) for optimizer in OPTIMIZERS}
    names = ("curves.png", "correlations.png", "scatter.png", "networks.csv", "correlations.csv")
    files = [args.out / f"loss_decay_{name}" for name in names]
    draw_curves(results, rates, title(args), files[0])
    draw_correlations(found, title(args), files[1])
    seen = {(cell, o): decay(result[o]["curves"])["mean_fall"] for cell, result in results.items() for o in OPTIMIZERS}
    draw_scatter(results, seen, title(args), files[2])
    write_networks(results, files[3])
    write_correlations(found, files[4])
    console.print(errors_table(results, args))
    console.print(correlations_table(found))
    console.print("Written:", *(str(file) for file in files), sep="\n  ")
    return results


if __name__ == "__main__":
    main()
