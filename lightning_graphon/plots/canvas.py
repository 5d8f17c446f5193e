"""Pictures straight in pixels: text, boxes and antialiased lines, a hundred times cheaper than a figure's artists.

Where a picture is drawn while a network trains, this is what it costs. Lengths are in pixels at 100 dots an inch, sizes
of text in points, y runs down. A pixel is the number of a colour in one palette: shades of grey, of blue, and a colour
map.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lightning_graphon.plots.picture import Picture

_POINT = 100 / 72
_GREYS, _BLUES, _MAP = 46, 26, 184  # colours of each kind in the palette, in this order; number 0 is white
Paint = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Ink(NamedTuple):
    """Shades of one colour in the palette, from the paper's white to full cover.

    Attributes:
        before: Number of the colour before the first shade.
        shades: How many there are; the last covers fully.
    """

    before: int
    shades: int

    def at(self, cover: np.ndarray) -> np.ndarray:
        """Numbers of the colours where `cover`, bytes, is 0 to 255."""
        return _shades(self)[cover]

    @property
    def full(self) -> int:
        """Number of the colour itself."""
        return self.before + self.shades


@lru_cache(maxsize=8)
def _shades(ink: Ink) -> np.ndarray:
    shade = (np.arange(256) * ink.shades + 127) // 255
    return np.where(shade, ink.before + shade, 0).astype(np.uint8)


BLACK, GREY, LIGHT = Ink(0, 45), Ink(0, 27), Ink(0, 15)
BLUE = Ink(_GREYS - 1, _BLUES)


class Canvas:
    """A white picture to draw on.

    Args:
        width: In pixels at scale 1.
        height: Likewise.
        scale: 1.5 gives 150 dots an inch.

    >>> canvas = Canvas(4, 2, scale=2.0)
    >>> canvas.box(0, 0, 1, 1, BLACK)
    >>> canvas.picture().rgb()[:, :, 0].tolist()[1:3]
    [[0, 0, 255, 255, 255, 255, 255, 255], [255, 255, 255, 255, 255, 255, 255, 255]]
    """

    def __init__(self, width: float, height: float, scale: float = 1.0) -> None:
        self.scale = scale
        self.pixels = np.zeros((self._at(height), self._at(width)), dtype=np.uint8)
        """Numbers of colours [height, width]."""

    def picture(self) -> Picture:
        """What was drawn."""
        return Picture(self.pixels, _palette())

    def box(self, left: float, top: float, right: float, bottom: float, ink: Ink = BLACK) -> None:
        """A filled box, at least one pixel wide and high: with `right` equal to `left` a thin line."""
        x, y, x2, y2 = map(self._at, (left, top, right, bottom))
        self.pixels[y : max(y2, y + 1), x : max(x2, x + 1)] = ink.full

    def frame(self, left: float, top: float, right: float, bottom: float) -> None:
        """The outline of a box."""
        for x in (left, right):
            self.box(x, top, x, bottom)
        for y in (top, bottom):
            self.box(left, y, right, y)
        self.box(right, bottom, right, bottom)

    def paint(self, left: float, top: float, right: float, bottom: float, paint: Paint) -> None:
        """Fill a box with colours of the place.

        Args:
            left: Edges of the box.
            top: Likewise.
            right: Likewise.
            bottom: Likewise.
            paint: Gives numbers of colours [h, w] at places v [h], down, and u [w], to the right, both in (0, 1).
        """
        x, y, x2, y2 = map(self._at, (left, top, right, bottom))
        down, along = ((np.arange(n) + 0.5) / n for n in (y2 - y, x2 - x))
        self.pixels[y:y2, x:x2] = paint(down, along)

    def text(self, x: float, y: float, text: str, points: float, anchor: str = "mm", *, upright: bool = False) -> None:
        """One line of text.

        Args:
            x: Where the anchor is.
            y: Likewise.
            text: May be empty.
            points: Size.
            anchor: "l", "m" or "r" and "t", "m" or "b": which point of the text's box that is.
            upright: Turned a quarter, to be read from the right.
        """
        if not text:
            return
        cover = _text_cover(text, round(points * _POINT * self.scale), upright)
        back = {"l": 0.0, "t": 0.0, "m": 0.5, "r": 1.0, "b": 1.0}
        left, top = (
            round(place * self.scale - back[side] * size)
            for place, side, size in zip((x, y), anchor, cover.shape[::-1], strict=True)
        )
        self._blend(left, top, cover, BLACK)

    def dots(self, x: Any, y: Any, diameter: float, ink: Ink) -> None:
        """Antialiased discs with centres [k]; where two overlap it is not darker."""
        x, y = (np.asarray(t, dtype=np.float64)[:, None, None] * self.scale for t in (x, y))
        if not x.size:
            return
        radius = 0.5 * diameter * self.scale
        reach = np.arange(-int(radius + 1.5), int(radius + 1.5) + 1)
        columns, rows = np.floor(x) + reach, np.floor(y) + reach[:, None]
        distance = np.hypot(columns + 0.5 - x, rows + 0.5 - y)
        left, top = int(columns.min()), int(rows.min())
        cover = np.zeros((int(rows.max()) - top + 1, int(columns.max()) - left + 1), dtype=np.uint8)
        places = (rows - top).astype(np.intp) * cover.shape[1] + (columns - left).astype(np.intp)
        shares = (255 * np.clip(radius + 0.5 - distance, 0, 1)).astype(np.uint8)
        np.maximum.at(cover.reshape(-1), places.reshape(-1), shares.reshape(-1))
        self._blend(left, top, cover, ink)

    def line(self, x: Any, y: Any, width: float, ink: Ink, dash: tuple[float, float] = (1, 0)) -> None:
        """An antialiased line through points, with dashes and gaps of the given lengths."""
        length = np.append(0.0, np.hypot(np.diff(x), np.diff(y)).cumsum())
        at = np.arange(0.0, length[-1] + 0.25, 0.5 / self.scale)
        at = at[at % sum(dash) < dash[0]] if dash[1] else at
        self.dots(np.interp(at, length, x), np.interp(at, length, y), width, ink)

    def _at(self, place: float) -> int:
        return round(place * self.scale)

    def _blend(self, left: int, top: int, cover: np.ndarray, ink: Ink) -> None:
        """Lay ink over white where `cover` [h, w] is above 0, over other ink where it is above half."""
        cut_left, cut_top = max(0, -left), max(0, -top)
        part = self.pixels[max(0, top) : max(0, top + len(cover)), max(0, left) : max(0, left + cover.shape[1])]
        cover = cover[cut_top : cut_top + len(part), cut_left : cut_left + part.shape[1]]
        np.copyto(part, ink.at(cover), where=(cover > 127) | (part == 0))


def map_colours(values: np.ndarray) -> np.ndarray:
    """Numbers of the colours of values in [0, 1] on the colour map magma, dark for 1."""
    return (_GREYS + _BLUES + (_MAP * values).astype(np.intp).clip(0, _MAP - 1)).astype(np.uint8)


@lru_cache(maxsize=1)
def _palette() -> np.ndarray:
    from matplotlib import colormaps

    blue = np.array([31, 119, 180])  # as in matplotlib's own colour cycle
    greys = np.repeat(255 - np.arange(_GREYS)[:, None] * 17 / 3, 3, axis=1)
    blues = 255 - (255 - blue) * np.arange(1, _BLUES + 1)[:, None] / _BLUES
    colours = colormaps["magma_r"](np.linspace(0, 1, _MAP), bytes=True)[:, :3]
    palette: np.ndarray = np.concatenate([greys.round(), blues.round(), colours]).astype(np.uint8)
    return palette


@lru_cache(maxsize=256)
def _text_cover(text: str, size: int, upright: bool) -> np.ndarray:
    """Coverage [h, w] of a line of text, 0 to 255; all lines of one size are equally high."""
    from PIL import Image, ImageDraw

    font = _font(size)
    ascent, descent = font.getmetrics()
    mask = Image.new("L", (max(1, round(font.getlength(text))), ascent + descent))
    ImageDraw.Draw(mask).text((0, ascent), text, fill=255, font=font, anchor="ls")
    cover = np.asarray(mask)
    return np.rot90(cover) if upright else cover


@lru_cache(maxsize=16)
def _font(size: int) -> Any:
    """The typeface of matplotlib's figures, which has the Greek letters and the superscripts."""
    import matplotlib
    from PIL import ImageFont

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
