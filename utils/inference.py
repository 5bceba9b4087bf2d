"""Prediction of whole images: at once or by sliding window, at several scales, with the mirror image."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from .criterion import upsample

Network = Callable[[Tensor], list[Tensor]]
Predictor = Callable[[Tensor], Tensor]


def whole_predictor(model: Network) -> Predictor:
    """A predictor of images [N, 3, H, W] to main logits [N, K, H, W], each image at once."""

    def predict(images: Tensor) -> Tensor:
        return upsample(model(images)[0], images.shape[2:])

    return predict


def tile_starts(length: int, tile: int) -> list[int]:
    """Starts of tiles along an axis, tile <= length: in steps of two thirds of a tile, the last flush with the end."""
    stride = math.ceil(tile * 2 / 3)
    count = math.ceil((length - tile) / stride) + 1
    return [min(i * stride, length - tile) for i in range(count)]


def sliding_predictor(model: Network, tile_size: tuple[int, int]) -> Predictor:
    """A predictor of images [N, 3, H, W] to main logits [N, K, H, W], by tiles of (height, width).

    Tiles overlap by about a third or more, and logits are averaged there. A tile is no larger than the image.
    """
    whole = whole_predictor(model)

    def predict(images: Tensor) -> Tensor:
        rows, columns = images.shape[2:]
        height, width = min(tile_size[0], rows), min(tile_size[1], columns)
        count = images.new_zeros(rows, columns)
        total = images.new_zeros(())
        for top in tile_starts(rows, height):
            for left in tile_starts(columns, width):
                tile = (..., slice(top, top + height), slice(left, left + width))
                logits = whole(images[tile])
                if total.dim() == 0:  # the first tile: now the number of classes is known
                    total = logits.new_zeros(*logits.shape[:2], rows, columns)
                total[tile] += logits
                count[tile] += 1
        return total / count

    return predict


def multi_scale(predict: Predictor, scales: Sequence[float], flip: bool) -> Predictor:
    """A predictor that averages another's logits over scales and, with `flip`, over the image and its mirror image."""

    def averaged(images: Tensor) -> Tensor:
        size = images.shape[2:]
        total = images.new_zeros(())
        for scale in scales:
            scaled_size = (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
            scaled = upsample(images, scaled_size)
            logits = predict(scaled)
            if flip:
                logits = (logits + predict(scaled.flip(3)).flip(3)) / 2
            total = total + upsample(logits, size)
        return total / len(scales)

    return averaged
