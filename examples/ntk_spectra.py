"""What does a mask do to the tangent kernel? Figure 3 of arXiv:2510.17515: its spectrum against sparsity.

Prunes an MLP with four hidden layers by every method and measures four numbers of the spectrum of its tangent kernel:
of the Graphon NTK, which sees the density of weights only (the paper), their energy, or their drift, and of the exact
kernel of that very network. Writes a picture, `ntk_spectra.csv` and one small file for every network, so that a
stopped run goes on where it was.

    python examples/ntk_spectra.py
    python examples/ntk_spectra.py --paper --data mnist --data-root DIR
    python examples/ntk_spectra.py --paper --sparsities 0.9 --seeds 1
"""

import argparse
import csv
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from graphon_convergence import network
from image_data import add_data_arguments, images
from resumable import Cell, dense_and_pruned, finish
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_graphon.ntk import empirical_ntk, graphon_ntk_from_model, spectral_summary
from lightning_graphon.plots import new_figure
from lightning_graphon.pruning import LayerCollapseWarning, Masks, prune

METHODS = ("random", "magnitude", "snip", "grasp", "synflow")
SMALL: dict[str, Any] = {"width": 256, "samples": 256, "sparsities": [0.5, 0.8, 0.95], "seeds": 2}
PAPER: dict[str, Any] = {
    "width": 1024,
    "samples": 1024,
    "sparsities": [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95],
    "seeds": 3,
}
LAYERS = 4
KERNELS = {
    "density": "Graphon NTK, density\n(the paper: weights know nothing of the mask)",
    "energy": "Graphon NTK, energy\n(size of the kept weights)",
    "drift": "Graphon NTK, drift\n(size and mean of the kept weights)",
    "empirical": "exact kernel\nof the same network",
}
METRICS = {
    "decay_rate": "decay rate α\nof λ_k ∝ k^(−α)",
    "effective_rank": "effective rank\ntrace / λ₁",
    "spectral_gap": "spectral gap\nλ₁ / λ₂",
    "energy_concentration": "energy, top five\ntheir share of the trace",
}
EXTRA = ("trace", "lambda_max", "lambda_min")

# ---- one network


class Data(NamedTuple):
    """The samples of the kernel, the same for all networks, and the batch that SNIP and GraSP see, another one."""

    probe: Tensor
    batch: tuple[Tensor, Tensor]


def samples(args: argparse.Namespace, seed: int) -> Data:
    """Probe and scoring batch never overlap."""
    inputs, labels = images(args.data, args.data_root)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rest = order[args.samples :]
    chosen = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: args.batch]]
    return Data(inputs[order[: args.samples]].double(), (inputs[chosen], labels[chosen]))


def masked_network(cell: Cell, data: Data, args: argparse.Namespace) -> tuple[nn.Module, Masks | None]:
    """A network that was pruned in the NTK parameterisation, as plain Linear layers in float64, and its masks.

    All weights are standard normal when they are scored, so that global magnitude pruning sees no difference between
    layers; the factor sqrt(2 / inputs) of the forward pass then goes into the weights.
    """
    torch.manual_seed(cell.seed)
    inputs = data.probe.shape[1]
    scaled = network(inputs, args.width, LAYERS, "ntk")
    masks = None
    if cell.method != "dense":
        # Another seed than the weights': random scores from the same one would be the weights in disguise.
        masks = prune(scaled, cell.method, sparsity=cell.sparsity, batches=[data.batch], seed=10_000 + cell.seed)
    plain = network(inputs, args.width, LAYERS, "default").double()
    with torch.no_grad():
        for source, target in zip(scaled.parameters(), plain.parameters(), strict=True):
            target.copy_(source * (2 / source.shape[1]) ** 0.5)
    return plain, masks


def kernels(net: nn.Module, probe: Tensor, masks: Masks | None) -> Iterator[tuple[str, Tensor]]:
    """The kernels of KERNELS, all in the NTK parameterisation, one after the other."""
    options: dict[str, Any] = {"parameterization": "ntk", "weight_variance": 2.0}
    for propagate in ("density", "energy", "drift"):
        yield propagate, graphon_ntk_from_model(net, probe, masks, propagate=propagate, **options)
    yield "empirical", empirical_ntk(net, probe, masks=masks, **options)


