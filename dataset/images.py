"""Reading of image files, which decodes only the part that is needed."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.ImageFile import ImageFile as PillowFile

from .items import DatasetError


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels: rows [top, bottom) and columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


# Keywords of the PNG text chunks in which Pillow looks for an orientation.
_EXIF_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_COLOUR_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV")
_GREY_16_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_LABEL_MODES = ("L", "P", "I", "I;16", "I;16B", "RGB", "RGBA")
_LABEL_FORMATS = ("PNG", "BMP", "TIFF")
# Exceptions that Pillow may raise for a damaged file.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, KeyError, struct.error, Image.DecompressionBombError)


class ImageFile:
    """An image file, of which only the requested part is decoded.

    The image is rotated or mirrored as its EXIF orientation says.

    Attributes:
        size: (height, width) in pixels, after that.

    Raises:
        DatasetError: the file is not an image, or has several frames.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._data = path.read_bytes()
            with Image.open(io.BytesIO(self._data)) as header:
                self._mode, self._format = header.mode, _format(header)
                self._turned = None if _is_upright(header, self._data) else ImageOps.exif_transpose(header)
                image = header if self._turned is None else self._turned
                self.size = (image.height, image.width)
                is_animated = getattr(header, "is_animated", False) and header.format in ("PNG", "GIF", "WEBP", "AVIF")
        except _DECODING_ERRORS as error:
            raise DatasetError(f"{path}: expected an image file, cannot read it: {error}") from error
        if is_animated:
            raise DatasetError(f"{path}: expected one image, found an animation")

    @property
    def is_turned(self) -> bool:
        """Whether the EXIF orientation rotates or mirrors the stored image."""
        return self._turned is not None

    def _read(self, box: Box | None, convert_to: str | None) -> np.ndarray:
        height, width = self.size
        box = box or Box(0, height, 0, width)
        data = self._data if box.bottom >= height else _shortened_png(self._data, box.bottom)
        try:
            with Image.open(io.BytesIO(data)) as upright:
                image = upright if self._turned is None else self._turned
                part = image.crop((box.left, box.top, min(box.right, width), min(box.bottom, height)))
                return np.asarray(part.convert(convert_to) if convert_to else part)
        except _DECODING_ERRORS as error:
            raise DatasetError(f"{self.path}: expected an image, cannot decode it: {error}") from error

    def _check_mode(self, modes: tuple[str, ...]) -> None:
        if self._mode not in modes:
            raise DatasetError(f"{self.path}: expected an image of mode {' or '.join(modes)}, found mode {self._mode}")

    def read_colour(self, box: Box | None = None) -> np.ndarray:
        """Decode the part of the image in the box, or all of it: uint8 [height, width, 3], RGB.

        Of 16 bits the upper 8 are kept. Transparency is ignored.

        Raises:
            DatasetError: the pixels have no one meaning in 8 bits, as those of 32 bits or floating point.
        """
        if self._mode in _GREY_16_BITS or (self._mode == "I" and self._format == "PNG"):
            grey = (self._read(box, None).astype(np.int32) >> 8).astype(np.uint8)
            return np.stack([grey] * 3, axis=2)
        self._check_mode(_COLOUR_MODES)
        return self._read(box, "RGB")

    def read_label(self, box: Box | None = None) -> np.ndarray:
        """Decode the part of the label image in the box, or all of it: whole numbers [height, width], or colours.

        Colours are uint8 [height, width, 3], RGB.

        Raises:
            DatasetError: the image may not hold the values that were written.
        """
        if self._format not in _LABEL_FORMATS:
            raise DatasetError(
                f"{self.path}: expected a lossless label image ({', '.join(_LABEL_FORMATS)}; 8 bits or more), found "
                f"{self._format}, which may not hold the values that were written"
            )
        self._check_mode(_LABEL_MODES)
        label = self._read(box, None)
        if self._mode == "RGBA" and (label[..., 3] != 255).any():
            raise DatasetError(f"{self.path}: expected label values or colours, found transparent pixels")
        return label[..., :3] if label.ndim == 3 else label


def _format(header: PillowFile) -> str:
    """The format of the file, with a remark if decoding may change the values of a label image."""
    if header.format == "TIFF":
        compression = header.info.get("compression", "")
        if "jpeg" in compression or compression == "webp":
            return f"TIFF with {compression} compression"
    if header.format in _LABEL_FORMATS and header.mode == "L" and header.tile:
        arguments = header.tile[0][3] or ""
        raw_mode = arguments if isinstance(arguments, str) else arguments[0]
        if raw_mode != "L":  # Pillow stretches fewer bits to 0..255
            return f"{header.format} with grey levels stored as {raw_mode}"
    return str(header.format)


def _is_upright(header: PillowFile, data: bytes) -> bool:
    """Whether the file has no EXIF orientation, or one that leaves the image as it is stored."""
    if header.format == "PNG" and not any(
        kind == b"eXIf" or text.startswith(_EXIF_TEXTS) for kind, text in _png_chunks(data)
    ):
        return True  # getexif() would decode all pixels to look for EXIF data after them
    return header.getexif().get(ExifTags.Base.Orientation, 1) not in range(2, 9)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and first 32 bytes of each chunk of a PNG."""
    start = 8
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        yield kind, data[start + 8 : start + 8 + min(length, 32)]
        start += length + 12


def _shortened_png(data: bytes, rows: int) -> bytes:
    """The PNG file with a smaller height in its header, so that only its first rows are decoded.

    A file that is not a PNG, or is interlaced, is returned unchanged.
    """
    start, kind, header, crc = data[:12], data[12:16], data[16:29], data[29:33]
    is_png = start == b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d" and kind == b"IHDR"
    if not is_png or zlib.crc32(kind + header) != int.from_bytes(crc, "big") or header[12] != 0:
        return data
    header = header[:4] + struct.pack(">I", rows) + header[8:]
    return start + kind + header + struct.pack(">I", zlib.crc32(kind + header)) + data[33:]
