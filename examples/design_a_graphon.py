"""Does theory help in practice? Design graphons for a target of the Graphon NTK, draw masks from them, train.

For each target (energy concentration, alignment with the labels, speed, fit) product graphons of a given sparsity are
optimised on some training images, masks are drawn from them and trained, beside random masks, hubs made by hand, SNIP
and SynFlow at the same sparsity. All masks that are drawn at random have the Erdős-Rényi densities of layers, so that
what differs is where the weights are. Writes pictures, a table and one small file for every design and network, so that
a stopped run goes on where it was.

    python examples/design_a_graphon.py
    python examples/design_a_graphon.py --init drawn
    python examples/design_a_graphon.py --data mnist --data-root DIR --sparsities 0.95 0.98 --seeds 3
"""

import argparse
import csv
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from generalisation import network, normalise
from image_data import add_data_arguments, images
from resumable import Cell, finish
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_graphon.graphon import (
    StepGraphon,
    block,
    coordinate_relevance,
    input_path_density,
)
from lightning_graphon.ntk import design_graphons, graphon_ntk, kernel_target_alignment, spectral_summary
from lightning_graphon.plots import new_figure
from lightning_graphon.pruning import Enforcer, LayerCollapseWarning, Masks, prune

TARGETS = ("energy", "alignment", "speed", "fit")
METHODS = ("random", "hubs", "snip", "synflow", *(f"design: {target}" for target in TARGETS))
LAYERS = ("0.weight", "2.weight", "4.weight")
EARLY = 50  # optimizer steps
LOOKS = (0, 10, 20, 35, EARLY, 75, 100, 150, 200, 300, 450)  # steps at which the loss of the training set is taken

# ---- data


class Data(NamedTuple):
    """Training and test images, one row each, and their classes."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def samples(args: argparse.Namespace) -> Data:
    """One split for all networks; images in [0, 1]."""
    inputs, labels = images(args.data, args.data_root)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    count = min(args.train, int(0.78 * len(labels)))
    train, test = order[:count], order[count : count + 10_000]
    return Data(inputs[train], labels[train], inputs[test], labels[test])


# ---- designs


class Design(NamedTuple):
    """Graphons to optimise."""

    target: str
    sparsity: float


def layer_densities(args: argparse.Namespace, sparsity: float, inputs: int) -> list[float]:
    """Erdős-Rényi densities of the layers at this sparsity."""
    masks = prune(network(inputs, args.width, 10), "random", sparsity=sparsity, allocation="erk")
    return [float(mask.double().mean()) for mask in masks.values()]


def design(cell: Design, args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Optimise one set of graphons; values and numbers as lists, for a JSON file."""
    start = time.perf_counter()
    x, y = data.x[: args.probe].double(), data.y[: args.probe]
    found = design_graphons(
        x, density=layer_densities(args, cell.sparsity, x.shape[1]), outputs=10, hidden=(args.positions,) * 2,
        labels=y, target=cell.target, steps=args.steps,
    )  # fmt: skip
    kernel = graphon_ntk(x, found.graphons)
    return {
        "values": [g.values.tolist() for g in found.graphons],
        "history": found.history,
        "energy": spectral_summary(kernel).energy_concentration,
        "alignment": kernel_target_alignment(kernel, y, centred=True),
        "scale": float(kernel.diagonal().mean()),
        "seconds": time.perf_counter() - start,
    }


def hubs(densities: list[float], positions: int) -> list[StepGraphon]:
    """A control without data: neurons of uneven degree, ∝ ((1 - u)(1 - v))² in the hidden layers, inputs all alike."""
    profile = (1 - (torch.arange(positions, dtype=torch.float64) + 0.5) / positions) ** 2
    one = torch.ones(1, dtype=torch.float64)
    shapes = [torch.outer(a, b) for a, b in ((profile, one), (profile, profile), (one, profile))]
    return [block(shape, density) for shape, density in zip(shapes, densities, strict=True)]


# ---- networks


Designs = dict[Design, dict[str, Any]]