def compute(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Kernel -> metrics, the density of every mask, and the seconds it took."""
    start = time.perf_counter()
    data = samples(args, cell.seed)
    net, masks = masked_network(cell, data, args)
    found: dict[str, Any] = {}
    for name, kernel in kernels(net, data.probe, masks):
        scalars = spectral_summary(kernel).scalars()
        found[name] = {key: scalars[key] for key in (*METRICS, *EXTRA)}
    density = [float(mask.float().mean()) for mask in masks.values()] if masks else []
    return found | {"density_of_masks": density, "seconds": time.perf_counter() - start}


# ---- all networks, resumable

Results = dict[Cell, dict[str, Any]]


def run(args: argparse.Namespace, console: Console) -> Results:
    """Compute what is not there yet, then read everything."""
    folder = args.out / "cells" / f"{args.data}_w{args.width}_{args.samples}samples_{args.batch}batch"
    return finish(
        folder,
        dense_and_pruned(args.methods, args.sparsities, args.seeds),
        stem=lambda c: c.stem,
        work=lambda c: compute(c, args),
        describe=lambda c: c.description,
        console=console,
        cost=_cost,
    )


def _cost(cell: Cell) -> float:
    """Relative time, for the time left: SynFlow prunes in a hundred rounds."""
    return 1.5 if cell.method == "synflow" else 1.0


# ---- what is written


def of_seeds(results: Results, method: str, sparsity: float, kernel: str, metric: str) -> np.ndarray:
    """One number for each seed."""
    chosen = [r for cell, r in results.items() if (cell.method, cell.sparsity) == (method, sparsity)]
    return np.array([result[kernel][metric] for result in chosen])


def spread(values: np.ndarray) -> float:
    """Standard deviation between seeds; NaN for one seed."""
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def write_csv(results: Results, path: Path) -> None:
    """One row for each method, sparsity and kernel."""
    rows = []
    for (method, sparsity), kernel in product(dict.fromkeys(cell[:2] for cell in results), KERNELS):
        row: dict[str, Any] = {"method": method, "sparsity": sparsity, "kernel": kernel}
        for metric in (*METRICS, *EXTRA):
            values = of_seeds(results, method, sparsity, kernel, metric)
            row |= {"seeds": len(values), metric: f"{values.mean():.5g}", f"{metric}_std": f"{spread(values):.3g}"}
        rows.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def report(results: Results, args: argparse.Namespace) -> Table:
    """Every metric of every kernel at the highest sparsity."""
    sparsity = max(args.sparsities)
    table = Table("method", title=f"Spectra at {sparsity:.0%} sparsity, by kernel", title_justify="left")
    for label in KERNELS:
        table.add_column(label, justify="right", no_wrap=True)
    for metric, label in METRICS.items():
        table.add_row(f"[bold]{label.splitlines()[0]}[/bold]")
        for method in ("dense", *args.methods):
            level = 0.0 if method == "dense" else sparsity
            numbers = (_number(of_seeds(results, method, level, kernel, metric)) for kernel in KERNELS)
            table.add_row(method, *numbers)
        table.add_section()
    return table


def _number(values: np.ndarray) -> str:
    error = f" ± {float(f'{spread(values):.1g}'):g}" if len(values) > 1 else ""
    return f"{float(f'{values.mean():.3g}'):g}{error}"


# ---- the figure

HALVES = (("density", "energy"), ("drift", "empirical"))


def draw(results: Results, args: argparse.Namespace, path: Path) -> None:
    """A row for each metric, a column for each kernel, a curve for each method."""
    figure, axes = new_figure(len(METRICS), len(KERNELS), cell=(3.1, 2.3))
    for (row, metric), (column, kernel) in product(enumerate(METRICS), enumerate(KERNELS)):
        _draw_curves(axes[row, column], partial(of_seeds, results, kernel=kernel, metric=metric), args)
        axes[row, column].set_title(KERNELS[kernel] if row == 0 else "", fontsize=9)
        axes[row, column].set_ylabel(METRICS[metric] if column == 0 else "", fontsize=9)
        axes[row, column].set_xlabel("sparsity (% of weights removed)" if row == len(METRICS) - 1 else "", fontsize=8)
    for (row, metric), half in product(enumerate(METRICS), HALVES):
        _share_y([axes[row, list(KERNELS).index(kernel)] for kernel in half], metric)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.suptitle(_title(args), fontsize=12)
    figure.savefig(path, dpi=100)


def _title(args: argparse.Namespace) -> str:
    return (
        "Spectrum of the tangent kernel at initialisation against sparsity\n"
        f"MLP with {LAYERS} hidden layers of {args.width} on {args.samples} images of {args.data}; "
        f"mean of {args.seeds} networks, bars and band: standard deviation between them\n"
        "the two columns on the left have one scale, magnified, and the two on the right another"
    )


def _draw_curves(axis: Any, values: Callable[[str, float], np.ndarray], args: argparse.Namespace) -> None:
    dense = values("dense", 0.0)
    axis.axhline(dense.mean(), color="0.3", lw=1, ls="--", label="dense")
    if args.seeds > 1:
        axis.axhspan(dense.mean() - spread(dense), dense.mean() + spread(dense), color="0.5", alpha=0.2, lw=0)
    for index, method in enumerate(args.methods):
        groups = [values(method, sparsity) for sparsity in args.sparsities]
        # Points of one sparsity stand side by side, so that their bars can be told apart.
        places = [100 * s + 0.5 * (index - (len(args.methods) - 1) / 2) for s in args.sparsities]
        bars = [spread(group) for group in groups] if args.seeds > 1 else None
        number = METHODS.index(method)
        style = {"color": f"C{number}", "marker": "os^vD"[number], "ms": 3.5, "lw": 1.2, "capsize": 2}
        axis.errorbar(places, [group.mean() for group in groups], bars, label=method, **style)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def _share_y(axes: list[Any], metric: str) -> None:
    """One scale for some kernels, logarithmic where the numbers span more than a factor of three."""
    low, high = (pick(axis.dataLim.intervaly[end] for axis in axes) for end, pick in enumerate((min, max)))
    logarithmic = metric != "energy_concentration" and 0 < 3 * low < high < float("inf")
    for axis in axes:
        if logarithmic:
            axis.set_yscale("log")
            axis.set_ylim(low / 1.2, high * 1.2)
            plain_ticks(axis)
        elif np.isfinite(high):
            axis.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def plain_ticks(axis: Any) -> None:
    """Ticks at 1, 2, 5 times powers of ten, written out."""
    low, high = axis.get_ylim()
    steps = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [step * 10.0**power for power in range(-3, 7) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:,.10g}" for tick in ticks])
    axis.minorticks_off()


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; --paper changes the defaults only, so parts of the table can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--paper", action="store_true", help="the setting of the paper; hours, resumable")
    parser.add_argument("--width", type=int, help="neurons in each hidden layer")
    parser.add_argument("--samples", type=int, help="images of the kernel")
    parser.add_argument("--sparsities", type=float, nargs="+", help="fraction of weights removed")
    parser.add_argument("--seeds", type=int, help="networks for each point")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, default=512, help="images that snip and grasp see")
    add_data_arguments(parser, "ntk_spectra")
    parser.set_defaults(**(PAPER if parser.parse_args(argv).paper else SMALL))
    args = parser.parse_args(argv)
    if args.samples < 5 or args.seeds < 1:
        parser.error("at least 5 samples and 1 seed are needed")
    args.sparsities = sorted(set(args.sparsities))
    return args


def main(argv: list[str] | None = None) -> Results:
    """Run what is missing, write figure and table; returns the metrics of every network."""
    args = parse(argv)
    warnings.simplefilter("ignore", LayerCollapseWarning)  # an empty mask is seen in the densities
    console = Console()
    results = run(args, console)
    files = [args.out / "ntk_spectra.csv", args.out / "ntk_spectra.png"]
    write_csv(results, files[0])
    draw(results, args, files[1])
    console.print(report(results, args))
    console.print("Written:", *(str(file) for file in files), sep="\n  ")
    return results


if __name__ == "__main__":
    main()
