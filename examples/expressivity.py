"""What does a pruned network listen to? Active inputs and units that see several inputs together, arXiv:2602.06675.

Prunes an MLP on images by every method at several sparsities and looks at the mask of the first layer: how many pixels
are cut off, how many hidden units are dead, how many units are joined to all of k pixels (counted, and as the graphon
of the layer expects), and which pixels a method listens to, as a picture. Writes the picture, `expressivity.csv` and
one small file for every network, so that a stopped run goes on where it was.

    python examples/expressivity.py
    python examples/expressivity.py --data mnist --data-root DIR
"""

import argparse
import csv
import warnings
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from graphon_convergence import network
from image_data import add_data_arguments, images
from resumable import finish
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_graphon.graphon import expressivity_table, layer_graphons, mean_common_neighbour_count
from lightning_graphon.plots import plot_input_density
from lightning_graphon.pruning import LayerCollapseWarning, Masks, prune

METHODS = ("random", "magnitude", "snip", "grasp", "synflow")
SIZES = (1, 2, 3)

# ---- one network


class Cell(NamedTuple):
    """One pruned network."""

    method: str
    sparsity: float
    trial: int

    @property
    def stem(self) -> str:
        """Name of its file."""
        return f"{self.method}_s{100 * self.sparsity:g}_t{self.trial}"


def masks_in_use(cell: Cell, args: argparse.Namespace) -> Masks:
    """The masks of one network, pruned on a batch of images."""
    torch.manual_seed(cell.trial)
    inputs, labels = images(args.data, args.data_root)
    chosen = torch.randperm(len(labels))[: args.samples]
    net = network(inputs.shape[1], args.width, args.layers, "ntk")
    batch = (inputs[chosen], labels[chosen])
    # Another seed than the weights': random scores from the same one would be the weights in disguise.
    return prune(net, cell.method, sparsity=cell.sparsity, batches=[batch], seed=10_000 + cell.trial)


def compute(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """The row of the table, and the share of units joined to each pixel."""
    masks = masks_in_use(cell, args)
    first = next(iter(masks))
    mask = masks[first]
    (row,) = expressivity_table({cell.stem: mask}, SIZES)
    graphon = layer_graphons(masks, order="joint", bins=args.bins)[first]
    row |= {f"expected_{k}": mean_common_neighbour_count(graphon, k, len(mask)) for k in SIZES}
    return row | {"cut_off": (~mask.any(0)).tolist(), "joined": mask.sum(0).tolist(), "units": len(mask)}


# ---- all networks, resumable

Results = dict[Cell, dict[str, Any]]


def run(args: argparse.Namespace, console: Console) -> Results:
    """Compute what is not there yet, then read everything."""
    setting = f"{args.data}_w{args.width}_l{args.layers}_{args.samples}samples_{args.bins}bins"
    folder = args.out / "cells" / setting
    grid = product(range(args.trials), args.sparsities, args.methods)
    cells = [Cell(method, sparsity, trial) for trial, sparsity, method in grid]
    return finish(
        folder,
        cells,
        stem=lambda c: c.stem,
        work=lambda c: compute(c, args),
        describe=lambda c: f"{c.method}, {c.sparsity:.0%} pruned",
        console=console,
        cost=lambda c: 20 if c.method == "synflow" else 1,  # measured
    )


# ---- what is written

MEANS = (
    "density",
    "active_inputs",
    "cut_off_inputs",
    "effective_inputs",
    "dead_units",
    *(f"{kind}_{k}" for k in SIZES for kind in ("joined", "expected")),
)


def rows(results: Results, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Means over the networks of each method and sparsity; of the covered order the ends over all of them."""
    found = []
    for sparsity, method in product(args.sparsities, args.methods):
        own = [results[Cell(method, sparsity, trial)] for trial in range(args.trials)]
        row: dict[str, Any] = {"sparsity": sparsity, "method": method, "trials": args.trials}
        row |= {name: sum(r[name] for r in own) / len(own) for name in MEANS}
        row |= {"covered_lower": min(r["covered_lower"] for r in own)}
        row |= {"covered_upper": max(r["covered_upper"] for r in own)}
        found.append(row)
    return found


def report(table: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    pixels = round(table[0]["active_inputs"] + table[0]["cut_off_inputs"])
    title = (
        f"First layer, {pixels} pixels to {args.width} units, {args.data}. k=1, 2, 3: units joined to all of k pixels"
    )
    shown = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=0)
    heads = ("pruned", "method", "kept", "active", "effective", "dead", "cover", "k=1", "k=2", "(exp.)", "k=3")
    for head in heads:
        shown.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
    for row in table:
        lower, upper = row["covered_lower"], row["covered_upper"]
        cells = [f"{row['sparsity']:.0%}", row["method"], f"{row['density']:.1%}", f"{row['active_inputs']:.0f}"]
        cells += [f"{row['effective_inputs']:.0f}", f"{row['dead_units']:.0f}"]
        cells += [str(lower) if lower == upper else f"{lower} to {upper}"]
        cells += [f"{row[name]:.1f}" for name in ("joined_1", "joined_2", "expected_2", "joined_3")]
        shown.add_row(*cells, end_section=row["method"] == args.methods[-1])
    return shown


def write_csv(table: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in table)


def draw(results: Results, args: argparse.Namespace, path: Path) -> None:
    """The heat map of the mean over all networks: rows of sparsities, columns of methods."""
    inputs, _ = images(args.data, args.data_root)
    side = round(inputs.shape[1] ** 0.5)
    pictures = {f"{s:.0%} pruned": {m: _stacked(results, m, s, args) for m in args.methods} for s in args.sparsities}
    title = f"Which pixels does the first layer listen to? {args.data}, {args.width} units, {args.trials} networks"
    figure = plot_input_density(pictures, (side, side), mean_image=inputs.mean(0), title=title)
    figure.savefig(path, dpi=100)


def _stacked(results: Results, method: str, sparsity: float, args: argparse.Namespace) -> Tensor:
    """One row of shares for each network, as a mask with fractional entries: their mean is what is drawn."""
    own = [results[Cell(method, sparsity, trial)] for trial in range(args.trials)]
    return torch.tensor([r["joined"] for r in own]) / own[0]["units"]


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--width", type=int, default=256, help="units in each hidden layer")
    parser.add_argument("--layers", type=int, default=3, help="hidden layers")
    parser.add_argument("--trials", type=int, default=2, help="networks (seeds) for each setting")
    parser.add_argument("--samples", type=int, default=512, help="images that snip and grasp see")
    parser.add_argument("--bins", type=int, default=64, help="of the hidden units, for the expected numbers")
    add_data_arguments(parser, "expressivity")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is missing, write picture and table; returns the rows of the table."""
    args = parse(argv)
    warnings.simplefilter("ignore", LayerCollapseWarning)  # an empty mask is seen in the table
    console = Console()
    results = run(args, console)
    table = rows(results, args)
    files = [args.out / name for name in ("expressivity.csv", "input_density.png")]
    write_csv(table, files[0])
    draw(results, args, files[1])
    console.print(report(table, args))
    console.print("Written:", *(str(file) for file in files), sep="\n  ")
    return table


if __name__ == "__main__":
    main()
