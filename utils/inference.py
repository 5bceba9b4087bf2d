"""Prediction of whole images: sliding window or all at once, at several scales, mirrored."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from .criterion import upsample

Network = Callable[[Tensor], list[Tensor]]
Predictor = Callable[[Tensor], Tensor]


def whole_predictor(model: Network) -> Predictor:
    """Images [N, 3, H, W] to main logits [N, K, H, W], the whole image at once."""

    def predict(images: Tensor) -> Tensor:
        return upsample(model(images)[0], images.shape[2:])

    return predict


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along an axis: steps of two thirds of a tile, the last one flush with the end."""
    stride = math.ceil(tile * 2 / 3)
    count = max(math.ceil((length - tile) / stride), 0) + 1
    return [max(min(i * stride, length - tile), 0) for i in range(count)]


def sliding_predictor(model: Network, tile_size: tuple[int, int]) -> Predictor:
    """Images [N, 3, H, W] to main logits [N, K, H, W], by tiles of (height, width) that overlap by a third.

    Logits are averaged where tiles overlap. An image smaller than the tile is padded with zeros (the mean colour).
    """
    height, width = tile_size
    whole = whole_predictor(model)

    def predict(images: Tensor) -> Tensor:
        rows, columns = images.shape[2:]
        padded = F.pad(images, (0, max(width - columns, 0), 0, max(height - rows, 0)))
        count = padded.new_zeros(padded.shape[2:])
        total = padded.new_zeros(())
        for top in tile_starts(rows, height):
            for left in tile_starts(columns, width):
                tile = (..., slice(top, top + height), slice(left, left + width))
                logits = whole(padded[tile])
                if total.dim() == 0:  # now the number of classes is known
                    total = logits.new_zeros(*logits.shape[:2], *padded.shape[2:])
                total[tile] += logits
                count[tile] += 1
        return (total / count)[..., :rows, :columns]

    return predict


def multi_scale(predict: Predictor, scales: Sequence[float], flip: bool) -> Predictor:
    """Average a predictor's logits over scales of the image and, with `flip`, over its mirror image (left-right)."""

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
