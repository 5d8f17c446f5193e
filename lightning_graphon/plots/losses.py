"""Predicted and observed loss, for one network or several."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from lightning_graphon._shared.checks import checked
from lightning_graphon.plots.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHORT = 5  # times as many steps as were predicted
_BAND = "#0f766e"
# Colour, line and words of each curve, in the order in which they are drawn.
_STYLES = {
    "observed": ("#1b1b1b", "-", "observed"),
    "rehearsed": (_BAND, "-", "rehearsal: the network itself, on other data"),
    "predicted": ("#c2410c", "--", "theory: the network linearised at the start"),
    "refreshed": ("#0369a1", ":", "theory, since the last refresh"),
    "sibling": ("#7c3aed", "-.", "sibling: drawn from the graphons"),
    "power_law": ("#a3a3a3", ":", "power law of the first 20 losses"),
}
Curves: TypeAlias = Mapping[str, Mapping[int, float]]
Band: TypeAlias = tuple[Tensor, Tensor, Tensor]


@checked
def plot_loss_decay(
    curves: Curves,
    *,
    band: Band | None = None,
    invalid_from: int | None = None,
    lazy_until: int | None = None,
    shares: Tensor | None = None,
    title: str = "",
) -> "Figure":
    """Predicted and observed loss against optimizer steps, and the kernel modes that carry the fall.

    The axis has room for the observed loss; the legend says where another curve is cut off, and how far it goes.

    Args:
        curves: "observed", and where there are any "predicted", "refreshed", "rehearsed", "sibling" and "power_law":
            step -> loss.
        band: Steps, lower and upper losses of the rehearsals.
        invalid_from: Step from which the prediction no longer holds.
        lazy_until: Step at which theory, the predicted curve, leaves that band.
        shares: Share of the initial fall of the loss in each mode of the kernel, the largest eigenvalue first.
        title: Title of the whole figure.
    """
    if "observed" not in curves:
        raise ValueError("curves must have observed losses")
    columns = 1 if shares is None else 2
    figure, axes = new_figure(1, columns, cell=(5.0, 3.7), layout=None)  # fits TensorBoard's cards
    figure.subplots_adjust(left=0.14 / columns, right=0.98, bottom=0.4, top=0.95 - 0.03 * columns, wspace=0.28)
    _draw_losses(axes[0, 0], curves, band, invalid_from, lazy_until)
    axes[0, 0].legend(
        fontsize=7, handlelength=1.8, frameon=False, loc="upper left", bbox_to_anchor=(-0.14, -0.2), ncols=2
    )
    if shares is not None:
        _draw_shares(axes[0, 1], shares)
    figure.suptitle(title, fontsize=9)
    return figure


@checked
def plot_loss_decays(
    curves: Mapping[str, Curves], invalid_from: Mapping[str, int | None] | None = None, title: str = "", *,
    bands: Mapping[str, Band] | None = None, lazy_until: Mapping[str, int | None] | None = None,
) -> "Figure":  # fmt: skip
    """Predicted and observed loss of several networks, side by side.

    Args:
        curves: Label -> curves as in `plot_loss_decay`.
        invalid_from: Label -> step from which the prediction no longer holds.
        title: Title of the whole figure.
        bands: Label -> steps, lower and upper losses of the rehearsals.
        lazy_until: Label -> step at which theory leaves that band.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not curves or not all("observed" in own for own in curves.values()):
        raise ValueError("no curves to draw: give at least one network with observed losses")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = new_figure(rows, columns, cell=(3.4, 2.6))
    handles: dict[str, Any] = {}
    for axis, (label, own) in zip(axes.flat, curves.items(), strict=False):
        _draw_losses(
            axis, own, (bands or {}).get(label), (invalid_from or {}).get(label), (lazy_until or {}).get(label)
        )
        axis.set_title(label, fontsize=9)
        labelled = zip(*axis.get_legend_handles_labels(), strict=True)
        # One entry for all panels: without the numbers of each.
        handles.update({re.split(r"\n| at step", text)[0]: line for line, text in labelled})
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_losses(
    axis: Any, curves: Curves, band: Band | None, invalid_from: int | None,
    lazy_until: int | None = None,
) -> None:  # fmt: skip
    # Predictions may be infinite or far off, so the observed curve gives the limits.
    low, high = _range([value for value in curves["observed"].values() if math.isfinite(value)])
    for name, (color, line, label) in _STYLES.items():
        if curves.get(name):
            label += _cut(curves[name], low, high)
            style = {"color": color, "ls": line, "lw": 1.4, "label": label}
            # What was measured lies on what was predicted.
            axis.plot(list(curves[name]), list(curves[name].values()), zorder=3 if name == "observed" else 2, **style)
    last = max(curves["observed"], default=0)
    if band is not None:
        at, lower, upper = (t.double().cpu().numpy() for t in band)
        ends = [_cut(dict(zip(at.astype(int), end, strict=True)), low, high) for end in (upper, lower)]
        axis.fill_between(
            at, lower, upper, color=_BAND, alpha=0.25, lw=0, label=f"its band and the tolerance{ends[0] or ends[1]}"
        )
        last = max(last, int(at[-1]))
    theory = curves.get("predicted")
    if lazy_until is not None and theory:
        value = theory.get(lazy_until, min(theory.items(), key=lambda point: abs(point[0] - lazy_until))[1])
        axis.plot([lazy_until], [value], "x", color="#c2410c", ms=6, label=f"theory ends at step {lazy_until}")
    if invalid_from is not None:
        axis.axvspan(invalid_from, last, color="0.5", alpha=0.13, lw=0, label="the prediction no longer holds")
    short = [max(c) for n, c in curves.items() if c and n in ("predicted", "rehearsed")]
    if short and last > _SHORT * max(short):  # a prediction of a hundredth of the run would be a stroke at the left
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(0, last)
    if low > 0:
        axis.set_yscale("log")
        few_ticks(axis, high / low)
    axis.set_ylim(low, high)
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.set_ylabel("loss of the probe batch", fontsize=8)
    axis.tick_params(labelsize=7, which="both")