def masks_in_use(cell: Cell, net: nn.Module, args: argparse.Namespace, data: Data, designs: Designs) -> Masks:
    """Masks by one of METHODS, of exactly the sparsity asked for."""
    options: dict[str, Any] = {"sparsity": cell.sparsity, "seed": 10_000 + cell.seed}
    if cell.method in ("snip", "synflow"):
        return prune(net, cell.method, batches=[(data.x[:512], data.y[:512])], **options)
    if cell.method == "random":
        return prune(net, "random", allocation="erk", **options)
    if cell.method == "hubs":
        graphons = hubs(layer_densities(args, cell.sparsity, data.x.shape[1]), args.positions)
    else:
        values = designs[Design(cell.method.removeprefix("design: "), cell.sparsity)]["values"]
        graphons = [StepGraphon(v) for v in values]
    chosen = {"graphons": dict(zip(LAYERS, graphons, strict=True))}
    return prune(net, "graphon", allocation="erk", options=chosen, **options)


def compute(cell: Cell, args: argparse.Namespace, data: Data, designs: Designs) -> dict[str, Any]:
    """Prune, train; losses of the training set at LOOKS and the final accuracy."""
    start = time.perf_counter()
    torch.manual_seed(cell.seed)
    net = network(data.x.shape[1], args.width, 10)
    masks = masks_in_use(cell, net, args, data, designs)
    masks.apply_(net)
    if args.init == "kept":
        normalise(net)
    losses = train(net, masks, args, data, cell.seed)
    with torch.no_grad():
        accuracy = float((net(data.x_test).argmax(1) == data.y_test).double().mean())
    paths = input_path_density(list(masks.values()))
    return {
        "losses": losses,
        "accuracy": accuracy,
        "density": [float(mask.double().mean()) for mask in masks.values()],
        "dead": [float((~mask.any(1)).double().mean()) for mask in masks.values()],
        "paths": paths.tolist() if cell.seed == 0 else None,
        "relevance": float(spearmanr(paths, coordinate_relevance(data.x, data.y)).statistic),
        "seconds": time.perf_counter() - start,
    }


def train(net: nn.Module, masks: Masks, args: argparse.Namespace, data: Data, seed: int) -> dict[int, float]:
    """SGD with momentum on cross-entropy; loss of (5000 of) the training set by optimizer step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9)
    source, step, losses = torch.Generator().manual_seed(seed), 0, {}
    x, y = data.x[:5000], data.y[:5000]
    with Enforcer(net, masks, optimizer):
        for _ in range(args.epochs):
            for batch in torch.randperm(len(data.y), generator=source).split(64):
                if step in LOOKS:
                    with torch.no_grad():
                        losses[step] = float(F.cross_entropy(net(x), y))
                optimizer.zero_grad()
                F.cross_entropy(net(data.x[batch]), data.y[batch]).backward()
                optimizer.step()
                step += 1
    return losses


# ---- all of it, resumable

Results = dict[Cell, dict[str, Any]]


def run(args: argparse.Namespace, console: Console) -> tuple[Designs, Results]:
    """Compute what is not there yet, designs first, then read everything."""
    data = samples(args)
    common = f"{args.data}_w{args.width}_{len(data.y)}"
    designs = finish(
        args.out / "designs" / f"{common}_{args.probe}probe_{args.positions}positions_{args.steps}steps",
        [Design(*pair) for pair in product(TARGETS, args.sparsities)],
        stem=lambda d: f"{d.target}_s{100 * d.sparsity:g}",
        work=lambda d: design(d, args, data),
        describe=lambda d: f"design for {d.target}, {d.sparsity:.0%} pruned",
        console=console,
    )
    grid = product(range(args.seeds), args.sparsities, METHODS)
    results = finish(
        args.out / "cells" / f"{common}_{args.init}_lr{args.lr:g}_{args.epochs}epochs_{args.steps}steps",
        [Cell(method, sparsity, seed) for seed, sparsity, method in grid],
        stem=lambda c: c.stem,
        work=lambda c: compute(c, args, data, designs),
        describe=lambda c: c.description,
        console=console,
    )
    return designs, results


# ---- what is written


def early_loss(result: dict[str, Any]) -> float:
    """Loss of the training set after EARLY steps, or at the last look of a shorter training."""
    losses = {int(step): loss for step, loss in result["losses"].items()}
    return losses[max(step for step in losses if step <= EARLY)]


def column(results: Results, method: str, sparsity: float, number: str) -> np.ndarray:
    """One number for each seed: number is "early", "accuracy" or "error"."""
    chosen = [r for cell, r in results.items() if (cell.method, cell.sparsity) == (method, sparsity)]
    read = {"early": early_loss, "accuracy": lambda r: r["accuracy"], "error": lambda r: 100 * (1 - r["accuracy"])}
    return np.array([read[number](r) for r in chosen])


def spread(values: np.ndarray) -> float:
    """Standard deviation between seeds; 0 for one seed."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def against(results: Results, method: str, other: str, sparsity: float, number: str) -> str:
    """Mean difference to another method over the seeds, with its standard error."""
    gap = column(results, method, sparsity, number) - column(results, other, sparsity, number)
    return f"{100 * gap.mean():+.1f} ± {100 * spread(gap) / len(gap) ** 0.5:.1f}"


