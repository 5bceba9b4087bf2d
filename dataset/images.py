"""Reading image files, and of each only the part that is needed."""

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .items import DatasetError
from .labels import KNOWN_IDS


@dataclass(frozen=True)
class Box:
    """A part of an image in pixels: rows [top, bottom) and columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


class ImageFile:
    """An image file, of which only the part that is needed is decoded.

    Attributes:
        size: (height, width) in pixels, from the header.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._data = path.read_bytes()
            with Image.open(io.BytesIO(self._data)) as header:
                self.size = (header.height, header.width)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DatasetError(f"{path}: expected an image file, cannot read it: {error}") from error

    def _read(self, box: Box | None, modes: tuple[str, ...], convert_to: str | None) -> np.ndarray:
        height, width = self.size
        box = box or Box(0, height, 0, width)
        data = self._data if box.bottom >= height else _shortened_png(self._data, box.bottom)
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.mode not in modes:
                    raise DatasetError(
                        f"{self.path}: expected an image of mode {' or '.join(modes)}, found mode {image.mode}"
                    )
                part = image.crop((box.left, box.top, min(box.right, width), min(box.bottom, height)))
                return np.asarray(part.convert(convert_to) if convert_to else part)
        except (OSError, SyntaxError, ValueError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{self.path}: expected an image, cannot decode it: {error}") from error

    def read_colour(self, box: Box | None = None) -> np.ndarray:
        """uint8 [height, width, 3], RGB: the part in the box, as far as it is in the image, or all of it."""
        return self._read(box, ("RGB", "RGBA", "L", "LA", "P"), "RGB")

    def read_label(self, box: Box | None = None) -> np.ndarray:
        """uint8 [height, width], label ids: the part in the box, as far as it is in the image, or all of it.

        Raises:
            DatasetError: not a one-channel image, or an id in the part outside 0..33 and -1 (255 in 8 bits).
        """
        label = self._read(box, ("L", "P", "I", "I;16"), None)
        known = KNOWN_IDS[label] if label.dtype == np.uint8 else (label >= -1) & (label <= 33)
        if not known.all():
            wrong = label[~known][0]
            raise DatasetError(f"{self.path}: expected label ids 0..33 and -1, found {wrong}")
        return label.astype(np.uint8)


def _shortened_png(data: bytes, rows: int) -> bytes:
    """The PNG file with only its first rows, by a smaller height in its header: the decoder stops there.

    That saves the time of the rows below. A file that is no PNG, or is interlaced, is returned as it is.
    """
    start, kind, header, crc = data[:12], data[12:16], data[16:29], data[29:33]
    is_png = start == b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d" and kind == b"IHDR"
    if not is_png or zlib.crc32(kind + header) != int.from_bytes(crc, "big") or header[12] != 0:
        return data
    header = header[:4] + struct.pack(">I", rows) + header[8:]
    return start + kind + header + struct.pack(">I", zlib.crc32(kind + header)) + data[33:]
