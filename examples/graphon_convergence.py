"""Do masks converge to a graphon as the network widens? Figures 1 and 4 to 10 of arXiv:2510.17515.

Prunes MLPs of several widths by every method, with several seeds, estimates the graphon of every hidden layer, and
measures how far each one is from the mean graphon of the widest networks, beside the distance that chance alone would
give. Writes pictures, `distances.csv` and one small file for every network, so that a stopped run goes on where it was.

    python examples/graphon_convergence.py
    python examples/graphon_convergence.py --paper --data mnist --data-root DIR
    python examples/graphon_convergence.py --paper --sparsities 0.8 --layers 4
"""

import argparse
import csv
import time
import warnings
from collections.abc import Iterable, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from image_data import add_data_arguments, images
from resumable import finish
from rich.console import Console
from rich.table import Table
from scipy.stats import binom
from torch import Tensor, nn

from lightning_graphon.graphon import (
    StepGraphon,
    cut_distance,
    estimate_graphon,
    homogeneity_test,
    l2_distance,
    layer_graphons,
)
from lightning_graphon.plots import new_figure, plot_graphon_grid
from lightning_graphon.pruning import LayerCollapseWarning, prune

METHODS = ("random", "magnitude", "snip", "grasp", "synflow")
SMALL: dict[str, Any] = {"widths": [64, 128, 256, 512], "sparsities": [0.8], "layers": [4], "trials": 3}
PAPER: dict[str, Any] = {"widths": [100, 500, 1000, 2000], "sparsities": [0.7, 0.8, 0.9], "layers": [4, 5], "trials": 5}
ALPHA = 0.01

# ---- one network


class Cell(NamedTuple):
    """One network to prune; `layers` counts its hidden layers, so it has `layers - 1` square masks."""

    method: str
    width: int
    sparsity: float
    layers: int
    trial: int

    @property
    def stem(self) -> str:
        """Name of its file."""
        return f"{self.method}_w{self.width}_s{100 * self.sparsity:g}_l{self.layers}_t{self.trial}"


