"""Do masks tend to the graphon that the factorised saliency model predicts? Convergence and taxonomy, arXiv:2602.06675.

Prunes networks with one hidden layer whose input dimension and width grow together: images are resized to more and
more pixels and there are as many hidden units as pixels. For the mask of the first layer it computes the predicted
limit twice, from what is known of the two sides of the scores and from factors fitted to the scores alone, and measures
how far the mask's graphon is from it, beside the distance that chance alone would give. Writes pictures, two tables and
one small file for every network, so that a stopped run goes on where it was.

    python examples/predicted_limits.py
    python examples/predicted_limits.py --paper --data mnist --data-root DIR
"""

import argparse
import csv
import time
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from graphon_convergence import ScaledLinear, mean
from image_data import add_data_arguments, images
from resumable import finish
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon.graphon import (
    FactorisedSaliency,
    ScaledSaliency,
    StepGraphon,
    cut_distance,
    estimate_graphon,
    fit_factorised_saliency,
    homogeneity_test,
    l2_distance,
    predicted_graphons,
)
from lightning_graphon.graphon.limits.scaled_saliency import common_threshold
from lightning_graphon.plots import new_figure, plot_graphon_grid
from lightning_graphon.pruning import Masks, ScoringContext, prune
from lightning_graphon.pruning.scoring.registry import get_method

# Label -> name of the method, rounds, options.
METHODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "random": ("random", 1, {}),
    "magnitude": ("magnitude", 1, {}),
    "snip": ("snip", 1, {}),
    "grasp": ("grasp", 1, {"absolute": True}),
    "px-1": ("px", 1, {}),
    "synflow-l2-1": ("synflow-l2", 1, {}),
    "synflow-1": ("synflow", 1, {}),
    "synflow-100": ("synflow", 100, {}),
}
SMALL: dict[str, Any] = {"sides": [8, 16, 24], "trials": 2}
PAPER: dict[str, Any] = {"sides": [8, 16, 32, 64], "trials": 3}
FIRST, LAST = "0.weight", "2.weight"
ALPHA = 0.01
DRAWS = 4  # masks of chance for each network: their mean distance is certain to about 5 %

# ---- one network


class Cell(NamedTuple):
    """One network: side² pixels, side² hidden units, ten outputs."""

    method: str
    side: int
    trial: int

    @property
    def size(self) -> int:
        """Number of inputs, and of hidden units."""
        return self.side**2

    @property
    def stem(self) -> str:
        """Name of its file."""
        return f"{self.method}_side{self.side}_t{self.trial}"


class Readout(nn.Linear):
    """Standard normal weights, outputs divided by the number of inputs.

    With this mean-field scale the outputs of an untrained network vanish as it widens. With the usual 1 / √inputs they
    stay random however wide it is, so would the errors on the data, and SNIP's limit would be a random graphon.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / self.in_features


def network(size: int) -> nn.Sequential:
    return nn.Sequential(ScaledLinear(size, size, bias=False), nn.ReLU(), Readout(size, 10, bias=False))


def batch(cell: Cell, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images of side × side pixels: samples of the same functions on the unit square, ever finer."""
    inputs, labels = images(args.data, args.data_root)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: args.samples]
    pixels = round(inputs.shape[1] ** 0.5)
    square = inputs[chosen].view(-1, 1, pixels, pixels)
    resized = F.interpolate(square, size=(cell.side, cell.side), mode="bilinear", align_corners=False)
    return resized.flatten(1), labels[chosen]


class Recorder:
    """A pruning method that remembers the scores of its last round and what the readout then sent back."""

    def __init__(self, label: str) -> None:
        name, self.rounds, self.options = METHODS[label]
        self.score = get_method(name).score
        self.__name__ = label

    def __call__(self, problem: ScoringContext) -> dict[str, Tensor]:
        self.scores: dict[str, Tensor] = self.score(problem, **self.options)
        self.returned = problem.weights[LAST].detach().abs().double().sum(0)  # sum over paths from the outputs
        return self.scores


