"""Drawing with Pillow, a hundred times cheaper than a figure's artists: this is done while a network trains.

Lengths are in pixels at 100 dots an inch, sizes of text in points, y runs down.
"""

from collections.abc import Callable
from copy import copy
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BLACK, GREY, BLUE = "#000000", "#666666", "#1f77b4"
Paint = Callable[[np.ndarray, np.ndarray], Image.Image]
_POINT = 100 / 72


class Canvas:
    """A white picture to draw on.

    Args:
        width: In pixels at scale 1.
        height: In pixels at scale 1.
        scale: 1.5 gives 150 dots an inch.

    Attributes:
        image: What was drawn, RGB.

    >>> canvas = Canvas(4, 2, scale=2.0)
    >>> canvas.box(0, 0, 1, 1)
    >>> np.asarray(canvas.image)[1:3, :, 0].tolist()
    [[0, 0, 255, 255, 255, 255, 255, 255], [255, 255, 255, 255, 255, 255, 255, 255]]
    """

    def __init__(self, width: float, height: float, scale: float = 1.0) -> None:
        self.scale = scale
        self.image = Image.new("RGB", (self._at(width), self._at(height)), "white")
        self._draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str = BLACK) -> None:
        """A filled box, at least one pixel wide and high: with `right` equal to `left` a thin line."""
        x, y, x2, y2 = map(self._at, (left, top, right, bottom))
        self._draw.rectangle((x, y, max(x2 - 1, x), max(y2 - 1, y)), colour)

    def frame(self, left: float, top: float, right: float, bottom: float) -> None:
        """The outline of a box."""
        self._draw.rectangle([self._at(edge) for edge in (left, top, right, bottom)], outline=BLACK)

    def paint(self, left: float, top: float, right: float, bottom: float, paint: Paint) -> None:
        """Fill a box with a picture.

        Args:
            left: Left edge of the box.
            top: Upper edge of the box.
            right: Right edge of the box.
            bottom: Lower edge of the box.
            paint: Gives a picture of places v [h], down, and u [w], to the right, both in (0, 1).
        """
        x, y, x2, y2 = map(self._at, (left, top, right, bottom))
        down, along = ((np.arange(n) + 0.5) / n for n in (y2 - y, x2 - x))
        self.image.paste(paint(down, along), (x, y))

    def text(self, x: float, y: float, text: str, points: float, anchor: str = "mm", *, upright: bool = False) -> None:
        """One line of text.

        Args:
            x: Where the anchor is.
            y: Where the anchor is.
            text: May be empty.
            points: Size.
            anchor: "l", "m" or "r" and "t", "m" or "b": which point of the text's box that is.
            upright: Turned a quarter, to be read from the right.
        """
        mask = _text_mask(text, round(points * _POINT * self.scale), upright)
        back = {"l": 0.0, "t": 0.0, "m": 0.5, "r": 1.0, "b": 1.0}
        left, top = (
            round(place * self.scale - back[side] * size)
            for place, side, size in zip((x, y), anchor, mask.size, strict=True)
        )
        self.image.paste(BLACK, (left, top), mask)

    def halved(self) -> "Canvas":
        """The same at half the scale: lines and discs get soft edges, which Pillow's own do not have."""
        half = copy(self)
        half.scale, half.image = self.scale / 2, self.image.reduce(2)
        half._draw = ImageDraw.Draw(half.image)
        return half

    def dots(self, x: Any, y: Any, diameter: float, colour: str) -> None:
        """Discs with centres [k]."""
        x, y, radius = *np.broadcast_arrays(x, y), 0.5 * diameter
        boxes = np.stack([x - radius, y - radius, x + radius, y + radius], -1) * self.scale
        for box in boxes.reshape(-1, 4).tolist():
            self._draw.ellipse(box, colour)

    def line(self, x: Any, y: Any, width: float, colour: str, dash: tuple[float, float] = (1, 0)) -> None:
        """A line through points [k], with dashes and gaps of the given lengths."""
        points, wide = np.stack([x, y], -1) * self.scale, round(width * self.scale)
        if not dash[1]:
            self._draw.line(points.ravel().tolist(), colour, wide)
            return
        for start, end in pairwise(points):
            length = float(np.hypot(*(end - start)))
            begin = np.arange(0, length, sum(dash) * self.scale)
            pieces = np.stack([begin, np.minimum(begin + dash[0] * self.scale, length)], -1)[..., None] / length
            for piece in start + pieces * (end - start):
                self._draw.line(piece.ravel().tolist(), colour, wide)

    def _at(self, place: float) -> int:
        return round(place * self.scale)


def map_colours(values: np.ndarray) -> Image.Image:
    """A picture of values [h, w] in [0, 1] on the colour map magma, dark for 1."""
    picture = Image.fromarray((256 * values).clip(0, 255).astype(np.uint8))
    picture.putpalette(_magma())
    return picture


@lru_cache(maxsize=1)
def _magma() -> bytes:
    from matplotlib import colormaps

    colours: bytes = colormaps["magma_r"](range(256), bytes=True)[:, :3].tobytes()
    return colours


# Most words of a picture stand on it several times, and on the next one again.
@lru_cache(maxsize=256)
def _text_mask(text: str, size: int, upright: bool) -> Image.Image:
    """Coverage of a line of text; all lines of one size are equally high."""
    font = _font(size)
    ascent, descent = font.getmetrics()
    mask = Image.new("L", (max(1, round(font.getlength(text))), ascent + descent))
    ImageDraw.Draw(mask).text((0, ascent), text, fill=255, font=font, anchor="ls")
    return mask.transpose(Image.Transpose.ROTATE_90) if upright else mask


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The typeface of matplotlib's figures, which has the Greek letters and the superscripts."""
    import matplotlib

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
