"""Do kernels say which sparse network will generalise? Bound, alignment and test error against density.

Prunes MLPs by every method at several densities and takes three kernels of each network at initialisation: the Graphon
NTK of the paper (density), that of the weights as they are kept (drift), and the exact one. From each kernel: the bound
of Arora et al. as arXiv:2602.06675 uses it, the alignment with the labels, and the test error of ridge regression. Then
the network is trained on the same samples and its test error measured. Writes a picture, a table and one small file for
every network, so that a stopped run goes on where it was.

    python examples/generalisation.py
    python examples/generalisation.py --task binary
    python examples/generalisation.py --data mnist --data-root DIR
"""

import argparse
import csv
import time
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from image_data import add_data_arguments, images
from resumable import finish
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon.graphon import coordinate_relevance, input_path_density
from lightning_graphon.ntk import (
    empirical_ntk,
    generalisation_bound,
    graphon_ntk_from_model,
    kernel_ridge_regression,
    kernel_target_alignment,
)
from lightning_graphon.plots import new_figure
from lightning_graphon.pruning import Enforcer, LayerCollapseWarning, Masks, prune

METHODS = ("random", "magnitude", "snip", "grasp", "synflow")
KERNELS = {
    "density": "Graphon NTK, density\n(the paper)",
    "drift": "Graphon NTK, drift\n(weights as they are kept)",
    "exact": "exact kernel\nof the same network",
}
NUMBERS = {
    "bound": "bound on the test error\n(sum over outputs)",
    "alignment": "centred alignment\nwith the labels",
    "ridge_error": "test error of ridge\nregression with the kernel",
}
RIDGE = 1e-3  # of the kernel's mean diagonal, for the regression; the bound has none

# ---- one network


class Cell(NamedTuple):
    """One network; `method` is "dense" with density 1, or a pruning method."""

    method: str
    density: float
    seed: int

    @property
    def stem(self) -> str:
        """Name of its file."""
        return f"{self.method}_d{100 * self.density:g}_t{self.seed}"


class Data(NamedTuple):
    """Samples of unit length (as the theorem has them) and their classes."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def samples(args: argparse.Namespace, seed: int) -> Data:
    """A training set for each seed, the same for all methods; even against odd for the binary task."""
    inputs, labels = images(args.data, args.data_root)
    labels = labels % 2 if args.task == "binary" else labels
    inputs = inputs / inputs.norm(dim=1, keepdim=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[: args.samples], order[args.samples : args.samples + args.test_samples]
    return Data(inputs[train], labels[train], inputs[test], labels[test])


def network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """A ReLU MLP with two hidden layers, no biases, He's variance."""
    sides = [inputs, width, width, outputs]
    layers = [layer for a, b in pairwise(sides) for layer in (nn.Linear(a, b, bias=False), nn.ReLU())][:-1]
    net = nn.Sequential(*layers)
    for weight in net.parameters():
        nn.init.kaiming_normal_(weight)
    return net


def normalise(net: nn.Module) -> None:
    """Let a neuron's squared weights sum to 2 on average in every layer: He's variance for kept weights."""
    with torch.no_grad():
        for weight in net.parameters():
            total = weight.square().sum()
            weight.mul_((2 * len(weight) / total).sqrt() if total > 0 else 0)


def masked_network(cell: Cell, data: Data, args: argparse.Namespace) -> tuple[nn.Module, Masks]:
    """The network as it will be trained, its pruned weights at zero, and its masks."""
    torch.manual_seed(cell.seed)
    net = network(data.x.shape[1], args.width, len(data.y.unique()))
    method = "random" if cell.method == "dense" else cell.method
    allocation = "uniform" if method == "magnitude" else "global"  # weights of different fan-ins do not compare
    masks = prune(
        net,
        method,
        sparsity=1 - cell.density,
        batches=[(data.x, data.y)],
        allocation=allocation,
        seed=10_000 + cell.seed,
    )
    masks.apply_(net)
    normalise(net)
    return net, masks


