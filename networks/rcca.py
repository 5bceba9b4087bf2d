"""The recurrent criss-cross attention head (paper, section 3.3 and figure 2)."""

import torch
from torch import Tensor, nn

from cc_attention import CrissCrossAttention
from libs import InPlaceABNSync

from .layers import BatchDropout2d, conv3x3


class RCCAModule(nn.Module):
    """Reduce the channels, apply criss-cross attention `recurrence` times with shared weights, fuse, classify.

    Args:
        in_channels: channels of the features; the attention has a quarter of that.
        num_classes: channels of the logits.
        recurrence: R >= 0. With 0 attention is not applied, but has its parameters, so that a state dict loads for
            every R.

    Shape: [N, in_channels, H, W] to [N, num_classes, H, W].
    """

    def __init__(self, in_channels: int, num_classes: int, recurrence: int):
        super().__init__()
        self.recurrence = recurrence
        channels = in_channels // 4
        self.conva = nn.Sequential(
            conv3x3(in_channels, channels),
            InPlaceABNSync(channels),
        )
        self.cca = CrissCrossAttention(channels)
        self.convb = nn.Sequential(
            conv3x3(channels, channels),
            InPlaceABNSync(channels),
        )
        self.bottleneck = nn.Sequential(
            conv3x3(in_channels + channels, channels),
            InPlaceABNSync(channels),
            BatchDropout2d(0.1),
            nn.Conv2d(channels, num_classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conva(x)
        for _ in range(self.recurrence):
            out = self.cca(out)
        out = self.convb(out)
        return self.bottleneck(torch.cat([x, out], dim=1))