def _cut(curve: Mapping[int, float], low: float, high: float) -> str:
    """In words, where a curve leaves the axis and how far it goes."""
    outside = {step: value for step, value in curve.items() if not low <= value <= high}
    if not outside:
        return ""
    most, least = max(outside.values()), min(outside.values())
    return f"\n(cut off from step {min(outside)}, reaches {most if most > high else least:.3g})"


def few_ticks(axis: Any, ratio: float) -> None:
    """Plain numbers on a logarithmic axis, at least three, also where powers of ten are few."""
    from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter

    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if ratio < 10 else (1.0, 2.0, 5.0) if ratio < 1000 else (1.0,)
    axis.yaxis.set_major_locator(AutoLocator() if ratio < 5 else LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _range(observed: list[float]) -> tuple[float, float]:
    """Limits around the observed curve with room for predictions that are wrong, but not for ones that explode."""
    if not observed:
        return 0.0, 1.0
    low, high = min(observed), max(observed)
    if low > 0:
        return 0.75 * low, 1.3 * high
    room = 0.3 * max(high - low, 1e-12)
    return low - room, high + room


def _draw_shares(axis: Any, shares: Tensor) -> None:
    total = shares.detach().double().cpu().flatten().cumsum(0)
    axis.semilogx(torch.arange(1, len(total) + 1).numpy(), total.numpy(), drawstyle="steps-post")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("number of largest kernel modes", fontsize=8)
    axis.set_ylabel("share of the initial fall", fontsize=8)
    axis.set_title(f"top five modes: {float(total[:5][-1]):.0%}", fontsize=8)
    axis.tick_params(labelsize=7, which="both")