def kernels(net: nn.Module, data: Data, masks: Masks) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, [N, N] and [M, N] of the kernels of KERNELS, for gradient descent on PyTorch's own parameters."""
    net, train, test = net.double(), data.x.double(), data.x_test.double()
    for propagate, bins in (("density", 16), ("drift", 8)):
        one = partial(graphon_ntk_from_model, net, masks=masks, propagate=propagate, bins=bins)
        yield propagate, one(train), one(test, x2=train)
    yield "exact", empirical_ntk(net, train, masks=masks), empirical_ntk(net, test, x2=train, masks=masks)


def of_kernel(train: Tensor, test: Tensor, data: Data) -> dict[str, float]:
    """What a kernel between training samples, and between test and training samples, says."""
    scale = float(train.diagonal().mean())
    if scale == 0:  # no path from input to output
        nothing = float((data.y_test != data.y.mode().values).double().mean())
        return {"bound": float("inf"), "literal": float("inf"), "alignment": 0.0, "ridge_error": nothing, "scale": 0.0}
    predicted = kernel_ridge_regression(train, data.y, test, RIDGE * scale)
    classes = (predicted[:, 0] > 0).long() if predicted.shape[1] == 1 else predicted.argmax(1)
    bound = generalisation_bound(train, data.y)
    return {
        "bound": bound.value,
        "literal": generalisation_bound(train, data.y, scale="given").value,
        "condition": bound.condition_number,
        "alignment": kernel_target_alignment(train, data.y, centred=True),
        "ridge_error": float((classes != data.y_test).double().mean()),
        "scale": scale,
    }