def known_probabilities(recorder: Recorder, net: nn.Sequential, masks: Masks, args: argparse.Namespace) -> Tensor:
    """P(kept) of each weight from what is known of the scores, not of the mask (SynFlow's rounds: at its threshold)."""
    method, weights = recorder.__name__, {name: p.detach().abs() for name, p in net.named_parameters()}
    if method in ("random", "magnitude"):
        return torch.full(net[0].weight.shape, 1 - args.sparsity, dtype=torch.float64)
    if method == "synflow-100":
        # The threshold on |w| of a unit only rises from round to round, so the last round decides.
        # Up to a factor of the whole layer these are the scores of the last round.
        model = FactorisedSaliency(recorder.returned, torch.ones(net[0].in_features), weights[FIRST])
        threshold = float((weights[FIRST] * recorder.returned[:, None])[masks[FIRST]].min())
        return model.probabilities(threshold)
    if method in ("px-1", "synflow-l2-1"):  # a factor of the output times one of the input times w², exactly
        weights = {name: w.double().square() for name, w in weights.items()}
    models = {
        name: ScaledSaliency((recorder.scores[name].double() / w).nan_to_num(0.0, 0.0), w)
        for name, w in weights.items()
    }
    return models[FIRST].probabilities(common_threshold(list(models.values()), 1 - args.sparsity))


def fitted_limit(recorder: Recorder, args: argparse.Namespace) -> tuple[StepGraphon, FactorisedSaliency]:
    """The limit from factors fitted to the scores of the one round."""
    models = {name: fit_factorised_saliency(score) for name, score in recorder.scores.items()}
    return predicted_graphons(dict(models), args.sparsity, bins=args.bins)[FIRST], models[FIRST]


def graphons(mask: Tensor, probabilities: Tensor, seed: int, bins: int) -> dict[str, Tensor]:
    """Cells of the mask, of its limit, and of masks that chance alone gives, each sorted for itself and as expected.

    Chance draws every weight from its own probability. The limit's cells would not do: inside a cell units differ, and
    by their own degrees they are sorted a little wrong.
    """
    source = torch.Generator().manual_seed(seed)
    shape = probabilities.shape
    drawn = [torch.rand(shape, generator=source, dtype=probabilities.dtype) < probabilities for _ in range(DRAWS)]
    rows, cols = (probabilities.sum(axis).argsort(descending=True, stable=True) for axis in (1, 0))

    def sorted_alike(matrix: Tensor) -> Tensor:
        return estimate_graphon(matrix[rows][:, cols], bins, order="none").values

    return {
        "found": estimate_graphon(mask, bins).values,
        "known": estimate_graphon(probabilities, bins).values,
        "drawn": torch.stack([estimate_graphon(one, bins).values for one in drawn]),
        "found_placed": sorted_alike(mask),
        "known_placed": sorted_alike(probabilities),
        "drawn_placed": torch.stack([sorted_alike(one) for one in drawn]),
    }


