"""Tensors with the same elements and other strides."""

import torch


def laid_out(x, layout):
    """x contiguous, channels_last, sliced (every other element of memory) or transposed (last two dimensions)."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack([x, x.flip(1)], dim=-1)[..., 0]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x
