"""Augmentation and normalisation.

The recipe scales an image by 0.7, 0.8, ... 2.1, pads it to the crop's size, and crops it. Here the crop is drawn first,
in the coordinates of the scaled image, and only the source pixels under it are read and resized. The result is the
same up to OpenCV's rounding. A crop that is rotated is made of all that it covers of the scaled image, its corners too.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from .images import Box

# Mean colour of the ImageNet backbone's training images: B, G, R in 0..255.
IMAGE_MEAN = np.array([104.00698793, 116.66876762, 122.67891434], dtype=np.float32)
# Scales are tenths. The recipe's, and the least and the greatest that may be asked for.
SCALE_TENTHS = range(7, 22)
_LEAST_SCALE, _GREATEST_SCALE = 0.1, 8


class Span(NamedTuple):
    """The pixels [start, stop) that a crop covers along one axis of the scaled image."""

    start: int
    stop: int


class Rotation(NamedTuple):
    """A rotation by `degrees`, counter-clockwise, about the centre of the rows and columns of the scaled image.

    Attributes:
        size: (height, width) of the result, whose first pixel would be that of rows and columns if it were not rotated.
    """

    degrees: float
    rows: Span
    columns: Span
    size: tuple[int, int]

    def positions(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where pixels at these rows and columns of the result lie in the scaled image: y and x, [rows, columns]."""
        sine, cosine = math.sin(math.radians(self.degrees)), math.cos(math.radians(self.degrees))
        y = rows[:, None] - (self.rows.stop - self.rows.start - 1) / 2  # from the centre
        x = columns - (self.columns.stop - self.columns.start - 1) / 2
        centre_y, centre_x = ((span.start + span.stop - 1) / 2 for span in (self.rows, self.columns))
        return centre_y + cosine * y + sine * x, centre_x + cosine * x - sine * y

    def reach(self, scaled_size: tuple[int, int]) -> tuple[Span, Span]:
        """The rows and columns of the scaled image that the result depends on."""
        corners = self.positions(*(np.array([0, length - 1]) for length in self.size))
        rows, columns = (
            Span(max(math.floor(axis.min()), 0), min(math.floor(axis.max()) + 2, length))
            for axis, length in zip(corners, scaled_size, strict=True)
        )
        return rows, columns


@dataclass(frozen=True)
class Crop:
    """One draw of the augmentation.

    Attributes:
        tenths: the scale.
        rows, columns: the part of the scaled image: the crop, or what its rotation depends on.
        mirror: whether it is mirrored.
        rotation: None for none.
    """

    tenths: int
    rows: Span
    columns: Span
    mirror: bool
    rotation: Rotation | None = None


def scale_tenths(scales: bool | tuple[float, float]) -> range:
    """The scales to draw from, in tenths.

    Args:
        scales: (LOW, HIGH) for LOW, LOW + 0.1, ... HIGH; True: the recipe's; False: 1 alone.

    Raises:
        ValueError: LOW or HIGH is no multiple of 0.1 or out of bounds, or they are in the wrong order.
    """
    if isinstance(scales, bool):
        return SCALE_TENTHS if scales else range(10, 11)
    low, high = scales
    expected = f"expected LOW,HIGH, multiples of 0.1 with {_LEAST_SCALE} <= LOW <= HIGH <= {_GREATEST_SCALE}"
    if not _LEAST_SCALE <= low <= high <= _GREATEST_SCALE or any(abs(10 * s - round(10 * s)) > 1e-6 for s in scales):
        raise ValueError(f"{expected}, got {low:g},{high:g}")
    return range(round(10 * low), round(10 * high) + 1)


def parse_scales(text: str) -> bool | tuple[float, float]:
    """The scales of the text "LOW,HIGH", as `scale_tenths` takes them; True for the recipe's.

    Raises:
        ValueError: as `scale_tenths`, or these are not two numbers.
    """
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected LOW,HIGH (e.g. 0.5,2.0), got {text!r}") from None
    return True if scale_tenths((low, high)) == SCALE_TENTHS else (low, high)


def scaled_length(length: int, tenths: int) -> int:
    """Length of an axis after scaling, 1 or more, rounded as by OpenCV (halves to even)."""
    return max(round(length * (tenths / 10)), 1)


def draw_crop(
    generator: np.random.Generator,
    image_size: tuple[int, int],
    crop_size: tuple[int, int],
    random_scale: bool | tuple[float, float],
    random_mirror: bool,
    random_rotate: float = 0,
) -> Crop:
    """Draw scale (see `scale_tenths`), position, mirroring, and an angle of up to that many degrees in both directions.

    Sizes are (height, width). What is off draws no random number.
    """
    tenths = 10 if random_scale is False else int(generator.choice(scale_tenths(random_scale)))
    scaled_size = (scaled_length(image_size[0], tenths), scaled_length(image_size[1], tenths))
    spans = []
    for scaled, crop in zip(scaled_size, crop_size, strict=True):
        start = int(generator.integers(0, max(scaled - crop, 0), endpoint=True))
        spans.append(Span(start, min(start + crop, scaled)))
    mirror = random_mirror and bool(generator.integers(2))
    if not random_rotate:
        return Crop(tenths, spans[0], spans[1], mirror)
    rotation = Rotation(generator.uniform(-random_rotate, random_rotate), spans[0], spans[1], crop_size)
    rows, columns = rotation.reach(scaled_size)
    return Crop(tenths, rows, columns, mirror, rotation)


