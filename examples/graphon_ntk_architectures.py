"""Which architectures tolerate which pruning method? Figure 3 of arXiv:2510.17515 for a CNN, a ResNet, a transformer.

Prunes the three networks by every method at initialisation and measures four numbers of the spectrum of their tangent
kernel: of the Graphon NTK, and of the exact kernel of that very network. Writes a picture, a CSV, and one small file
for every network, so that a stopped run goes on where it was.

    python examples/graphon_ntk_architectures.py --quick
    python examples/graphon_ntk_architectures.py
"""

import argparse
import csv
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from image_data import images
from ntk_spectra import METHODS, METRICS, plain_ticks, spread
from resumable import finish
from rich.console import Console
from torch import Tensor, nn

from lightning_graphon.ntk import empirical_ntk, graphon_ntk_from_model, spectral_summary
from lightning_graphon.plots import new_figure
from lightning_graphon.pruning import LayerCollapseWarning, Masks, prune

QUICK: dict[str, Any] = {"width": 32, "samples": 6, "sparsities": [0.5, 0.9], "seeds": 1}
WHOLE: dict[str, Any] = {"width": 128, "samples": 16, "sparsities": [0.5, 0.8, 0.95], "seeds": 2}
KERNELS = {"graphon": "Graphon NTK", "exact": "exact kernel"}
BATCH = 256  # images that SNIP and GraSP see, and the kernel does not

# ---- the networks, on images [N, 1, 8, 8]


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.f = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The stream and its branch."""
        return x + self.f(x)


class Attention(nn.Module):
    """Four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.join = _linear(width, 3 * width), _linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, T, width] to tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.join(heads.transpose(1, 2).flatten(2))
        return out


class Patches(nn.Module):
    """Four tokens of 4 x 4 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """Images to tokens [N, 4, 16]."""
        return x.reshape(-1, 2, 4, 2, 4).transpose(2, 3).flatten(3).flatten(1, 2)


class MeanToken(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to one vector each."""
        return x.mean(1)


def _linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def cnn(n: int) -> nn.Module:
    """Three convolutions and a Linear layer over all positions."""
    hidden = (nn.ReLU(), _conv(n, n), nn.ReLU(), _conv(n, n), nn.ReLU())
    return nn.Sequential(_conv(1, n, 2), *hidden, nn.Flatten(), _linear(16 * n, 10))


def resnet(n: int) -> nn.Module:
    """Two residual blocks of two convolutions each, and global average pooling."""
    blocks = (Residual(nn.ReLU(), _conv(n, n), nn.ReLU(), _conv(n, n)) for _ in range(2))
    return nn.Sequential(_conv(1, n, 2), *blocks, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), _linear(n, 10))


def transformer(n: int) -> nn.Module:
    """One block of attention and of an MLP, each after a LayerNorm."""
    norm = lambda: nn.LayerNorm(n, elementwise_affine=False)  # noqa: E731
    mlp = (norm(), _linear(n, 2 * n), nn.GELU(), _linear(2 * n, n))
    blocks = (Residual(norm(), Attention(n)), Residual(*mlp))
    return nn.Sequential(Patches(), _linear(16, n), *blocks, norm(), MeanToken(), _linear(n, 10))


ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {"CNN": cnn, "ResNet": resnet, "transformer": transformer}

# ---- one network


class Cell(NamedTuple):
    """One network; `method` is "dense" with sparsity 0, or a pruning method."""

    architecture: str
    method: str
    sparsity: float
    seed: int


def masked_network(cell: Cell, width: int, batch: tuple[Tensor, Tensor]) -> tuple[nn.Module, Masks | None]:
    """A network at He initialisation in float64, and its masks."""
    torch.manual_seed(cell.seed)
    net = ARCHITECTURES[cell.architecture](width).double()
    for weight in net.parameters():
        nn.init.normal_(weight, 0.0, (2 / weight[0].numel()) ** 0.5)
    if cell.method == "dense":
        return net, None
    # One threshold for magnitudes would only tell layers apart, whose weights have different sizes.
    allocation = "uniform" if cell.method == "magnitude" else "global"
    found = prune(net, cell.method, sparsity=cell.sparsity, batches=[batch], allocation=allocation, seed=cell.seed)
    return net, found


