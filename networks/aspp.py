"""The head of DeepLabv3: atrous spatial pyramid pooling (Chen et al., arXiv 1706.05587, section 3.3)."""

import torch
from torch import Tensor, nn

from libs import InPlaceABNSync

from .layers import Head, classifier

# For features at 1/8 of the image.
_DILATIONS = (12, 24, 36)


class ASPPModule(Head):
    """A 1x1 and three dilated 3x3 convolutions, and the mean over the image, side by side; fuse, classify.

    Args:
        in_channels: channels of the features; each branch has an eighth of that.
        num_classes: channels of the logits.

    Shape: [N, in_channels, H, W] to [N, num_classes, H, W].
    """

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        channels = in_channels // 8
        convolutions = [nn.Conv2d(in_channels, channels, 1, bias=False)]
        convolutions += [nn.Conv2d(in_channels, channels, 3, padding=d, dilation=d, bias=False) for d in _DILATIONS]
        self.branches = nn.ModuleList(nn.Sequential(each, InPlaceABNSync(channels)) for each in convolutions)
        self.pooling = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, channels, 1, bias=False), InPlaceABNSync(channels)
        )
        self.bottleneck = classifier(5 * channels, in_channels // 4, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.pooling(x).expand(-1, -1, x.shape[2], x.shape[3])
        return self.bottleneck(torch.cat([mean, *(branch(x) for branch in self.branches)], dim=1))
