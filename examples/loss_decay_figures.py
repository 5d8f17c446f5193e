"""Pictures of `loss_decay.py`: the curves, the correlations, and the networks one by one."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from loss_decay_metrics import FREE, FUNCTIONAL, KERNELS, LABELS, SPECTRAL
from rank_correlation import Correlation

from lightning_graphon.plots import new_figure

Results = Mapping[Any, Mapping[str, Any]]
STYLES = {"dense": ("0.25", "*"), "random": ("C0", "o"), "snip": ("C2", "^"), "synflow": ("C4", "D")}
NAMES = {"sgd": "SGD", "adam": "Adam"}
MEASURES = {"rate": "fitted decay rate of log L", "mean_fall": "mean fall of log L"}

# ---- curves


def draw_curves(results: Results, rates: Mapping[str, float], title: str, path: Path) -> None:
    """A row for each optimizer, a column for each sparsity: observed loss solid, predicted loss dashed."""
    sparsities = sorted({cell.sparsity for cell in results} - {0.0}) or [0.0]
    figure, axes = new_figure(len(rates), len(sparsities), cell=(2.7, 2.7))
    for (row, optimizer), (column, sparsity) in product(enumerate(rates), enumerate(sparsities)):
        axis = axes[row, column]
        for method in dict.fromkeys(cell.method for cell in results):
            _draw_method(axis, _curves(results, method, 0.0 if method == "dense" else sparsity, optimizer), method)
        axis.set_title(f"{sparsity:.0%} pruned" if row == 0 else "", fontsize=10)
        axis.set_xlabel("optimizer step" if row == len(rates) - 1 else "", fontsize=9)
        label = f"{NAMES[optimizer]}, learning rate {rates[optimizer]:g}\nloss of the probe batch"
        axis.set_ylabel(label if column == 0 else "", fontsize=9)
        axis.tick_params(labelsize=7, labelleft=column == 0)
        axis.grid(alpha=0.3)
    for row, optimizer in zip(axes, rates, strict=True):
        low, high = _observed_range(results, optimizer)
        for axis in row:
            axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    _legend(figure, axes[0, 0])
    _title(figure, "Loss: observed (solid, band: range of seeds) and predicted from the frozen kernel (dashed)", title)
    figure.savefig(path, dpi=100)


def _curves(results: Results, method: str, sparsity: float, optimizer: str) -> dict[str, np.ndarray]:
    """Name -> [seeds, steps]; NaN where there is no value."""
    chosen = [r[optimizer]["curves"] for cell, r in results.items() if cell[:2] == (method, sparsity)]
    return {name: np.array([curves[name] for curves in chosen], dtype=float) for name in chosen[0]}


def _draw_method(axis: Any, curves: Mapping[str, np.ndarray], method: str) -> None:
    step, observed, predicted = curves["step"][0], curves["observed"], curves["predicted"]
    color = STYLES[method][0]
    axis.plot(step, observed.mean(0), color=color, lw=1.6, label=method)
    axis.fill_between(step, observed.min(0), observed.max(0), color=color, alpha=0.2, lw=0)
    axis.plot(step, predicted.mean(0), color=color, lw=1.2, ls="--")


def _observed_range(results: Results, optimizer: str) -> tuple[float, float]:
    """Predictions that explode leave the picture."""
    losses = np.array([r[optimizer]["curves"]["observed"] for r in results.values()])
    return float(losses.min()), float(losses.max())


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)


def _title(figure: Any, what: str, of: str) -> None:
    """In lines that fit the figure."""
    figure.suptitle("\n".join(fill(line, int(12 * figure.get_figwidth())) for line in (what, of)), fontsize=11)


# ---- correlations


def draw_correlations(found: Mapping[tuple[str, str, str], Correlation], title: str, path: Path) -> None:
    """A panel for each optimizer and measure of decay, a row for each number, a mark for each kernel."""
    rows = [*SPECTRAL, *FUNCTIONAL, *FREE]
    figure, axes = new_figure(1, len(NAMES) * len(MEASURES), cell=(3.4, 6.2))
    for axis, (optimizer, measure) in zip(axes[0], product(NAMES, MEASURES), strict=True):
        for index, kernel in enumerate(KERNELS):
            named = {m: found[optimizer, measure, f"{kernel} {m}"] for m in (*SPECTRAL, *FUNCTIONAL)}
            _draw_intervals(axis, rows, named, 0.2 * index - 0.3, index)
        _draw_intervals(axis, rows, {m: found[optimizer, measure, m] for m in FREE}, 0.0, len(KERNELS))
        axis.axvline(0, color="0.4", lw=0.8)
        axis.set(xlim=(-1.03, 1.03), ylim=(len(rows) - 0.5, -0.5), title=f"{NAMES[optimizer]}\n{MEASURES[measure]}")
        axis.set_xlabel("Spearman's ρ")
        axis.set_yticks(range(len(rows)), [LABELS[row] for row in rows] if axis is axes[0, 0] else [""] * len(rows))
        axis.grid(axis="x", alpha=0.3)
    _legend(figure, axes[0, 0])
    _title(figure, "Which number at initialisation says how fast the loss falls? Bars: 95 % intervals", title)
    figure.savefig(path, dpi=100)


def _draw_intervals(axis: Any, rows: list[str], found: Mapping[str, Correlation], offset: float, number: int) -> None:
    places = np.array([rows.index(metric) for metric in found]) + offset
    rho, low, high = (np.array([getattr(c, name) for c in found.values()]) for name in ("rho", "low", "high"))
    label = [*KERNELS.values(), "without a kernel, or the callback's own"][number]
    style = {"marker": "os^Dv"[number], "color": ["k", "C0", "C1", "C2", "C3"][number], "ms": 4, "lw": 1, "ls": "none"}
    # An interval of percentiles need not hold ρ itself.
    bars = np.stack([np.maximum(rho - low, 0), np.maximum(high - rho, 0)])
    axis.errorbar(rho, places, xerr=bars, label=label, **style)


# ---- networks one by one

SHOWN = ("exact speed", "exact predicted_fall", "exact energy_concentration", "gradient_l1")


def draw_scatter(results: Results, seen: Mapping[Any, float], title: str, path: Path) -> None:
    """A row for each optimizer, a column for some numbers at initialisation, a point for each network.

    Args:
        results: By network.
        seen: Mean fall of log L, by network and optimizer.
        title: What the networks are.
        path: File of the picture.
    """
    figure, axes = new_figure(len(NAMES), len(SHOWN), cell=(2.9, 2.7))
    for (row, optimizer), (column, metric) in product(enumerate(NAMES), enumerate(SHOWN)):
        axis = axes[row, column]
        for method in dict.fromkeys(cell.method for cell in results):
            _draw_networks(axis, results, seen, method, optimizer, metric)
        _scale(axis, metric)
        name = LABELS[metric.removeprefix("exact ")]
        axis.set_xlabel(name if row == len(NAMES) - 1 else "", fontsize=9)
        axis.set_ylabel(f"{NAMES[optimizer]}\n{MEASURES['mean_fall']}" if column == 0 else "", fontsize=9)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3)
    _legend(figure, axes[0, 0])
    _title(figure, "Numbers at initialisation and observed decay; larger marks are denser networks", title)
    figure.savefig(path, dpi=100)


def _draw_networks(
    axis: Any, results: Results, seen: Mapping[Any, float], method: str, optimizer: str, metric: str
) -> None:
    chosen = [cell for cell in results if cell.method == method]
    sizes = [10 + 60 * (1 - cell.sparsity) for cell in chosen]
    said, falls = [results[cell]["metrics"][metric] for cell in chosen], [seen[cell, optimizer] for cell in chosen]
    color, marker = STYLES[method]
    axis.scatter(said, falls, s=sizes, color=color, marker=marker, alpha=0.7, lw=0, label=method)


def _scale(axis: Any, metric: str) -> None:
    """Logarithmic but for shares."""
    (x_low, _), (y_low, _) = axis.dataLim.intervalx, axis.dataLim.intervaly
    if x_low > 0 and "concentration" not in metric:
        axis.set_xscale("log")
    if y_low > 0:
        axis.set_yscale("log")
