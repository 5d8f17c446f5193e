"""`plot_spectrum` in pixels, for callbacks."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lightning_graphon._shared.checks import checked
from lightning_graphon.ntk import SpectralSummary
from lightning_graphon.plots.canvas import BLUE, GREY, Canvas

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@checked
def spectrum_image(spectrum: SpectralSummary, title: str = "", *, scale: float = 1.0) -> Image.Image:
    """Eigenvalues of a kernel as in the first chart of `plot_spectrum`.

    Args:
        spectrum: What `spectral_summary` returned.
        title: Title of the picture, up to two lines; it should say which kernel this is.
        scale: 1 is 100 dots an inch.
    """
    fine = Canvas(400, 260, 2 * scale)
    values = spectrum.eigenvalues.detach().double().cpu().numpy()
    x, y = _draw_eigenvalues(fine, values, spectrum)
    canvas = fine.halved()
    _write_eigenvalues(canvas, x, y, values, spectrum)
    for number, line in enumerate(title.split("\n")):
        canvas.text(200, 12 + 14 * number, line, 9)
    return canvas.image


@dataclass(frozen=True)
class _Axis:
    """Numbers from `low` to `high`, logarithmic, along the pixels from `start` to `end`."""

    start: float
    end: float
    low: float
    high: float

    def at(self, value: np.ndarray | float) -> np.ndarray:
        """Place of a number."""
        low, high, number = (np.log10(v) for v in (self.low, self.high, value))
        place: np.ndarray = self.start + (self.end - self.start) * (number - low) / (high - low)
        return place


def _draw_eigenvalues(canvas: Canvas, values: np.ndarray, spectrum: SpectralSummary) -> tuple[_Axis, _Axis]:
    """Dots, the fit, and their legend's; the axes."""
    index = np.arange(1, len(values) + 1)
    positive = values > 0
    fit = np.exp(spectrum.decay_offset) * np.array([1.0, len(values)]) ** -spectrum.decay_rate
    x, y = _index_axis(66, 390, len(values)), _value_axis(212, 40, np.append(values[positive], fit))
    canvas.dots(x.at(index[positive]), y.at(values[positive]), 4, BLUE)
    canvas.line(x.at(np.array([1.0, len(values)])), y.at(fit), 1.5, GREY, dash=(6, 3))
    canvas.dots([220], [52], 4, BLUE)
    canvas.line([208, 231], [67, 67], 1.5, GREY, dash=(6, 3))
    return x, y


def _write_eigenvalues(canvas: Canvas, x: _Axis, y: _Axis, values: np.ndarray, spectrum: SpectralSummary) -> None:
    _frame(canvas, x, y)
    hidden = int((values <= 0).sum())
    _name(
        canvas, x, y, "index k" + f", {hidden} not positive are not shown" * (hidden > 0), "eigenvalue λ of the kernel"
    )
    canvas.text(238, 52, "eigenvalues", 9, "lm")
    canvas.text(238, 67, f"fit, λ ∝ k^(−{spectrum.decay_rate:.2f})", 9, "lm")
    canvas.text(238, 82, f"top five: {spectrum.energy_concentration:.1%} of trace", 9, "lm")


def _index_axis(start: float, end: float, count: int) -> _Axis:
    room = max(count, 2) ** 0.05
    return _Axis(start, end, 1 / room, max(count, 2) * room)


def _value_axis(start: float, end: float, values: np.ndarray) -> _Axis:
    """Room for all values, at least a decade."""
    low, high = float(values.min()), float(values.max())
    room = max((high / low) ** 0.05, (10 * low / high) ** 0.5 if high < 10 * low else 1.0)
    return _Axis(start, end, low / room, high * room)


def _frame(canvas: Canvas, x: _Axis, y: _Axis) -> None:
    """The box of a chart, its ticks and their numbers."""
    canvas.frame(x.start, y.end, x.end, y.start)
    for axis, upwards in ((x, False), (y, True)):
        labelled, bare = _log_ticks(axis.low, axis.high)
        for length, ticks in ((5, [float(v) for v in labelled]), (3, bare)):
            for at in axis.at(np.array(ticks)):
                canvas.box(*((x.start - length, at, x.start, at) if upwards else (at, y.start, at, y.start + length)))
        for value, label in labelled.items():
            at = float(axis.at(value))
            canvas.text(*((x.start - 8, at, label, 9, "rm") if upwards else (at, y.start + 6, label, 9, "mt")))


def _log_ticks(low: float, high: float) -> tuple[dict[float, str], list[float]]:
    """Numbers on a logarithmic axis with their labels, and those without: powers of ten where there are several.

    >>> _log_ticks(0.5, 200.0)[0]
    {1.0: '10⁰', 10.0: '10¹', 100.0: '10²'}
    >>> _log_ticks(3.0, 30.0)[0]
    {5.0: '5', 10.0: '10', 20.0: '20'}
    """
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    between = [m * 10.0**n for n in range(first - 1, last + 1) for m in range(2, 10)]
    bare = [value for value in between if low <= value <= high]
    if last > first:
        every = range(first, last + 1, -(-(last - first + 1) // 8))
        return {10.0**n: f"10{str(n).translate(_SUPERSCRIPTS)}" for n in every}, bare if last - first < 8 else []
    few = [m * 10.0**n for n in range(first - 1, last + 1) for m in (1, 2, 5)]
    return {value: f"{value:g}" for value in few if low <= value <= high}, bare


def _name(canvas: Canvas, x: _Axis, y: _Axis, along: str, upwards: str) -> None:
    canvas.text((x.start + x.end) / 2, y.start + 36, along, 9)
    canvas.text(x.start - 54, (y.start + y.end) / 2, upwards, 9, upright=True)
