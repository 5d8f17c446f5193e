"""`plot_graphons` in pixels, for callbacks."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from lightning_graphon._shared.checks import checked
from lightning_graphon.graphon import HomogeneityTest, StepGraphon
from lightning_graphon.plots.canvas import Canvas, map_colours
from lightning_graphon.plots.graphons import COLOUR_TICKS, edges, p_value_text

_SIDE, _GAP, _MARGIN = 192, 5, 34  # of the cells, between them and the degree functions, height of those
_LEFT, _TOP = 46, 94  # of the first cells
_STEP = (272, 306)  # from one layer to the next
_COLUMNS = 8
_NAME = 32  # characters that fit under a picture
_DEGREES = 102  # grey


@checked
def graphon_image(
    graphons: Mapping[str, StepGraphon],
    tests: Mapping[str, HomogeneityTest] | None = None,
    title: str = "",
    *,
    scale: float = 1.0,
) -> Image.Image:
    """Graphons of the layers of one network as in `plot_graphons`, eight in a row.

    Args:
        graphons: Layer name -> graphon.
        tests: Layer name -> outcome of the homogeneity test.
        title: Title of the picture.
        scale: 1 is 100 dots an inch.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not graphons:
        raise ValueError("no graphons to draw: give at least one layer")
    columns, rows = min(_COLUMNS, len(graphons)), -(-len(graphons) // _COLUMNS)
    width, height = _LEFT + columns * _STEP[0] + 60, _TOP - 50 + rows * _STEP[1]
    canvas = Canvas(width, height, scale)
    canvas.text(width / 2, 15, title, 12)
    for index, (name, graphon) in enumerate(graphons.items()):
        row, column = divmod(index, _COLUMNS)
        x, y = _LEFT + column * _STEP[0], _TOP + row * _STEP[1]
        _draw(canvas, x, y, graphon)
        test = (tests or {}).get(name)
        verdict = f"{test.verdict}, p {p_value_text(test.p_value)}" if test else ""
        short = name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
        for line, text in enumerate((short, f"density {graphon.density:.1%}", verdict)):
            canvas.text(x + _SIDE / 2, y + _SIDE + 25 + 13 * line, text, 9)
        if column == 0:
            canvas.text(x - 26, y + _SIDE / 2, "u, outputs", 9, upright=True)
    _colour_bar(canvas, width - 66, _TOP)
    return canvas.image


def _draw(canvas: Canvas, x: float, y: float, graphon: StepGraphon) -> None:
    """The cells, and the two degree functions above and to the right, all on [0, 1]."""
    across, down = (edges(measure).numpy() for measure in (graphon.col_measure, graphon.row_measure))
    # The square root shows the structure of sparse layers.
    cells = np.sqrt(graphon.values.detach().double().cpu().numpy().clip(0, 1))
    incoming, outgoing = (d.detach().cpu().numpy() for d in (graphon.row_degree, graphon.col_degree))
    end, beside, above = _SIDE, x + _SIDE + _GAP, y - _GAP
    canvas.paint(x, y, x + end, y + end, lambda v, u: map_colours(cells[_cell(down, v)][:, _cell(across, u)]))
    canvas.paint(x, above - _MARGIN, x + end, above, lambda v, u: _filled(1 - v[:, None] < outgoing[_cell(across, u)]))
    canvas.paint(beside, y, beside + _MARGIN, y + end, lambda v, u: _filled(u < incoming[_cell(down, v)][:, None]))
    canvas.frame(x, y, x + end, y + end)
    for line in ((x, above, x + end, above), (x, above - _MARGIN, x, above)):
        canvas.box(*line)
    for line in ((beside, y, beside, y + end), (beside, y + end, beside + _MARGIN, y + end)):
        canvas.box(*line)
    canvas.text(x + end / 2, above - _MARGIN - 10, "degree (fraction of possible weights)", 8)
    canvas.text(x + end / 2, y + end + 11, "v, inputs", 9)
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


def _colour_bar(canvas: Canvas, x: float, y: float) -> None:
    canvas.paint(x, y, x + 12, y + _SIDE, lambda v, u: map_colours((1 - v)[:, None] + 0 * u))
    canvas.frame(x, y, x + 12, y + _SIDE)
    for tick in COLOUR_TICKS:
        at = y + _SIDE * (1 - tick**0.5)
        canvas.box(x + 12, at, x + 15, at)
        canvas.text(x + 17, at, f"{tick:.2f}", 8, "lm")
    canvas.text(x + 54, y + _SIDE / 2, "W: probability that a weight is kept", 8, upright=True)


def _cell(ends: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Number of the interval that each place is in."""
    return np.searchsorted(ends[1:-1], at, side="right")


def _filled(inside: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(inside, _DEGREES, 255).astype(np.uint8))
