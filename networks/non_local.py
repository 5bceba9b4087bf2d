"""The non-local head: full attention in place of criss-cross attention, which the paper compares with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import AttentionHead


class NonLocalBlock(nn.Module):
    """Each pixel attends to all pixels: gamma * softmax(query . key) value + x (Wang et al., arXiv 1711.07971).

    Query, key and value are those of criss-cross attention, so that only the reach differs: 1x1 convolutions to
    in_channels // 8, in_channels // 8 and in_channels. gamma begins at 0.

    Shape: [N, in_channels, H, W] to the same.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.query_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.key_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.value_conv = nn.Conv2d(in_channels, in_channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            convolution(x).flatten(2).transpose(1, 2)[:, None]  # [N, 1, H * W, channels]
            for convolution in (self.query_conv, self.key_conv, self.value_conv)
        )
        gathered = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return torch.addcmul(x, self.gamma.to(x.dtype), gathered[:, 0].transpose(1, 2).reshape(x.shape))


class NonLocalModule(AttentionHead):
    """Reduce the channels, apply full attention once, fuse, classify: as `RCCAModule` with `NonLocalBlock`.

    Shape: [N, in_channels, H, W] to [N, num_classes, H, W].
    """

    non_local: NonLocalBlock

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(in_channels, num_classes, "non_local", NonLocalBlock)

    @property
    def gamma(self) -> nn.Parameter:
        return self.non_local.gamma

    def attended(self, x: Tensor) -> Tensor:
        return self.non_local(self.conva(x))
