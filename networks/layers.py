"""Layers that several parts of the network use."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from libs import InPlaceABNSync


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
        return _drop_channels(x, self.p, self.shard)


torch.fx.wrap("_drop_channels")  # torch.fx makes one node of it


def _drop_channels(x: Tensor, p: float, shard: BatchShard | None) -> Tensor:
    images, batch_size = shard or (range(x.shape[0]), x.shape[0])
    if len(images) != x.shape[0]:
        raise ValueError(f"x: expected {len(images)} of the batch's {batch_size} images, got {list(x.shape)}")
    numbers = torch.rand(batch_size, x.shape[1], 1, 1, device=x.device)[images.start : images.stop]
    return x * ((numbers >= p).to(x.dtype) / (1 - p))


def conv3x3_and_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 convolution and activated batch norm."""
    return nn.Sequential(conv3x3(in_channels, out_channels), InPlaceABNSync(out_channels))


def classifier(
    in_channels: int, channels: int, num_classes: int, kernel_size: int = 3, bias: bool = False
) -> nn.Sequential:
    """A convolution with its norm, dropout, and the layer that classifies, which is number 3."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=bias),
        InPlaceABNSync(channels),
        BatchDropout2d(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )


class Head(nn.Module):
    """Gathers context and classifies: features of layer4, [N, in_channels, H, W], to logits, [N, num_classes, H, W].

    It is built with (in_channels, num_classes), the criss-cross one with R as well. Its last part is a `classifier`
    named bottleneck.

    Attributes:
        recurrence: R of criss-cross attention.
    """

    recurrence: int = 0

    @property
    def gamma(self) -> nn.Parameter | None:
        """[1], the weight of the attention's result; None if there is no attention."""
        return None


class AttentionHead(Head):
    """A head that reduces the channels to a quarter, attends, and classifies the features together with the result.

    Args:
        name: of the attention among the children.
        attention: makes it for a number of channels.
    """

    def __init__(self, in_channels: int, num_classes: int, name: str, attention: Callable[[int], nn.Module]):
        super().__init__()
        channels = in_channels // 4
        self.conva = conv3x3_and_norm(in_channels, channels)
        self.add_module(name, attention(channels))
        self.convb = conv3x3_and_norm(channels, channels)
        self.bottleneck = classifier(in_channels + channels, channels, num_classes)

    def attended(self, x: Tensor) -> Tensor:
        """The result of the attention, [N, in_channels // 4, H, W]."""
        raise NotImplementedError

    def classified(self, x: Tensor, attended: Tensor) -> Tensor:
        """The logits, [N, num_classes, H, W]."""
        return self.bottleneck(torch.cat([x, self.convb(attended)], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classified(x, self.attended(x))