class _Window(NamedTuple):
    """Source pixels [start, stop) along one axis, their number after resizing, and the offset of the span in these."""

    start: int
    stop: int
    resized: int
    offset: int


def _window(span: Span, tenths: int) -> _Window:
    """The source pixels that determine a span of the scaled axis.

    Let p/q be the scale in lowest terms. Pixel i + p of the scaled axis samples the source q pixels after the place
    that pixel i samples. A window that begins at a multiple of q is therefore sampled exactly as the whole axis is.
    It has one more block of q pixels on each side, so that its borders do not influence the span.
    """
    divisor = math.gcd(tenths, 10)
    p, q = tenths // divisor, 10 // divisor
    first = max(span.start // p - 1, 0)
    last = (span.stop - 1) // p + 2
    return _Window(first * q, last * q, (last - first) * p, span.start - first * p)


def source_box(crop: Crop) -> Box:
    """The part of the source image that the crop depends on; it may extend beyond the image at the bottom and right."""
    rows, columns = _window(crop.rows, crop.tenths), _window(crop.columns, crop.tenths)
    return Box(rows.start, rows.stop, columns.start, columns.stop)


def resize_image(part: np.ndarray, crop: Crop) -> np.ndarray:
    """The rows and columns of the bilinearly scaled image, uint8 [rows, columns, 3].

    Args:
        part: uint8 [height, width, 3], the image within `source_box(crop)`.
    """
    rows, columns = _window(crop.rows, crop.tenths), _window(crop.columns, crop.tenths)
    bottom = rows.stop - rows.start - part.shape[0]
    right = columns.stop - columns.start - part.shape[1]
    if bottom or right:  # resizing repeats the last pixel at the image's border
        part = cv2.copyMakeBorder(part, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    resized = cv2.resize(part, (columns.resized, rows.resized), interpolation=cv2.INTER_LINEAR)
    height, width = crop.rows.stop - crop.rows.start, crop.columns.stop - crop.columns.start
    return resized[rows.offset : rows.offset + height, columns.offset : columns.offset + width]


def resize_label(part: np.ndarray, crop: Crop) -> np.ndarray:
    """The rows and columns of the label image scaled by nearest neighbour, [rows, columns].

    Args:
        part: [height, width], the label image within `source_box(crop)`.
    """
    box = source_box(crop)
    rows, columns = (
        np.minimum(np.arange(span.start, span.stop) * 10 // crop.tenths - first, length - 1)
        for span, first, length in zip((crop.rows, crop.columns), (box.top, box.left), part.shape, strict=True)
    )
    return part[rows].take(columns, axis=1)


def rotate_image(image: np.ndarray, crop: Crop) -> np.ndarray:
    """What `resize_image` returned, rotated bilinearly if the crop is: uint8 [*size, 3]; the mean colour beyond it."""
    return _rotate(image, crop, cv2.INTER_LINEAR, np.rint(IMAGE_MEAN[::-1]).tolist())


def rotate_label(label: np.ndarray, crop: Crop, fill: int) -> np.ndarray:
    """What `resize_label` returned, rotated by nearest neighbour if the crop is: [*size]; `fill` beyond it."""
    return _rotate(label, crop, cv2.INTER_NEAREST, fill)


def _rotate(part: np.ndarray, crop: Crop, interpolation: int, fill: float | list[float]) -> np.ndarray:
    if crop.rotation is None:
        return part
    y, x = crop.rotation.positions(*map(np.arange, crop.rotation.size))
    maps = ((x - crop.columns.start).astype(np.float32), (y - crop.rows.start).astype(np.float32))
    return cv2.remap(part, *maps, interpolation, borderMode=cv2.BORDER_CONSTANT, borderValue=fill)


def normalise(image: np.ndarray, size: tuple[int, int] | None = None, mirror: bool = False) -> np.ndarray:
    """Subtract the mean, pad with zeros at the bottom and right, then mirror if asked to.

    uint8 RGB [height, width, 3] becomes float32 BGR [3, *size], in units of grey levels (0..255).
    """
    height, width = image.shape[:2]
    out = np.zeros((3, *(size or (height, width))), dtype=np.float32)
    target = out[:, :, ::-1] if mirror else out
    for plane, mean, channel in zip(target, IMAGE_MEAN, reversed(cv2.split(image)), strict=True):
        np.subtract(channel, mean, out=plane[:height, :width], dtype=np.float32)
    return out


def pad_label(label: np.ndarray, size: tuple[int, int], fill: int, mirror: bool = False) -> np.ndarray:
    """Pad [height, width] to `size` with `fill` at the bottom and right, then mirror if asked to."""
    out = np.full(size, fill, dtype=label.dtype)
    target = out[:, ::-1] if mirror else out
    target[: label.shape[0], : label.shape[1]] = label
    return out


def denormalise(image: np.ndarray) -> np.ndarray:
    """The inverse of `normalise`: float32 BGR [3, height, width] to uint8 RGB [height, width, 3]."""
    bgr = image.transpose(1, 2, 0) + IMAGE_MEAN
    return np.ascontiguousarray(np.clip(np.rint(bgr), 0, 255).astype(np.uint8)[..., ::-1])