class ScaledLinear(nn.Linear):
    """A linear layer in the NTK parameterisation: standard normal weights, outputs times sqrt(2 / inputs)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (2 / self.in_features) ** 0.5


def network(inputs: int, width: int, layers: int, init: str) -> nn.Sequential:
    """A ReLU MLP without biases; `init` is "ntk", "he" (normal, variance 2 / inputs) or "default" (PyTorch's own)."""
    linear = ScaledLinear if init == "ntk" else nn.Linear
    sides = [inputs, *[width] * layers]
    hidden = [layer for a, b in pairwise(sides) for layer in (linear(a, b, bias=False), nn.ReLU())]
    net = nn.Sequential(*hidden, linear(width, 10, bias=False))
    if init == "he":
        for weight in net.parameters():
            nn.init.kaiming_normal_(weight)
    return net


def compute(cell: Cell, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Prune one network; graphon and homogeneity test of every square mask, as arrays."""
    start = time.perf_counter()
    torch.manual_seed(cell.trial)
    inputs, labels = images(args.data, args.data_root)
    chosen = torch.randperm(len(labels))[: args.samples]
    net = network(inputs.shape[1], cell.width, cell.layers, args.init)
    batch = (inputs[chosen], labels[chosen])
    masks = prune(net, cell.method, sparsity=cell.sparsity, batches=[batch], seed=cell.trial)
    hidden = dict(list(masks.items())[1:-1])
    tests = [homogeneity_test(mask, alpha=ALPHA) for mask in hidden.values()]
    graphons = list(layer_graphons(hidden, bins=args.bins).values())
    return {
        "values": torch.stack([g.values for g in graphons]).float().numpy(),
        "measure": graphons[0].row_measure.numpy(),
        "density": np.array([float(mask.float().mean()) for mask in masks.values()]),
        "dead": np.array([float((~mask.any(1)).float().mean()) for mask in hidden.values()]),
        "p_value": np.array([test.p_value for test in tests]),
        "c4_ratio": np.array([test.c4_ratio for test in tests]),
        "degree_cv": np.array([max(test.row_degree_cv, test.col_degree_cv) for test in tests]),
        "seconds": np.array(time.perf_counter() - start),
    }


# ---- all networks, resumable


def cells(args: argparse.Namespace) -> list[Cell]:
    """All networks, the narrow ones first."""
    grid = product(args.widths, args.layers, args.sparsities, args.methods, range(args.trials))
    return [Cell(method, width, sparsity, layers, trial) for width, layers, sparsity, method, trial in grid]


def run(args: argparse.Namespace, console: Console) -> dict[Cell, dict[str, np.ndarray]]:
    """Compute what is not there yet, then read everything."""
    folder = args.out / "cells" / f"{args.data}_{args.init}_{args.bins}bins_{args.samples}samples"
    return finish(
        folder,
        cells(args),
        stem=lambda c: c.stem,
        work=lambda c: compute(c, args),
        describe=lambda c: f"{c.method}, width {c.width}, {c.sparsity:.0%} pruned",
        console=console,
        cost=_cost,
        kind="npz",
    )


def _cost(cell: Cell) -> int:
    """Relative time, for the time left: weights times rounds, measured."""
    return cell.layers * cell.width**2 * (20 if cell.method == "synflow" else 1)


# ---- distances


class Point(NamedTuple):
    """All trials of one method at one width.

    `distance` and `floor` are [layers, trials, 3]: L2, lower and upper bound of the cut norm. The floor is the same
    computation on masks drawn from the mean graphon of the widest networks: what chance alone gives.
    """

    distance: np.ndarray
    floor: np.ndarray
    results: list[dict[str, np.ndarray]]
    graphons: list[StepGraphon]


Groups = dict[tuple[float, int, str], dict[int, Point]]


def analyse(results: Mapping[Cell, dict[str, np.ndarray]], args: argparse.Namespace) -> Groups:
    """(sparsity, hidden layers, method) -> width -> distances."""
    keys = list(product(args.sparsities, args.layers, args.methods))
    return {key: _points(key, results, args) for key in keys}


def _points(key: tuple[float, int, str], results: Mapping[Cell, dict[str, np.ndarray]], args: Any) -> dict[int, Point]:
    sparsity, layers, method = key
    trials = {
        width: [results[Cell(method, width, sparsity, layers, trial)] for trial in range(args.trials)]
        for width in args.widths
    }
    groups = [{w: [_graphon(r, layer) for r in rs] for w, rs in trials.items()} for layer in range(layers - 1)]
    distance = [distances(group) for group in groups]
    floor = [distances(drawn(mean(group[max(group)]), group, args.bins, layer)) for layer, group in enumerate(groups)]
    return {
        width: Point(
            np.array([d[width] for d in distance]),
            np.array([d[width] for d in floor]),
            trials[width],
            [mean(group[width]) for group in groups],
        )
        for width in args.widths
    }


def _graphon(result: Mapping[str, np.ndarray], layer: int) -> StepGraphon:
    measure = torch.from_numpy(result["measure"])
    return StepGraphon(torch.from_numpy(result["values"][layer]).double(), measure, measure)


def mean(graphons: Iterable[StepGraphon]) -> StepGraphon:
    """Mean of graphons on one grid."""
    graphons = list(graphons)
    values = torch.stack([g.values for g in graphons]).mean(0)
    return StepGraphon(values, graphons[0].row_measure, graphons[0].col_measure)


def distances(groups: Mapping[int, list[StepGraphon]]) -> dict[int, list[tuple[float, float, float]]]:
    """Width -> distance of every trial from the mean graphon of the widest networks.

    A trial of the widest network is compared with the mean of the other trials, not with itself.
    """
    widest = groups[max(groups)]
    references = {width: [mean(widest)] * len(group) for width, group in groups.items()}
    references[max(groups)] = [mean(g for g in widest if g is not own) for own in widest]
    return {
        width: [_distance(g, reference) for g, reference in zip(group, references[width], strict=True)]
        for width, group in groups.items()
    }


def _distance(a: StepGraphon, b: StepGraphon) -> tuple[float, float, float]:
    # Both are sorted by degree already.
    cut = cut_distance(a, b, align=False, restarts=16)
    return l2_distance(a, b, align=False), cut.lower, cut.upper


def drawn(source: StepGraphon, widths: Mapping[int, list[Any]], bins: int, layer: int) -> dict[int, list[StepGraphon]]:
    """As many masks as there are trials, drawn from one graphon at every width, and their estimates."""
    return {
        width: [
            estimate_graphon(source.sample((width, width), seed=1000 * layer + trial), bins)
            for trial in range(len(trials))
        ]
        for width, trials in widths.items()
    }


def verdict(points: Mapping[int, Point]) -> tuple[str, int, int]:
    """Of all masks of a method together, and how many of how many were rejected one by one.

    Random masks are rejected with probability ALPHA each: heterogeneous is a method with more rejections than such
    coins give with that same probability.
    """
    p_values = np.concatenate([result["p_value"] for point in points.values() for result in point.results])
    rejected, total = int((p_values <= ALPHA).sum()), len(p_values)
    by_chance = binom.sf(rejected - 1, total, ALPHA)
    return "heterogeneous" if by_chance <= ALPHA else "homogeneous", rejected, total


# ---- what is written


def write_csv(groups: Groups, path: Path) -> None:
    """One row for each method, sparsity, depth, width and hidden layer."""
    rows = [
        {"sparsity": sparsity, "hidden_layers": layers, "method": method, "width": width, "mask": layer + 2}
        | _numbers(point, layer)
        for (sparsity, layers, method), points in groups.items()
        for width, point in points.items()
        for layer in range(layers - 1)
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _numbers(point: Point, layer: int) -> dict[str, str]:
    distance, floor = point.distance[layer], point.floor[layer]
    numbers = {"trials": len(distance), "l2": distance[:, 0].mean(), "l2_std": distance[:, 0].std(ddof=1)}
    numbers |= {"cut_lower": distance[:, 1].mean(), "cut_upper": distance[:, 2].mean()}
    numbers |= {"l2_by_chance": floor[:, 0].mean(), "cut_lower_by_chance": floor[:, 1].mean()}
    numbers["density"] = np.mean([r["density"][layer + 1] for r in point.results])
    numbers |= {key: np.mean([r[key][layer] for r in point.results]) for key in ("dead", "c4_ratio", "degree_cv")}
    numbers["p_value_max"] = max(r["p_value"][layer] for r in point.results)
    numbers["p_value_min"] = min(r["p_value"][layer] for r in point.results)
    return {key: f"{value:.5g}" for key, value in numbers.items()}


def report_distances(groups: Groups, layers: int) -> Table:
    """One row a method: L2 distance at every width."""
    title = f"L2 distance to the widest networks' graphon: measured/by chance alone ({layers} hidden layers)"
    table = Table("pruned", "method", title=title, title_justify="left")
    for width in next(iter(groups.values())):
        table.add_column(f"width {width}", justify="right", no_wrap=True)
    for (sparsity, _, method), points in of_depth(groups, layers).items():
        numbers = (f"{p.distance[..., 0].mean():.3f}/{p.floor[..., 0].mean():.3f}" for p in points.values())
        table.add_row(f"{sparsity:.0%}", method, *numbers)
    return table


def report_taxonomy(groups: Groups, layers: int) -> Table:
    """One row a method: the verdict, and how large the unevenness is at the largest width."""
    title = f"Tests of all masks, sizes of the effect at the largest width ({layers} hidden layers)"
    table = Table("pruned", "method", "masks are", title=title, title_justify="left")
    for column in ("rejected", "C4 ratio", "degree CV", "dead"):
        table.add_column(column, justify="right", no_wrap=True)
    for (sparsity, _, method), points in of_depth(groups, layers).items():
        word, rejected, total = verdict(points)
        widest = points[max(points)].results
        ratio, spread, dead = (np.mean([r[key] for r in widest]) for key in ("c4_ratio", "degree_cv", "dead"))
        sizes = (f"{rejected}/{total}", f"{ratio:.2f}", f"{spread:.2f}", f"{dead:.0%}")
        table.add_row(f"{sparsity:.0%}", method, word, *sizes)
    return table


def of_depth(groups: Groups, layers: int) -> Groups:
    """Those with this number of hidden layers."""
    return {key: points for key, points in groups.items() if key[1] == layers}


def draw(groups: Groups, args: argparse.Namespace) -> list[Path]:
    """All figures; returns where they are."""
    drawn_files = []
    for layers in args.layers:
        for sparsity in args.sparsities:
            path = args.out / f"pictures_s{100 * sparsity:g}_l{layers}.png"
            draw_pictures(
                {m: groups[sparsity, layers, m] for m in args.methods}, _setting(sparsity, layers, args), path
            )
            drawn_files.append(path)
        for name, function in (("distances", draw_distances), ("taxonomy", draw_taxonomy)):
            path = args.out / f"{name}_l{layers}.png"
            function(of_depth(groups, layers), args, path)
            drawn_files.append(path)
    return drawn_files


def _setting(sparsity: float | None, layers: int, args: argparse.Namespace) -> str:
    share = f"{sparsity:.0%} of the weights pruned, " if sparsity is not None else ""
    return f"{share}MLPs with {layers} hidden layers on {args.data}, {args.trials} networks (seeds) each"


def _depth(groups: Groups) -> int:
    """The number of hidden layers of a selection that has one."""
    return next(iter(groups))[1]


def draw_pictures(points: Mapping[str, Mapping[int, Point]], setting: str, path: Path) -> None:
    """Mean graphons of the middle hidden mask: a row for each method, a column for each width."""
    layer = (len(next(iter(next(iter(points.values())).values())).graphons) - 1) // 2
    grid = {
        method: {f"mask {layer + 2}, width {width}": point.graphons[layer] for width, point in by_width.items()}
        for method, by_width in points.items()
    }
    title = f"Where a pruning method keeps weights, as the network widens (left to right)\n{setting}\n"
    title += "neurons sorted by degree: the best connected at the top left"
    plot_graphon_grid(grid, title=title).savefig(path, dpi=130)


LEGEND = (
    "L2 distance; bars: standard deviation between networks",
    "L2 distance by chance alone: masks drawn from one graphon at every width",
    "cut norm of the difference, between its two bounds",
    "cut norm by chance alone",
)


def draw_distances(groups: Groups, args: argparse.Namespace, path: Path) -> None:
    """Distance against width: a row for each sparsity, a column for each method."""
    figure, axes = new_figure(
        len(args.sparsities), len(args.methods), cell=(2.5, 2.4 if len(args.sparsities) > 1 else 3.2)
    )
    for (sparsity, _, method), points in groups.items():
        row, column = args.sparsities.index(sparsity), args.methods.index(method)
        axis = axes[row, column]
        _draw_curves(axis, points)
        axis.set_title(method if row == 0 else "", fontsize=10)
        axis.set_ylabel(f"{sparsity:.0%} pruned\ndistance (0 to 1)" if column == 0 else "", fontsize=8)
        axis.set_xlabel("width (neurons in a layer)" if row == len(args.sparsities) - 1 else "", fontsize=8)
    _share_y(axes)
    curves = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(
        [curves[label] for label in LEGEND], LEGEND, loc="outside lower center", ncols=2, fontsize=8, frameon=False
    )
    title = "Distance of a network's graphon from the mean graphon of the widest networks"
    figure.suptitle(f"{title}\n{_setting(None, _depth(groups), args)}, mean of the hidden masks", fontsize=11)
    figure.savefig(path, dpi=110)


def _draw_curves(axis: Any, points: Mapping[int, Point]) -> None:
    widths = list(points)
    trials = [point.distance.mean(0) for point in points.values()]
    chance = [point.floor.mean((0, 1)) for point in points.values()]
    mean_of, spread = np.array([t.mean(0) for t in trials]), np.array([t.std(0, ddof=1) for t in trials])
    axis.errorbar(widths, mean_of[:, 0], spread[:, 0], color="C0", marker="o", ms=4, capsize=3, label=LEGEND[0])
    axis.plot(widths, [c[0] for c in chance], color="C0", lw=0.8, ls="--", label=LEGEND[1])
    band = {"color": "C1", "alpha": 0.35, "label": LEGEND[2]}
    axis.fill_between(widths, mean_of[:, 1], mean_of[:, 2], **band)
    axis.plot(widths, mean_of[:, 1], color="C1", marker=".", ms=4, lw=1)
    axis.plot(widths, [c[1] for c in chance], color="C1", lw=0.8, ls="--", label=LEGEND[3])
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(widths, [str(width) for width in widths], fontsize=7)
    axis.minorticks_off()
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(alpha=0.3)


def _share_y(axes: Any) -> None:
    low = min(axis.get_ylim()[0] for axis in axes.flat)
    high = max(axis.get_ylim()[1] for axis in axes.flat)
    ticks = [t for t in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if low <= t <= high]
    for axis in axes.flat:
        axis.set_ylim(low, high)
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def draw_taxonomy(groups: Groups, args: argparse.Namespace, path: Path) -> None:
    """How far from random the masks are, against width: one curve a method, one panel a sparsity."""
    figure, axes = new_figure(1, len(args.sparsities), cell=(max(3.6, 6.5 / len(args.sparsities)), 4.2))
    for (sparsity, _, method), points in groups.items():
        ratios = [np.mean([result["c4_ratio"] for result in point.results]) for point in points.values()]
        axis = axes[0, args.sparsities.index(sparsity)]
        marker = "oxs^D"[METHODS.index(method)]  # random and magnitude lie on each other
        axis.plot(list(points), ratios, marker=marker, ms=6, label=f"{method}: {verdict(points)[0]}")
        axis.set_title(f"{sparsity:.0%} pruned", fontsize=10)
    for axis in axes.flat:
        axis.axhline(1, color="0.5", lw=0.8, ls="--")
        axis.set(xscale="log", yscale="log", xlabel="width (neurons in a layer)")
        axis.set_xticks(args.widths, [str(width) for width in args.widths], fontsize=7)
        axis.minorticks_off()
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("four-cycles over those of a random mask\n(1: as random)", fontsize=8)
    _share_y_ratio(axes)
    title = "Are the masks random (homogeneous) or structured (heterogeneous)?"
    figure.suptitle(f"{title}\n{_setting(None, _depth(groups), args)}", fontsize=11)
    figure.savefig(path, dpi=110)


def _share_y_ratio(axes: Any) -> None:
    high = max(axis.get_ylim()[1] for axis in axes.flat) * 1.5
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if t <= high]
    for axis in axes.flat:
        axis.set_ylim(0.9, high)
        axis.set_yticks(ticks, [str(tick) for tick in ticks])


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; --paper changes the defaults only, so parts of the table can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--paper", action="store_true", help="the whole table of the paper; hours, resumable")
    parser.add_argument("--widths", type=int, nargs="+", help="neurons in each hidden layer")
    parser.add_argument("--sparsities", type=float, nargs="+", help="fraction of weights removed")
    parser.add_argument("--layers", type=int, nargs="+", help="number of hidden layers")
    parser.add_argument("--trials", type=int, help="networks (seeds) for each setting, at least 2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--init", choices=["ntk", "he", "default"], default="ntk", help="of the weights")
    parser.add_argument("--samples", type=int, default=512, help="images that snip and grasp see")
    parser.add_argument("--bins", type=int, help="of a graphon; default: the largest up to 32 that divides all widths")
    add_data_arguments(parser, "graphon_convergence")
    parser.set_defaults(**(PAPER if parser.parse_args(argv).paper else SMALL))
    args = parser.parse_args(argv)
    if args.trials < 2 or min(args.layers) < 2 or len(set(args.widths)) < 2:
        parser.error("at least 2 trials, 2 hidden layers and 2 widths are needed for a distance")
    args.widths = sorted(set(args.widths))
    args.bins = args.bins or default_bins(args.widths)
    return args


def default_bins(widths: list[int]) -> int:
    """Equal bins at every width, so that all graphons have one grid; 32 or the smallest width where none fits."""
    fitting = [bins for bins in range(8, 33) if all(width % bins == 0 for width in widths)]
    return max(fitting, default=min(32, *widths))


def main(argv: list[str] | None = None) -> Groups:
    """Run what is missing, write figures and table; returns all distances."""
    args = parse(argv)
    warnings.simplefilter("ignore", LayerCollapseWarning)  # an empty mask is seen in the pictures
    console = Console()
    results = run(args, console)
    with console.status("distances, and what chance alone gives"):
        groups = analyse(results, args)
    write_csv(groups, args.out / "distances.csv")
    files = [args.out / "distances.csv", *draw(groups, args)]
    for layers in args.layers:
        console.print(report_distances(groups, layers), report_taxonomy(groups, layers), sep="\n")
    console.print("Written:", *(str(file) for file in files), sep="\n  ")
    return groups


if __name__ == "__main__":
    main()
