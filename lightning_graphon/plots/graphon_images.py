"""`plot_graphons` in pixels, for callbacks."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from lightning_graphon._shared.checks import checked
from lightning_graphon.graphon import HomogeneityTest, StepGraphon
from lightning_graphon.graphon.core.partition import edges
from lightning_graphon.plots.canvas import Canvas, map_colours
from lightning_graphon.plots.graphons import COLOUR_TICKS, p_value_text

# TensorBoard's cards are about 370 x 235 pixels: text of 9 points can be read there in pictures up to 400 x 290.
_SIDE, _GAP, _MARGIN = 160, 4, 24  # of the cells, between them and the degree functions, height of those
_LEFT, _TOP = 46, 80  # of the cells
_COLUMNS, _SMALL, _STEP = 3, 92, (118, 122)  # of the overview: layers in a row, side, from one to the next
_DEGREES = 102  # grey


@checked
def graphon_image(
    graphons: Mapping[str, StepGraphon],
    tests: Mapping[str, HomogeneityTest] | None = None,
    title: str = "",
    *,
    scale: float = 1.0,
) -> Image.Image:
    """Graphons of layers: one with its degree functions as in `plot_graphons`, or an overview with three in a row.

    Args:
        graphons: Layer name -> graphon.
        tests: Layer name -> outcome of the homogeneity test, for the picture of one layer.
        title: Title of the picture; an overview's may have two lines.
        scale: 1 is 100 dots an inch.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not graphons:
        raise ValueError("no graphons to draw: give at least one layer")
    if len(graphons) > 1:
        return _overview(graphons, title, scale)
    ((name, graphon),) = graphons.items()
    test = (tests or {}).get(name)
    canvas = Canvas(350, 262, scale)
    canvas.text(175, 12, f"{_short(name, 36)}{title and ', '}{title}", 9)
    verdict = f", {test.verdict}, p {p_value_text(test.p_value)}" if test else ""
    canvas.text(175, 28, f"density {graphon.density:.1%}{verdict}", 9)
    _draw(canvas, _LEFT, _TOP, graphon)
    _colour_bar(canvas, 262, _TOP, _SIDE)
    canvas.text(326, _TOP + _SIDE / 2, "W: chance that a weight is kept", 8, upright=True)
    return canvas.image


def _overview(graphons: "Mapping[str, StepGraphon]", title: str, scale: float) -> Image.Image:
    """The cells alone, with name and density."""
    lines, rows = title.split("\n"), -(-len(graphons) // _COLUMNS)
    top = 10 + 15 * len(lines)
    canvas = Canvas(410, top + rows * _STEP[1] + 16, scale)
    for number, line in enumerate(lines):
        canvas.text(205, 12 + 15 * number, line, 9)
    for index, (name, graphon) in enumerate(graphons.items()):
        row, column = divmod(index, _COLUMNS)
        x, y = 18 + column * _STEP[0], top + row * _STEP[1]
        _paint_cells(canvas, x, y, _SMALL, graphon)
        canvas.text(x + _SMALL / 2, y + _SMALL + 9, _short(name.removesuffix(".weight"), 17), 9)
        canvas.text(x + _SMALL / 2, y + _SMALL + 22, f"{graphon.density:.1%} kept", 9)
    _colour_bar(canvas, 368, top, _SMALL, COLOUR_TICKS[::3])
    canvas.text(205, canvas.image.height / scale - 9, "rows: outputs, columns: inputs; colour: chance to be kept", 8)
    return canvas.image


def _short(name: str, most: int) -> str:
    """The end of a name: layers of one network begin alike."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _draw(canvas: Canvas, x: float, y: float, graphon: StepGraphon) -> None:
    """The cells, and the two degree functions above and to the right, all on [0, 1]."""
    across, down = (edges(measure.cpu()).numpy() for measure in (graphon.col_measure, graphon.row_measure))
    incoming, outgoing = (d.detach().cpu().numpy() for d in (graphon.row_degree, graphon.col_degree))
    end, beside, above = _SIDE, x + _SIDE + _GAP, y - _GAP
    _paint_cells(canvas, x, y, end, graphon)
    canvas.paint(x, above - _MARGIN, x + end, above, lambda v, u: _filled(1 - v[:, None] < outgoing[_cell(across, u)]))
    canvas.paint(beside, y, beside + _MARGIN, y + end, lambda v, u: _filled(u < incoming[_cell(down, v)][:, None]))
    for line in ((x, above, x + end, above), (x, above - _MARGIN, x, above)):
        canvas.box(*line)
    for line in ((beside, y, beside, y + end), (beside, y + end, beside + _MARGIN, y + end)):
        canvas.box(*line)
    canvas.text(x + end / 2, above - _MARGIN - 8, "degree (fraction of possible weights)", 8)
    canvas.text(x + end / 2, y + end + 12, "v, inputs", 9)
    canvas.text(x - 30, y + end / 2, "u, outputs", 9, upright=True)
    # The degree's 0 above the cells and their own are one label, as are the cells' 1 and the degree's 0 beside them.
    for at, label, anchor in (
        ((x - 7, above - _MARGIN), "1", "rm"), ((x - 7, y - _GAP / 2), "0", "rm"), ((x - 7, y + end), "1", "rm"),
        ((x, y + end + 6), "0", "mt"), ((x + end - 3, y + end + 6), "1", "mt"), ((beside + 5, y + end + 6), "0", "mt"),
        ((beside + _MARGIN, y + end + 6), "1", "mt"),
    ):  # fmt: skip
        canvas.text(*at, label, 8, anchor)
    for tick in (above - _MARGIN, above, y, y + end):
        canvas.box(x - 4, tick, x, tick)
    for tick in (x, x + end, beside, beside + _MARGIN):
        canvas.box(tick, y + end, tick, y + end + 4)


def _paint_cells(canvas: Canvas, x: float, y: float, side: float, graphon: "StepGraphon") -> None:
    across, down = (edges(measure.cpu()).numpy() for measure in (graphon.col_measure, graphon.row_measure))
    # The square root shows the structure of sparse layers.
    cells = np.sqrt(graphon.values.detach().double().cpu().numpy().clip(0, 1))
    canvas.paint(x, y, x + side, y + side, lambda v, u: map_colours(cells[_cell(down, v)][:, _cell(across, u)]))
    canvas.frame(x, y, x + side, y + side)


def _colour_bar(canvas: Canvas, x: float, y: float, side: float, ticks: Sequence[float] = COLOUR_TICKS) -> None:
    canvas.paint(x, y, x + 12, y + side, lambda v, u: map_colours((1 - v)[:, None] + 0 * u))
    canvas.frame(x, y, x + 12, y + side)
    for tick in ticks:
        at = y + side * (1 - tick**0.5)
        canvas.box(x + 12, at, x + 15, at)
        canvas.text(x + 17, at, f"{tick:g}", 8, "lm")


def _cell(ends: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Number of the interval that each place is in."""
    return np.searchsorted(ends[1:-1], at, side="right")


def _filled(inside: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(inside, _DEGREES, 255).astype(np.uint8))