def theory(cell: Cell) -> Literal["energy", "drift"]:
    """Energy, and the drift for methods whose kept weights have a mean; attention has none yet."""
    return "drift" if cell.method in ("snip", "grasp") and cell.architecture != "transformer" else "energy"


def compute(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Kernel -> metrics, the distance of the two kernels, and the seconds it took."""
    start = time.perf_counter()
    inputs, labels = images("digits", Path("data"))
    inputs = inputs.double().reshape(-1, 1, 8, 8)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    probe, scored = inputs[order[: args.samples]], order[args.samples :]
    chosen = scored[torch.randperm(len(scored), generator=torch.Generator().manual_seed(cell.seed))[:BATCH]]
    net, masks = masked_network(cell, args.width, (inputs[chosen], labels[chosen]))
    bins = 4 if cell.architecture == "transformer" else None  # attention takes as long as there are bins
    graphon = graphon_ntk_from_model(net, probe, masks, propagate=theory(cell), bins=bins)
    exact = empirical_ntk(net, probe, masks=masks)
    found: dict[str, Any] = {"distance": float((graphon - exact).norm() / exact.norm().clamp_min(1e-300))}
    for name, kernel in (("graphon", graphon), ("exact", exact)):
        scalars = spectral_summary(kernel).scalars()
        found[name] = {key: scalars[key] for key in METRICS}
    return found | {"seconds": time.perf_counter() - start}


Results = dict[Cell, dict[str, Any]]


def run(args: argparse.Namespace, console: Console) -> Results:
    """Compute what is not there yet, then read everything; a whole seed first."""
    levels = [("dense", 0.0), *product(METHODS, args.sparsities)]
    cells = [Cell(name, *level, seed) for seed, name, level in product(range(args.seeds), ARCHITECTURES, levels)]
    return finish(
        args.out / "cells" / f"w{args.width}_{args.samples}samples",
        cells,
        stem=lambda c: f"{c.architecture}_{c.method}_s{100 * c.sparsity:g}_t{c.seed}",
        work=lambda c: compute(c, args),
        describe=lambda c: f"{c.architecture}, {c.method}, {c.sparsity:.0%}, seed {c.seed}",
        console=console,
        cost=lambda c: 5.0 if theory(c) == "drift" else 2.0 if c.architecture == "transformer" else 1.0,
    )


# ---- what is written


def of_seeds(results: Results, key: tuple[str, str, float], *path: str) -> np.ndarray:
    """One number for each seed of an architecture, a method and a sparsity."""
    found = []
    for cell, result in results.items():
        if cell[:3] == key:
            value: Any = result
            for name in path:
                value = value[name]
            found.append(value)
    return np.array(found)


def write_csv(results: Results, path: Path) -> None:
    """One row for each architecture, method, sparsity and kernel."""
    rows = []
    for key, kernel in product(dict.fromkeys(cell[:3] for cell in results), KERNELS):
        row: dict[str, Any] = dict(zip(("architecture", "method", "sparsity"), key, strict=True)) | {"kernel": kernel}
        for metric in METRICS:
            values = of_seeds(results, key, kernel, metric)
            row |= {"seeds": len(values), metric: f"{values.mean():.5g}", f"{metric}_std": f"{spread(values):.3g}"}
        rows.append(row | {"distance": f"{of_seeds(results, key, 'distance').mean():.3g}"})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(results: Results, args: argparse.Namespace, path: Path) -> None:
    """A row for each metric, two columns for each architecture, a curve for each method."""
    columns = list(product(ARCHITECTURES, KERNELS))
    figure, axes = new_figure(len(METRICS), len(columns), cell=(2.4, 2.1))
    for (row, metric), (column, (architecture, kernel)) in product(enumerate(METRICS), enumerate(columns)):
        axis = axes[row, column]
        _draw_curves(axis, results, args, architecture, (kernel, metric))
        axis.set_title(f"{architecture}\n{KERNELS[kernel]}" if row == 0 else "", fontsize=10)
        axis.set_ylabel(METRICS[metric] if column == 0 else "", fontsize=9)
        axis.set_xlabel("weights removed (%)" if row == len(METRICS) - 1 else "", fontsize=8)
    for row, metric in enumerate(METRICS):
        _share_y(list(axes[row]), logarithmic=metric == "spectral_gap")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=10, frameon=False)
    figure.suptitle(
        "Spectrum of the tangent kernel at initialisation against sparsity: Graphon NTK beside the exact kernel\n"
        f"width {args.width}, {args.samples} digits, mean of {args.seeds} networks, bars: standard deviation between "
        "them; a row has one scale\n"
        "Graphon NTK: with drift for snip and grasp in the CNN and the ResNet, from energies elsewhere",
        fontsize=11,
    )
    figure.savefig(path, dpi=100)


def _draw_curves(axis: Any, results: Results, args: argparse.Namespace, architecture: str, path: Any) -> None:
    axis.axhline(of_seeds(results, (architecture, "dense", 0.0), *path).mean(), color="0.3", lw=1, ls="--",
                 label="dense")  # fmt: skip
    for number, method in enumerate(METHODS):
        groups = [of_seeds(results, (architecture, method, s), *path) for s in args.sparsities]
        places = [100 * s + 0.6 * (number - (len(METHODS) - 1) / 2) for s in args.sparsities]
        bars = [spread(group) for group in groups] if args.seeds > 1 else None
        style = {"color": f"C{number}", "marker": "os^vD"[number], "ms": 3.5, "lw": 1.2, "capsize": 2}
        axis.errorbar(places, [group.mean() for group in groups], bars, label=method, **style)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def _share_y(axes: list[Any], logarithmic: bool) -> None:
    low = min(axis.dataLim.intervaly[0] for axis in axes)
    high = max(axis.dataLim.intervaly[1] for axis in axes)
    for number, axis in enumerate(axes):
        if logarithmic and low > 0:
            axis.set_yscale("log")
            axis.set_ylim(low / 1.2, high * 1.2)
            plain_ticks(axis)
        else:
            axis.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        axis.tick_params(labelleft=number == 0)


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; --quick changes the defaults only."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small networks, one seed: under a minute")
    parser.add_argument("--width", type=int, help="channels, neurons and token features")
    parser.add_argument("--samples", type=int, help="images of the kernel, at least 5")
    parser.add_argument("--sparsities", type=float, nargs="+", help="fraction of weights removed")
    parser.add_argument("--seeds", type=int, help="networks for each point")
    parser.add_argument("--out", type=Path, default=Path("runs") / "graphon_ntk_architectures")
    parser.set_defaults(**(QUICK if parser.parse_args(argv).quick else WHOLE))
    args = parser.parse_args(argv)
    if args.samples < 5 or args.seeds < 1:
        parser.error("at least 5 samples and 1 seed are needed")
    args.sparsities = sorted(set(args.sparsities))
    return args


def main(argv: list[str] | None = None) -> Results:
    """Run what is missing, write figure and table; returns the metrics of every network."""
    args = parse(argv)
    warnings.simplefilter("ignore", LayerCollapseWarning)  # an empty layer is seen in the kernel
    console = Console()
    results = run(args, console)
    files = [args.out / f"graphon_ntk_architectures.{kind}" for kind in ("csv", "png")]
    write_csv(results, files[0])
    draw(results, args, files[1])
    console.print("Written:", *(str(file) for file in files), sep="\n  ")
    return results


if __name__ == "__main__":
    main()
