"""The criss-cross attention module of the paper (figure 3)."""

import torch
from torch import Tensor, nn

from .functional import check_dtype, criss_cross_attention

# torch.fx makes one node of a call.
torch.fx.wrap("criss_cross_attention")
torch.fx.wrap("_check")


def _check(x: Tensor, dimensions: str) -> None:
    if x.dim() != len(dimensions.split()):
        raise ValueError(f"x: expected shape [{dimensions}], got {list(x.shape)}")
    check_dtype("x", x)


class CrissCrossAttention(nn.Module):
    """gamma * attention(x) + x, with 1x1 convolutions for query, key and value.

    Args:
        in_dim: channels of the input, at least 8; query and key have in_dim // 8 channels.

    Shape: [N, in_dim, H, W] to the same, in the memory format of the input and, under autocast, in its dtype. gamma
    starts at 0, so a new module is the identity.

    Raises:
        ValueError: in_dim is less than 8, or x has another number of dimensions or is not floating-point.
    """

    _convolution: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d
    _dimensions = "N, in_dim, H, W"

    def __init__(self, in_dim: int):
        super().__init__()
        if in_dim < 8:
            raise ValueError(
                f"in_dim: expected at least 8, since query and key have in_dim // 8 channels, got {in_dim}"
            )
        self.query_conv = self._convolution(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = self._convolution(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = self._convolution(in_dim, in_dim, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        _check(x, self._dimensions)
        return criss_cross_attention(self.query_conv(x), self.key_conv(x), self.value_conv(x), x, self.gamma)


class CrissCrossAttention3d(CrissCrossAttention):
    """The same in three dimensions: a position attends to those that differ from it in at most one coordinate.

    Shape: [N, in_dim, D, H, W] to the same.
    """

    _convolution = nn.Conv3d
    _dimensions = "N, in_dim, D, H, W"