def compute(cell: Cell, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Prune one network; its graphon, its predicted limits and the test of homogeneity, as arrays."""
    start = time.perf_counter()
    torch.manual_seed(cell.trial)
    net, recorder = network(cell.size), Recorder(cell.method)
    # Another seed than the weights': random scores from the same one would be the weights in disguise.
    options: dict[str, Any] = {"sparsity": args.sparsity, "steps": recorder.rounds, "seed": 10_000 + cell.trial}
    masks = prune(net, recorder, batches=[batch(cell, args)], **options)
    test = homogeneity_test(masks[FIRST], alpha=ALPHA)
    numbers = {"p_value": test.p_value, "c4_ratio": test.c4_ratio, "density": float(masks[FIRST].double().mean())}
    arrays = graphons(masks[FIRST], known_probabilities(recorder, net, masks, args), 1000 + cell.trial, args.bins)
    if recorder.rounds == 1:
        limit, model = fitted_limit(recorder, args)
        arrays["fitted"] = limit.values
        numbers |= {"explained": model.explained, "noise_ks": model.noise_ks}
    numbers["seconds"] = time.perf_counter() - start
    return {k: v.numpy() for k, v in arrays.items()} | {k: np.array(v) for k, v in numbers.items()}


# ---- all networks, resumable

Results = dict[Cell, dict[str, np.ndarray]]


def cells(args: argparse.Namespace) -> list[Cell]:
    """All networks, the small ones first."""
    grid = product(args.sides, range(args.trials), args.methods)
    return [Cell(method, side, trial) for side, trial, method in grid]


def run(args: argparse.Namespace, console: Console) -> Results:
    """Compute what is not there yet, then read everything."""
    folder = args.out / "cells" / f"{args.data}_s{100 * args.sparsity:g}_{args.bins}bins_{args.samples}samples"
    return finish(
        folder,
        cells(args),
        stem=lambda c: c.stem,
        work=lambda c: compute(c, args),
        describe=lambda c: f"{c.method}, {c.size} inputs and units",
        console=console,
        cost=lambda c: c.size**2 * (10 if METHODS[c.method][1] > 1 else 1),  # measured
        kind="npz",
    )


# ---- distances

DISTANCES = {
    "known": "from its own limit, scales known",
    "fitted": "from its own limit, factors fitted to the scores",
    "other": "from the limit of the largest other networks",
    "chance": "chance alone: masks drawn by the known probabilities",
    "placed": "from its own limit, both in the order of expected degrees",
    "placed_chance": "chance alone, in that order",
}


def distances(results: Results, cell: Cell, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Of one network's mask: name -> (L2, lower bound of the cut norm), where there is such a prediction."""
    result = results[cell]
    found = _graphon(result["found"])
    targets = {name: _graphon(result[name]) for name in ("known", "fitted") if name in result}
    others = [c for c in results if c.method == cell.method and c.side == args.sides[-1] and c.trial != cell.trial]
    if others:
        grid = _graphon(np.zeros_like(result["found"]))
        limits = [_graphon(results[c]["known"]) for c in others]
        targets["other"] = mean(limit.rebin(grid.row_measure, grid.col_measure) for limit in limits)
    measured = {name: _distance(found, target) for name, target in targets.items()}
    measured["placed"] = _distance(_graphon(result["found_placed"]), _graphon(result["known_placed"]))
    for name, drawn, limit in (("chance", "drawn", "known"), ("placed_chance", "drawn_placed", "known_placed")):
        pairs = [_distance(_graphon(one), _graphon(result[limit])) for one in result[drawn]]
        measured[name] = (fmean(l2 for l2, _ in pairs), fmean(cut for _, cut in pairs))
    return measured


def _graphon(values: np.ndarray) -> StepGraphon:
    return StepGraphon(torch.from_numpy(values))


def _distance(a: StepGraphon, b: StepGraphon) -> tuple[float, float]:
    # Both are sorted by degree already.
    return l2_distance(a, b, align=False), cut_distance(a, b, align=False, restarts=16).lower


Table3 = dict[tuple[str, int], dict[str, np.ndarray]]


def analyse(results: Results, args: argparse.Namespace) -> Table3:
    """(method, side) -> name of the distance -> [trials, 2]: L2 and cut norm."""
    table: Table3 = {}
    for method, side in product(args.methods, args.sides):
        trials = [distances(results, Cell(method, side, trial), args) for trial in range(args.trials)]
        table[method, side] = {name: np.array([t[name] for t in trials]) for name in trials[0]}
    return table


def rows(results: Results, table: Table3, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each method and size: mean distances, fit, and the test of homogeneity."""
    found = []
    for (method, side), measured in table.items():
        own = [results[Cell(method, side, trial)] for trial in range(args.trials)]
        row: dict[str, Any] = {"method": method, "size": side**2, "trials": args.trials}
        for name in DISTANCES:
            for index, norm in enumerate(("l2", "cut")):
                row[f"{norm}_{name}"] = f"{measured[name][:, index].mean():.5f}" if name in measured else ""
        for name in ("explained", "noise_ks", "density", "c4_ratio"):
            row[name] = f"{np.mean([r[name] for r in own]):.5g}" if name in own[0] else ""
        row["smallest_p"] = f"{min(float(r['p_value']) for r in own):.3g}"
        row["rejected"] = sum(float(r["p_value"]) <= ALPHA for r in own)
        # Of all the networks of a method a fraction ALPHA is rejected by chance: half of them is not chance.
        row["verdict"] = "heterogeneous" if row["rejected"] > args.trials / 2 else "homogeneous"
        found.append(row)
    return found


# ---- what is written


def report(table: list[dict[str, Any]]) -> Table:
    title = "L2 distance of a mask's graphon from its predicted limit, and the taxonomy"
    shown = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=0)
    columns = {
        "method": "method",
        "size": "inputs",
        "l2_known": "known",
        "l2_fitted": "fitted",
        "l2_other": "other",
        "l2_chance": "chance",
        "c4_ratio": "C4",
        "smallest_p": "p",
        "verdict": "verdict",
    }
    for name, title in columns.items():
        shown.add_column(title, justify="left" if name in ("method", "verdict") else "right", no_wrap=True)
    for row in table:
        cells = {name: row[name] if row[name] == "" else f"{float(row[name]):.4f}" for name in row if name[:3] == "l2_"}
        cells["c4_ratio"] = f"{float(row['c4_ratio']):.1f}"
        shown.add_row(*(str((row | cells)[name]) for name in columns), end_section=row["size"] == table[-1]["size"])
    return shown


def write_csv(table: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def setting(args: argparse.Namespace) -> str:
    return f"{args.data}, one hidden layer, {args.sparsity:.0%} pruned, {args.trials} networks each"


def draw_distances(table: Table3, args: argparse.Namespace, path: Path) -> None:
    """One panel a method and norm: distances against size."""
    figure, axes = new_figure(2, len(args.methods), cell=(2.3, 2.5))
    styles = {"known": ("C0", "o-"), "fitted": ("C1", "s-"), "other": ("C2", "^:"), "chance": ("0.5", "--")}
    for (index, norm), (column, method) in product(enumerate(("L2 distance", "cut norm")), enumerate(args.methods)):
        axis = axes[index, column]
        for name, (colour, style) in styles.items():
            points = {s**2: table[method, s][name][:, index].mean() for s in args.sides if name in table[method, s]}
            axis.plot(list(points), list(points.values()), style, color=colour, ms=4, lw=1.2, label=DISTANCES[name])
        axis.set(xscale="log", yscale="log")
        axis.set_xticks([s**2 for s in args.sides], [str(s**2) for s in args.sides], fontsize=7)
        axis.minorticks_off()
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(alpha=0.3)
        axis.set_title(method if index == 0 else "", fontsize=10)
        axis.set_ylabel(f"{norm}\n(0 to 1)" if column == 0 else "", fontsize=8)
        axis.set_xlabel("inputs = hidden units" if index == 1 else "", fontsize=8)
    for line in axes:
        low, high = min(a.get_ylim()[0] for a in line), max(a.get_ylim()[1] for a in line)
        ticks = [t for t in (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3) if low <= t <= high]
        for axis in line:
            axis.set_ylim(low, high)
            axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(f"Distance of the graphon of a first-layer mask\n{setting(args)}", fontsize=11)
    figure.savefig(path, dpi=110)


def draw_pictures(results: Results, args: argparse.Namespace, path: Path) -> None:
    """A row for each method: the masks' graphons at every size, then the predicted limits of the largest network."""
    grid: dict[str, dict[str, StepGraphon]] = {}
    for method in args.methods:
        line = {f"the mask, {s**2} inputs": _graphon(results[Cell(method, s, 0)]["found"]) for s in args.sides}
        largest = results[Cell(method, args.sides[-1], 0)]
        line["the limit, scales known"] = _graphon(largest["known"])
        if "fitted" in largest:
            line["the limit, factors fitted"] = _graphon(largest["fitted"])
        grid[method] = line
    figure = plot_graphon_grid(grid, title=f"Graphons of masks, and their predicted limits\n{setting(args)}")
    figure.savefig(path, dpi=130)


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; --paper changes the defaults only, so parts of the table can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--paper", action="store_true", help="up to 4096 inputs and units, three networks each")
    parser.add_argument(
        "--sides", type=int, nargs="+", help="sides of the image, multiples of 8; pixels = hidden units"
    )
    parser.add_argument("--trials", type=int, help="networks (seeds) for each setting, at least 2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of weights removed, one global threshold")
    parser.add_argument("--samples", type=int, default=256, help="images that snip and grasp see")
    parser.add_argument("--bins", type=int, default=32, help="of a graphon")
    add_data_arguments(parser, "predicted_limits")
    parser.set_defaults(**(PAPER if parser.parse_args(argv).paper else SMALL))
    args = parser.parse_args(argv)
    args.sides = sorted(set(args.sides))
    if args.trials < 2 or any(side % 8 or side < 8 for side in args.sides):
        parser.error("at least 2 trials, and sides that are multiples of 8, are needed to compare graphons bin by bin")
    return args


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is missing, write figures and table; returns the rows of the table."""
    args = parse(argv)
    console = Console()
    results = run(args, console)
    with console.status("distances, and what chance alone gives"):
        measured = analyse(results, args)
    table = rows(results, measured, args)
    files = [args.out / name for name in ("predicted_limits.csv", "distances.png", "pictures.png")]
    write_csv(table, files[0])
    draw_distances(measured, args, files[1])
    draw_pictures(results, args, files[2])
    console.print(report(table))
    console.print("Written:", *(str(file) for file in files), sep="\n  ")
    return table


if __name__ == "__main__":
    main()
