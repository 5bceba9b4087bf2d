"""The head of PSPNet: pyramid pooling (Zhao et al., arXiv 1612.01105, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libs import InPlaceABNSync

from .layers import Head, classifier


class PSPModule(Head):
    """Means over grids of 1x1, 2x2, 3x3 and 6x6 cells, each reduced in channels and upsampled; fuse, classify.

    Args:
        in_channels: channels of the features; each grid has a quarter of that.
        num_classes: channels of the logits.

    Shape: [N, in_channels, H, W] to [N, num_classes, H, W].
    """

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        channels = in_channels // 4
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(cells), nn.Conv2d(in_channels, channels, 1, bias=False), InPlaceABNSync(channels)
            )
            for cells in (1, 2, 3, 6)
        )
        self.bottleneck = classifier(in_channels + 4 * channels, channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        means = [F.interpolate(s(x), x.shape[2:], mode="bilinear", align_corners=True) for s in self.stages]
        return self.bottleneck(torch.cat([*means, x], dim=1))
