"""A figure outside pyplot: no global state, nothing to close."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(rows: int, columns: int, cell: tuple[float, float], layout: Any = "constrained") -> tuple["Figure", Any]:
    """An Agg figure outside pyplot with a grid of axes, [rows, columns]; `cell` is (width, height) in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * cell[0], rows * cell[1]), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_parse_math(False)  # names of layers may have dollar signs
    return figure, axes
