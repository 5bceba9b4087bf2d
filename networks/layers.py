"""Layers that several parts of the network have."""

import torch
from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size of its input where its stride is 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=bias)


class BatchDropout2d(nn.Dropout2d):
    """nn.Dropout2d for a batch that is spread over processes.

    Every process draws the random numbers of the whole batch and uses those of its own images. So long as all begin
    with one state of the generator their states stay alike, and what is dropped does not depend on how many they are.

    Attributes:
        images: which of the whole batch's images this process has, and how many that are; None for all of them.
    """

    images: tuple[range, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same: whole channels are 0 with probability p, the others times 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        own, count = self.images or (range(x.shape[0]), x.shape[0])
        if len(own) != x.shape[0]:
            raise ValueError(f"x: expected {len(own)} of the batch's {count} images, got {list(x.shape)}")
        numbers = torch.rand(count, x.shape[1], 1, 1, device=x.device)[own.start : own.stop]
        return x * ((numbers >= self.p).to(x.dtype) / (1 - self.p))
