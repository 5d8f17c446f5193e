"""Figures of graphon_flow.py."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_graphon.graphon import FlowPoint
from lightning_graphon.plots import new_figure, plot_graphon_flow

STARTS, NAMES = ("random", "snip", "synflow"), {"random": "random", "snip": "SNIP", "synflow": "SynFlow"}
COLOURS = {"random": "tab:blue", "snip": "tab:orange", "synflow": "tab:green"}
CASES = {"mnist": "MLP on MNIST", "digits": "CNN on digits"}
TICKETS = {
    "exact": "RigL's last masks", "graphon 16": "drawn from their graphons, 16 bins",
    "graphon 4": "drawn from their graphons, 4 bins", "degrees": "random of the same degrees",
}  # fmt: skip
Results = Mapping[Any, Mapping[str, np.ndarray]]


def draw(results: Results, rows: list[dict[str, Any]], args: argparse.Namespace) -> list[Path]:
    """All figures of each sparsity; where they are."""
    written = []
    for sparsity in args.sparsities:
        for name, figure in (
            ("paths", draw_paths(results, args, sparsity)),
            ("accuracy", draw_accuracy(rows, args, sparsity)),
            ("kernels", draw_kernels(rows, args, sparsity)),
            ("pictures", draw_pictures(results, args, sparsity)),
        ):
            written.append(args.out / f"{name}_s{100 * sparsity:g}.png")
            figure.savefig(written[-1], dpi=130)
    return written


def layers(found: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the layers."""
    return [key.removeprefix("looks/") for key in found if key.startswith("looks/")]


def draw_paths(results: Results, args: argparse.Namespace, sparsity: float) -> Any:
    """Paths of the second layer in the plane of the distances from SynFlow's and from SNIP's own masks."""
    figure, axes = new_figure(len(args.cases), 2, (3.9, 4.0))
    for row, case in zip(axes, args.cases, strict=True):
        own = {cell[2:]: found for cell, found in results.items() if cell[:2] == (case, sparsity)}
        layer = layers(next(iter(own.values())))[1]
        for axis, method in zip(row, ("set", "rigl"), strict=True):
            ends = [_draw_path(axis, own, method, start, layer, args.seeds) for start in STARTS]
            largest = 1.12 * max(map(max, ends))
            axis.plot([0, largest], [0, largest], color="grey", lw=0.8, ls=":")
            axis.text(0.72 * largest, 0.78 * largest, "equally far", color="grey", fontsize=8, rotation=45, ha="center")
            axis.set(xlim=(0, largest), ylim=(0, largest), aspect="equal")
            axis.set_title(f"{CASES[case]}: {method.upper() if method == 'set' else 'RigL'}", fontsize=10)
            axis.set_xlabel("L2 distance from SynFlow's graphon", fontsize=9)
            axis.set_ylabel("L2 distance from SNIP's graphon", fontsize=9)
    axes[0][0].legend(fontsize=8, title="start (○), end (●)", title_fontsize=8, loc="upper left")
    figure.suptitle(
        f"Second layer, {sparsity:.0%} pruned: where masks go\nthin: each of {args.seeds} networks, bold: their mean",
        fontsize=11,
    )
    return figure


def _draw_path(
    axis: Any, own: Mapping[Any, Any], method: str, start: str, layer: str, seeds: int
) -> tuple[float, float]:
    """Largest coordinates."""
    paths = []
    for seed in range(seeds):
        targets = [
            np.mean([own[s, "static", kind][f"looks/{layer}"][0] for s in range(seeds) if s != seed], axis=0)
            for kind in ("synflow", "snip")
        ]
        looks = own[seed, method, start][f"looks/{layer}"]
        paths.append([np.sqrt(((looks - target) ** 2).mean((1, 2))) for target in targets])
        axis.plot(*paths[-1], color=COLOURS[start], lw=0.6, alpha=0.4)
    x, y = np.mean(paths, axis=0)
    axis.plot(x, y, color=COLOURS[start], lw=2, label=NAMES[start])
    axis.plot(x[:1], y[:1], "o", color=COLOURS[start], mfc="white", ms=7, zorder=3)
    axis.plot(x[-1:], y[-1:], "o", color=COLOURS[start], ms=7, zorder=3)
    return float(x.max()), float(y.max())


