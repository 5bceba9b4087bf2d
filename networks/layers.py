"""Layers that several parts of the network use."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution that, with stride 1, keeps the height and width of its input."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=bias)


class BatchShard(NamedTuple):
    """The images that this process has of a batch that is spread over processes: `images` of range(batch_size)."""

    images: range
    batch_size: int


class BatchDropout2d(nn.Dropout2d):
    """nn.Dropout2d for a batch that is spread over processes.

    Each process draws random numbers for the whole batch and uses those of its own images. If all random generators
    start in the same state, they stay in the same state, and the result does not depend on the number of processes.

    Attributes:
        shard: which images of the batch this process has; None: all of them.
    """

    shard: BatchShard | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same: each channel is zeroed with probability p, otherwise multiplied by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        images, batch_size = self.shard or (range(x.shape[0]), x.shape[0])
        if len(images) != x.shape[0]:
            raise ValueError(f"x: expected {len(images)} of the batch's {batch_size} images, got {list(x.shape)}")
        numbers = torch.rand(batch_size, x.shape[1], 1, 1, device=x.device)[images.start : images.stop]
        return x * ((numbers >= self.p).to(x.dtype) / (1 - self.p))
