"""Pictures straight in pixels: text, boxes and antialiased lines, a hundred times cheaper than a figure's artists.

Where a picture is drawn while a network trains, this is what it costs. Lengths are in pixels at 100 dots an inch, sizes
of text in points, y runs down.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

BLACK, GREY, BLUE = (0, 0, 0), (102, 102, 102), (31, 119, 180)  # the last as in matplotlib's own colour cycle
_POINT = 100 / 72
Colour = tuple[int, int, int]
Picture = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Canvas:
    """A white picture to draw on.

    Args:
        width: In pixels at scale 1.
        height: Likewise.
        scale: 1.5 gives 150 dots an inch.

    >>> canvas = Canvas(4, 2, scale=2.0)
    >>> canvas.box(0, 0, 1, 1, BLACK)
    >>> canvas.pixels[:, :, 0].tolist()[1:3]
    [[0, 0, 255, 255, 255, 255, 255, 255], [255, 255, 255, 255, 255, 255, 255, 255]]
    """

    def __init__(self, width: float, height: float, scale: float = 1.0) -> None:
        self.scale = scale
        self.pixels = np.full((self._at(height), self._at(width), 3), 255, dtype=np.uint8)
        """RGB bytes [height, width, 3]."""

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour = BLACK) -> None:
        """A filled box, at least one pixel wide and high: with `right` equal to `left` a thin line."""
        x, y, x2, y2 = map(self._at, (left, top, right, bottom))
        self.pixels[y : max(y2, y + 1), x : max(x2, x + 1)] = colour

    def frame(self, left: float, top: float, right: float, bottom: float, colour: Colour = BLACK) -> None:
        """The outline of a box."""
        for x in (left, right):
            self.box(x, top, x, bottom, colour)
        for y in (top, bottom):
            self.box(left, y, right, y, colour)
        self.box(right, bottom, right, bottom, colour)

    def paint(self, left: float, top: float, right: float, bottom: float, picture: Picture) -> None:
        """Fill a box with colours of the place.

        Args:
            left: Edges of the box.
            top: Likewise.
            right: Likewise.
            bottom: Likewise.
            picture: Gives RGB bytes [h, w, 3] at places v [h], down, and u [w], to the right, both in (0, 1).
        """
        x, y, x2, y2 = map(self._at, (left, top, right, bottom))
        down, along = ((np.arange(n) + 0.5) / n for n in (y2 - y, x2 - x))
        self.pixels[y:y2, x:x2] = picture(down, along)

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

    def dots(self, x: Any, y: Any, diameter: float, colour: Colour) -> None:
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
        places = (rows - top).astype(np.intp), (columns - left).astype(np.intp)
        np.maximum.at(cover, places, (255 * np.clip(radius + 0.5 - distance, 0, 1)).astype(np.uint8))
        self._blend(left, top, cover, colour)

    def line(self, x: Any, y: Any, width: float, colour: Colour, dash: tuple[float, float] = (1, 0)) -> None:
        """An antialiased line through points, with dashes and gaps of the given lengths."""
        length = np.append(0.0, np.hypot(np.diff(x), np.diff(y)).cumsum())
        at = np.arange(0.0, length[-1] + 0.25, 0.5 / self.scale)
        at = at[at % sum(dash) < dash[0]] if dash[1] else at
        self.dots(np.interp(at, length, x), np.interp(at, length, y), width, colour)

    def _at(self, place: float) -> int:
        return round(place * self.scale)

    def _blend(self, left: int, top: int, cover: np.ndarray, colour: Colour) -> None:
        """Lay a colour over the picture where `cover` [h, w] is 255; what lies outside is cut off."""
        cut_left, cut_top = max(0, -left), max(0, -top)
        part = self.pixels[max(0, top) : max(0, top + len(cover)), max(0, left) : max(0, left + cover.shape[1])]
        cover = cover[cut_top : cut_top + len(part), cut_left : cut_left + part.shape[1]]
        touched = cover.nonzero()
        under, share = part[touched].astype(np.int32), cover[touched].astype(np.int32)[:, None]
        part[touched] = under - share * (under - colour) // 255


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