def report(results: Results, args: argparse.Namespace) -> Table:
    """Early loss and accuracy of every method at every sparsity."""
    table = Table("sparsity", "method", title="± standard deviation; differences ± standard error, in points")
    for name in ("loss at step 50", "accuracy", "accuracy - SNIP", "accuracy - SynFlow"):
        table.add_column(name, justify="right")
    for sparsity in args.sparsities:
        for method in METHODS:
            early, accuracy = (column(results, method, sparsity, n) for n in ("early", "accuracy"))
            table.add_row(
                f"{sparsity:.0%}", method, f"{early.mean():.3f} ± {spread(early):.3f}",
                f"{accuracy.mean():.1%} ± {100 * spread(accuracy):.1f}",
                *(against(results, method, other, sparsity, "accuracy") for other in ("snip", "synflow")),
            )  # fmt: skip
        table.add_section()
    return table


def write_csv(results: Results, path: Path) -> None:
    """One row for each network."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        layers = [f"density_{layer + 1}" for layer in range(len(LAYERS))]
        writer.writerow(["method", "sparsity", "seed", "loss_step_50", "accuracy", *layers, "relevance"])
        for cell, result in results.items():
            numbers = (early_loss(result), result["accuracy"], *result["density"], result["relevance"])
            writer.writerow([*cell, *(f"{number:.4g}" for number in numbers)])


def style(method: str) -> dict[str, Any]:
    """Designs are solid, what they are compared with is dashed."""
    number = METHODS.index(method)
    line = "-" if method.startswith("design") else "--"
    return {"color": f"C{number}", "ls": line, "marker": "os^vDPX*"[number], "ms": 4, "lw": 1.3, "capsize": 2}


def draw(results: Results, args: argparse.Namespace, path: Path) -> None:
    """Early loss and test error against sparsity, and the loss while training at the highest sparsity."""
    figure, axes = new_figure(1, 3, cell=(4.6, 4.2))
    left, middle, right = axes[0]
    for axis, number in ((left, "early"), (middle, "error")):
        for index, method in enumerate(METHODS):
            groups = [column(results, method, s, number) for s in args.sparsities]
            # Points of one sparsity stand side by side, so that their bars can be told apart.
            places = [i + 0.05 * (index - len(METHODS) / 2) for i in range(len(groups))]
            axis.errorbar(
                places, [g.mean() for g in groups], [spread(g) for g in groups], label=method, **style(method)
            )
        axis.set_xticks(range(len(args.sparsities)), [f"{s:.1%}".replace(".0%", "%") for s in args.sparsities])
        axis.set_xlabel("sparsity (weights removed)")
    top = args.sparsities[-1]
    for method in METHODS:
        curves = [r["losses"] for c, r in results.items() if (c.method, c.sparsity) == (method, top)]
        steps = [int(step) for step in curves[0]]
        mean = np.mean([list(curve.values()) for curve in curves], axis=0)
        given = {k: v for k, v in style(method).items() if k != "capsize"}
        right.plot(steps, mean, **given)
    left.set_ylabel(f"loss of the training set after {EARLY} steps")
    middle.set_ylabel("test error of the trained network (%)")
    right.set(xlabel="optimizer step", ylabel="loss of the training set", title=f"while training, {top:.0%} removed")
    left.set_title("early loss")
    middle.set_title("final error")
    for axis, ticks in (
        (left, (0.1, 0.2, 0.5, 1, 2)),
        (middle, (2, 5, 10, 20, 50, 100)),
        (right, (0.1, 0.3, 1, 3, 10)),
    ):
        low, high = axis.dataLim.intervaly
        axis.set(yscale="log", ylim=(low / 1.15, high * 1.15))
        axis.set_yticks(inside := [t for t in ticks if low / 1.15 < t < high * 1.15], [f"{t:g}" for t in inside])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    init = "rescaled to He's variance after pruning" if args.init == "kept" else "as drawn before pruning"
    figure.suptitle(
        f"Masks drawn from designed graphons against SNIP and SynFlow: {args.data}, MLP with two hidden layers of "
        f"{args.width}\nweights {init}; mean of {args.seeds} networks, bars: standard deviation between them"
    )
    figure.savefig(path, dpi=90)


def draw_inputs(results: Results, args: argparse.Namespace, path: Path) -> None:
    """Which pixels each method listens to: share of the possible paths from each, relative to the mean pixel."""
    top, data = args.sparsities[-1], samples(args)
    fields = {"relevance\n(spread of class means)": coordinate_relevance(data.x, data.y)}
    for method in METHODS[1:]:
        fields[method] = torch.tensor(results[Cell(method, top, 0)]["paths"], dtype=torch.float64)
    figure, axes = new_figure(2, 4, cell=(2.5, 2.7))
    side = round(data.x.shape[1] ** 0.5)
    for axis, (name, field) in zip(axes.flat, fields.items(), strict=True):
        relative = (field / field.mean()).reshape(side, side)
        image = axis.imshow(relative.numpy(), cmap="magma_r", vmin=0, vmax=4, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        note = (
            ""
            if name.startswith("rel")
            else f"\nrank correlation {spearmanr(field, next(iter(fields.values()))).statistic:+.2f}"
        )
        axis.set_title(name + note, fontsize=9)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, extend="max")
    bar.set_label("relative to the mean pixel")
    figure.suptitle(
        f"Paths from each pixel to the outputs, {top:.0%} of the weights removed, {args.data}\n"
        "one mask each; rank correlation with the relevance at the top left",
        fontsize=11,
    )
    figure.savefig(path, dpi=90)


def tell(designs: Designs, console: Console) -> None:
    """What the optimiser reached."""
    table = Table("target", "sparsity", "constant", "designed", "energy, top five", "alignment", "scale of the kernel")
    for cell, found in designs.items():
        ends = (f"{found['history'][0]:.4g}", f"{max(found['history']):.4g}")
        rest = (f"{found['energy']:.3f}", f"{found['alignment']:.3f}", f"{found['scale']:.3g}")
        table.add_row(cell.target, f"{cell.sparsity:.0%}", *ends, *rest)
    console.print(table)


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.97], help="weights removed")
    parser.add_argument("--seeds", type=int, default=5, help="networks for each point")
    parser.add_argument("--width", type=int, default=256, help="neurons in each hidden layer")
    parser.add_argument(
        "--init", choices=["kept", "drawn"], default="kept", help="weights rescaled after pruning or not"
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--train", type=int, default=10_000, help="training images, at most")
    parser.add_argument("--probe", type=int, default=200, help="training images that the design looks at")
    parser.add_argument("--positions", type=int, default=16, help="of each hidden layer in the designed graphons")
    parser.add_argument("--steps", type=int, default=60, help="of each design")
    add_data_arguments(parser, "design_a_graphon")
    args = parser.parse_args(argv)
    if args.probe > 1000:
        parser.error("--probe above 1000 takes gigabytes: the gradient keeps tensors of positions * probe * probe")
    args.sparsities = sorted(set(args.sparsities))
    return args


def main(argv: list[str] | None = None) -> tuple[Designs, Results]:
    """Run what is missing, write pictures and table; returns designs and the numbers of every network."""
    args = parse(argv)
    warnings.simplefilter("ignore", LayerCollapseWarning)  # such a network is at chance, which is reported
    console = Console()
    designs, results = run(args, console)
    stem = f"design_{args.data}_{args.init}"
    files = [args.out / name for name in (f"{stem}.csv", f"{stem}.png", f"design_{args.data}_inputs.png")]
    write_csv(results, files[0])
    draw(results, args, files[1])
    draw_inputs(results, args, files[2])
    tell(designs, console)
    console.print(report(results, args))
    console.print("Written:", *(str(file) for file in files), sep="\n  ")
    return designs, results


if __name__ == "__main__":
    main()