def test_error(net: nn.Module, masks: Masks, data: Data, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train with cross-entropy; errors on both sets."""
    net = net.float()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    source = torch.Generator().manual_seed(seed)
    with Enforcer(net, masks, optimizer):
        for _ in range(args.epochs):
            for batch in torch.randperm(len(data.y), generator=source).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(data.x[batch]), data.y[batch]).backward()
                optimizer.step()
    with torch.no_grad():
        wrong = [float((net(x).argmax(1) != y).double().mean()) for x, y in (data[:2], data[2:])]
    return {"train_error": wrong[0], "test_error": wrong[1]}


def compute(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Everything of one network."""
    start = time.perf_counter()
    data = samples(args, cell.seed)
    net, masks = masked_network(cell, data, args)
    found: dict[str, Any] = {name: of_kernel(train, test, data) for name, train, test in kernels(net, data, masks)}
    paths, relevance = input_path_density(list(masks.values())), coordinate_relevance(data.x, data.y)
    # With all paths there, or none, the network prefers no pixel: the correlation with a constant would be 0/0.
    found["relevance"] = float(spearmanr(paths, relevance).statistic) if len(paths.unique()) > 1 else 0.0
    return found | test_error(net, masks, data, args, cell.seed) | {"seconds": time.perf_counter() - start}


# ---- all networks, resumable

Results = dict[Cell, dict[str, Any]]


def cells(args: argparse.Namespace) -> list[Cell]:
    """All networks; a whole seed first, so that a stopped run has every point once."""
    grid = [("dense", 1.0), *product(args.methods, args.densities)]
    return [Cell(method, density, seed) for seed in range(args.seeds) for method, density in grid]


def run(args: argparse.Namespace, console: Console) -> Results:
    """Compute what is not there yet, then read everything."""
    setting = f"{args.data}_{args.task}_w{args.width}_{args.samples}of{args.test_samples}_{args.epochs}epochs"
    folder = args.out / "cells" / setting
    return finish(
        folder,
        cells(args),
        stem=lambda c: c.stem,
        work=lambda c: compute(c, args),
        describe=lambda c: f"{c.method}, {c.density:.0%} kept, seed {c.seed}",
        console=console,
    )


# ---- what is written


def column(results: Results, method: str, density: float, *keys: str) -> np.ndarray:
    """One number for each seed; `keys` lead to it, such as "exact", "bound"."""
    values = []
    for cell, result in results.items():
        if (cell.method, cell.density) == (method, density):
            for key in keys:
                result = result[key]
            values.append(result)
    return np.array(values, dtype=float)


def write_csv(results: Results, path: Path) -> None:
    """One row for each network and kernel."""
    with path.open("w", newline="") as file:
        names = ("bound", "literal", "alignment", "ridge_error", "scale")
        header = ["method", "density", "seed", "kernel", *names, "train_error", "test_error", "relevance"]
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for cell, result in results.items():
            of_network = [f"{result[key]:.4g}" for key in ("train_error", "test_error", "relevance")]
            for kernel in KERNELS:
                writer.writerow([*cell, kernel, *(f"{result[kernel][name]:.5g}" for name in names), *of_network])


def ranking(results: Results, kernel: str, number: str, density: float | None = None) -> float:
    """Spearman correlation of a kernel's number with the test error over networks; all densities where None."""
    chosen = [r for c, r in results.items() if density in (None, c.density) and c.method != "dense"]
    numbers = [min(r[kernel][number], 1e300) for r in chosen]  # inf is the worst bound
    errors = [r["test_error"] for r in chosen]
    return float(spearmanr(numbers, errors).statistic)


def report(results: Results, args: argparse.Namespace) -> Table:
    """How well each number ranks the networks by their test error."""
    table = Table("number", "kernel", title="Rank correlation with the test error of the trained networks")
    for density in args.densities:
        table.add_column(f"{density:.0%} kept", justify="right")
    table.add_column("all densities", justify="right")
    table.add_column("values", justify="right")
    for number, kernel in product(NUMBERS, KERNELS):
        row = [f"{ranking(results, kernel, number, density):+.2f}" for density in (*args.densities, None)]
        values = [r[kernel][number] for r in results.values()]
        table.add_row(NUMBERS[number].split("\n")[0], kernel, *row, f"{min(values):.3g} to {max(values):.3g}")
    return table


# ---- the figure


def draw(results: Results, args: argparse.Namespace, path: Path) -> None:
    """A row for each number, a column for each kernel; the last column is about the trained networks."""
    figure, axes = new_figure(3, 4, cell=(3.4, 2.7))
    for (row, number), (index, kernel) in product(enumerate(NUMBERS), enumerate(KERNELS)):
        axis = axes[row, index]
        draw_curves(axis, results, args, kernel, number)
        axis.set_title(KERNELS[kernel] if row == 0 else "", fontsize=9)
        axis.set_ylabel(NUMBERS[number] if index == 0 else "", fontsize=9)
    for row in range(3):
        share_y(axes[row, :3], logarithmic=row == 0)
    for axis in axes[0, :3]:
        axis.axhline(1, color="k", lw=1, ls=":")
        axis.annotate("vacuous above 1", (0.02, 1), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
    draw_curves(axes[0, 3], results, args, "test_error")
    axes[0, 3].set_title("trained networks", fontsize=9)
    axes[0, 3].set_ylabel("test error", fontsize=9)
    draw_curves(axes[1, 3], results, args, "relevance")
    axes[1, 3].set_ylabel("rank correlation of path density\nand relevance of a pixel", fontsize=9)
    draw_scatter(axes[2, 3], results, args)
    for axis in axes[2, :3]:
        axis.set_xlabel("density (% of weights kept)", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    task = "even against odd" if args.task == "binary" else "ten classes"
    networks = "one network each" if args.seeds == 1 else f"mean of {args.seeds} networks with standard deviation"
    figure.suptitle(
        f"What kernels at initialisation say of the test error: {args.data}, {task}\n"
        f"MLP with two hidden layers of {args.width}, {args.samples} training and {args.test_samples} test images; "
        f"{networks}, infinite bounds are not drawn",
        fontsize=11,
    )
    figure.savefig(path, dpi=90)


def draw_curves(axis: Any, results: Results, args: argparse.Namespace, *keys: str) -> None:
    """Mean and standard deviation of a number against density, a curve for each method."""
    dense = column(results, "dense", 1.0, *keys)
    if keys != ("relevance",):  # all paths are there: it prefers no pixel
        axis.axhline(dense.mean(), color="0.3", lw=1, ls="--", label="dense")
    for method in args.methods:
        groups = [column(results, method, density, *keys) for density in args.densities]
        spread = [group.std(ddof=1) if len(group) > 1 and np.isfinite(group).all() else 0 for group in groups]
        means = [group.mean() for group in groups]
        axis.errorbar([100 * d for d in args.densities], means, spread, label=method, **style(method))
    axis.set_xscale("log")
    axis.set_xticks([100 * d for d in args.densities], [f"{100 * d:g}" for d in args.densities])
    axis.minorticks_off()
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def style(method: str) -> dict[str, Any]:
    """Colour and marker of a method, the same in all pictures."""
    number = METHODS.index(method)
    return {"color": f"C{number}", "marker": "os^vD"[number], "ms": 3.5, "lw": 1.2, "capsize": 2}


def draw_scatter(axis: Any, results: Results, args: argparse.Namespace) -> None:
    """Test error against the bound of the exact kernel, a dot for each network."""
    for method in args.methods:
        chosen = [r for c, r in results.items() if c.method == method and np.isfinite(r["exact"]["bound"])]
        given = style(method)
        axis.plot(
            [r["exact"]["bound"] for r in chosen], [r["test_error"] for r in chosen],
            ls="", color=given["color"], marker=given["marker"], ms=3,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("bound (exact kernel)", fontsize=8)
    axis.set_ylabel("test error of the trained network", fontsize=9)
    axis.set_title(f"rank correlation of all networks {ranking(results, 'exact', 'bound'):+.2f}", fontsize=8)
    axis.tick_params(labelsize=7, which="both")
    axis.grid(alpha=0.3)


def share_y(axes: Any, logarithmic: bool) -> None:
    """One scale for all kernels of a row."""
    low, high = (pick(axis.dataLim.intervaly[end] for axis in axes) for end, pick in enumerate((min, max)))
    for axis in axes:
        if logarithmic:
            axis.set_yscale("log")
            axis.set_ylim(min(0.8, low / 1.2), high * 1.3)
        else:
            axis.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=["ten", "binary"], default="ten", help="ten classes, or even against odd")
    parser.add_argument("--width", type=int, default=256, help="neurons in each hidden layer")
    parser.add_argument("--samples", type=int, default=256, help="training images, of the kernel and of the network")
    parser.add_argument("--test-samples", type=int, default=512)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.5])
    parser.add_argument("--seeds", type=int, default=3, help="networks and training sets for each point")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=150, help="of the trained networks")
    add_data_arguments(parser, "generalisation")
    args = parser.parse_args(argv)
    if not all(0 < density < 1 for density in args.densities):
        parser.error("densities are fractions of weights kept, between 0 and 1; the dense network is always there")
    args.densities = sorted(set(args.densities))
    return args


def main(argv: list[str] | None = None) -> Results:
    """Run what is missing, write figure and table; returns the numbers of every network."""
    args = parse(argv)
    warnings.simplefilter("ignore", LayerCollapseWarning)  # such a network's kernel is zero, which is reported
    console = Console()
    results = run(args, console)
    files = [args.out / f"generalisation_{args.data}_{args.task}.{end}" for end in ("csv", "png")]
    write_csv(results, files[0])
    draw(results, args, files[1])
    console.print(report(results, args))
    console.print("Written:", *(str(file) for file in files), sep="\n  ")
    return results


if __name__ == "__main__":
    main()