def draw_accuracy(rows: list[dict[str, Any]], args: argparse.Namespace, sparsity: float) -> Any:
    """Accuracy of every arm with its interval, a panel for each case."""
    figure, axes = new_figure(1, len(args.cases), (5.6, 4.2))
    for axis, case in zip(axes[0], args.cases, strict=True):
        own = [r for r in rows if (r["case"], r["sparsity"], r["layer"]) == (case, sparsity, "all")]
        labels = []
        for row in own:
            place = -len(labels) - 0.7 * (row["method"] == "ticket") - 0.35 * (row["method"] != "static")
            colour = COLOURS.get(row["start"], "black")
            axis.errorbar(
                row["accuracy"], place, xerr=row["accuracy_half"], fmt="o", color=colour, ms=5, capsize=3, lw=1.2
            )
            labels.append((place, _label(row)))
        first = next(r for r in own if (r["method"], r["start"]) == ("rigl", "random"))
        axis.axvline(first["accuracy"], color="tab:blue", lw=0.8, ls=":")
        axis.set_yticks([place for place, _ in labels], [label for _, label in labels], fontsize=8)
        axis.set_title(CASES[case], fontsize=10)
        axis.set_xlabel("held-out accuracy, %", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle(
        f"{sparsity:.0%} pruned, equal layer densities, {args.seeds} networks each, 95 % intervals\n"
        "black: masks that stay from the start, made of what RigL found from random (dotted)",
        fontsize=10,
    )
    return figure


def _label(row: Mapping[str, Any]) -> str:
    if row["method"] == "ticket":
        return TICKETS[row["start"]]
    method = {"static": "static", "set": "SET", "rigl": "RigL"}[row["method"]]
    return f"{method}, {NAMES[row['start']]}" if method == "static" else f"{method} from {NAMES[row['start']]}"


def draw_kernels(rows: list[dict[str, Any]], args: argparse.Namespace, sparsity: float) -> Any:
    """Accuracy of the network against that of its kernel: of the last masks at first weights, and of the end."""
    figure, axes = new_figure(len(args.cases), 2, (4.4, 3.6))
    kinds = (("last_masks", "last masks on the first weights"), ("end", "last masks, trained weights"))
    for row, case in zip(axes, args.cases, strict=True):
        own = [r for r in rows if (r["case"], r["sparsity"], r["layer"]) == (case, sparsity, "all")]
        for axis, (when, words) in zip(row, kinds, strict=True):
            for r in own:
                marker = {"static": "s", "set": "^", "rigl": "o", "ticket": "x"}[r["method"]]
                colour = COLOURS.get(r["start"], "black")
                axis.plot(100 * r[f"kernel_accuracy_{when}"], r["accuracy"], marker, color=colour, ms=6)
            axis.set_title(f"{CASES[case]}: {words}", fontsize=9)
            axis.set_xlabel("accuracy of regression with the exact NTK, %", fontsize=8)
            axis.set_ylabel("accuracy of the network, %", fontsize=8)
            axis.tick_params(labelsize=8)
    handles = [axes[0][0].plot([], [], m, color="grey", ms=6)[0] for m in "s^ox"]
    axes[0][0].legend(handles, ["static", "SET", "RigL", "tickets"], fontsize=7, loc="best")
    figure.suptitle("Does the tangent kernel explain it?\nblue, orange, green: from random, SNIP, SynFlow", fontsize=10)
    return figure


def draw_pictures(results: Results, args: argparse.Namespace, sparsity: float) -> Any:
    """The flow of all layers of one network under RigL from a random start."""
    case = args.cases[0]
    found = next(f for cell, f in results.items() if cell == (case, sparsity, 0, "rigl", "random"))
    flows = {name: _points(found, name) for name in layers(found)}
    return plot_graphon_flow(flows, f"RigL from random masks, {CASES[case]}, {sparsity:.0%} pruned, first network")


def _points(found: Mapping[str, np.ndarray], layer: str) -> list[FlowPoint]:
    """Cells are kept of start, middle and end only, which are those that are drawn."""
    path, degrees = found[f"path/{layer}"], torch.from_numpy(found[f"degrees/{layer}"])
    start, middle, end = torch.from_numpy(found[f"cells/{layer}"])
    cells = [start, *[middle] * (len(path) - 2), end]
    return [
        FlowPoint(
            step=int(step), cells=cells[i], moved=moved, moved_last=0.0, by_chance=chance, limit_distance=constant,
            churn=churn, dead=int(dead), revived=0, row_degrees=degrees[i, :5], col_degrees=degrees[i, 5:],
        )
        for i, (step, moved, chance, constant, churn, dead) in enumerate(path)
    ]  # fmt: skip
