"""Criss-cross attention by its definition, in plain PyTorch.

This is what every faster implementation is compared with. Huang et al., "CCNet: Criss-Cross Attention for Semantic
Segmentation", arXiv 1811.11721, section 3.2: the Affinity operation (eq. 1) is `ca_weight`, the Aggregation
operation (eq. 2) is `ca_map`.

The criss-cross path of the pixel u = (i, j) is its row, all W positions with u included, followed by the other H-1
positions of its column. Every function here keeps that order.
"""

import torch
from torch import Tensor


def _other_rows(height: int, device: torch.device) -> Tensor:
    """Rows of a column other than the pixel's own: [H-1, H], entry (k, i) is the k-th row that is not i."""
    k = torch.arange(height - 1, device=device).unsqueeze(1)
    i = torch.arange(height, device=device)
    return k + (k >= i)


def ca_weight(query: Tensor, key: Tensor) -> Tensor:
    """Softmax over each pixel's criss-cross path of the unscaled energies query_u . key_v.

    query, key: [N, C', H, W]. Returns [N, H+W-1, H, W].
    """
    batch, _, height, width = query.shape
    row_energy = torch.einsum("nchw,nchv->nvhw", query, key)
    column_energy = torch.einsum("nchw,ncuw->nuhw", query, key)
    others = _other_rows(height, query.device)[None, :, :, None].expand(batch, -1, -1, width)
    return torch.cat([row_energy, column_energy.gather(1, others)], dim=1).softmax(dim=1)


def ca_map(weight: Tensor, value: Tensor) -> Tensor:
    """Sum of the values on each pixel's criss-cross path, weighted.

    weight: [N, H+W-1, H, W], value: [N, C, H, W]. Returns [N, C, H, W].
    """
    batch, _, height, width = value.shape
    row_weight, other_weight = weight.split([width, height - 1], dim=1)
    others = _other_rows(height, value.device)[None, :, :, None].expand(batch, -1, -1, width)
    # The pixel itself was counted in its row, so its place in the column is 0.
    column_weight = weight.new_zeros(batch, height, height, width).scatter(1, others, other_weight)
    row = torch.einsum("nvhw,nchv->nchw", row_weight, value)
    column = torch.einsum("nuhw,ncuw->nchw", column_weight, value)
    return row + column


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`ca_map(ca_weight(query, key), value)`: [N, C', H, W] twice and [N, C, H, W] give [N, C, H, W]."""
    return ca_map(ca_weight(query, key), value)
