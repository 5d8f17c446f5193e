"""A picture as bytes, and its PNG file.

A picture is written while training waits, and TensorBoard's writer spends a quarter of a millisecond a kilobyte on its
checksum. With one byte a pixel and a palette the file is half as large, and its rows need none of the five filters
that Pillow tries on each.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Picture:
    """Pixels, as colours or as numbers of colours.

    Attributes:
        pixels: RGB bytes [height, width, 3]; or, with a palette, bytes [height, width].
        palette: RGB bytes [colours, 3], at most 256.

    >>> Picture(np.array([[1, 0]], dtype=np.uint8), np.array([[0, 0, 0], [255, 0, 0]], dtype=np.uint8)).rgb().tolist()
    [[[255, 0, 0], [0, 0, 0]]]
    """

    pixels: np.ndarray
    palette: np.ndarray | None = None

    @property
    def height(self) -> int:
        """Number of rows."""
        return len(self.pixels)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.pixels.shape[1]

    def rgb(self) -> np.ndarray:
        """RGB bytes [height, width, 3]."""
        return self.pixels if self.palette is None else self.palette[self.pixels]

    def png(self) -> bytes:
        """The file, as the standard (ISO/IEC 15948) has it."""
        rows = self.pixels.reshape(self.height, -1)
        filtered = np.zeros((self.height, 1 + rows.shape[1]), dtype=np.uint8)  # a row begins with its filter: 0, none
        filtered[:, 1:] = rows
        kind = 2 if self.palette is None else 3
        chunks = {b"IHDR": struct.pack(">IIBBBBB", self.width, self.height, 8, kind, 0, 0, 0)}
        if self.palette is not None:
            chunks[b"PLTE"] = self.palette.tobytes()
        chunks |= {b"IDAT": zlib.compress(filtered.tobytes(), 1), b"IEND": b""}
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks.items())


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
