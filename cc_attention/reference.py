"""Criss-cross attention by its definition, in plain PyTorch.

Faster implementations are tested against it. Huang et al., "CCNet: Criss-Cross Attention for Semantic
Segmentation", arXiv 1811.11721, section 3.2: the Affinity operation (eq. 1) is `ca_weight`, the Aggregation
operation (eq. 2) is `ca_map`.

The criss-cross path of the pixel u = (i, j) consists of its row, all W positions including u, followed by the other H-1
positions of its column and, in three dimensions, the other D-1 positions along depth. All functions use that order.
"""

import torch
from torch import Tensor


def _axes(x: Tensor) -> range:
    """The dimensions of x that paths run along, in the order of the path: W, H and, if there is one, D."""
    return range(x.dim() - 1, 1, -1)


def _others(length: int, axis: int, like: Tensor) -> Tensor:
    """The positions along `axis` other than the pixel's own, as an index into dim 1 of weights or energies.

    [N, length - 1, (D,) H, W], with N, D, H and W of `like`: entry k of dim 1 is the k-th position but the pixel's own.
    """
    k = torch.arange(length - 1, device=like.device).unsqueeze(1)
    own = torch.arange(length, device=like.device)
    shape = [1] * like.dim()
    shape[1], shape[axis] = length - 1, length
    return (k + (k >= own)).reshape(shape).expand(like.shape[0], -1, *like.shape[2:])


def ca_weight(query: Tensor, key: Tensor) -> Tensor:
    """The unscaled energies query_u . key_v of each pixel u with the pixels v of its criss-cross path, before softmax.

    query, key: [N, C', H, W]. Returns [N, H+W-1, H, W]. Or [N, C', D, H, W] and [N, D+H+W-2, D, H, W].
    """
    energies: list[Tensor] = []
    for axis in _axes(query):
        energy = torch.einsum("nc...i,nc...j->nj...i", query.movedim(axis, -1), key.movedim(axis, -1))
        energy = energy.movedim(-1, axis)
        if energies:  # the pixel itself is already in its row
            energy = energy.gather(1, _others(query.shape[axis], axis, query))
        energies.append(energy)
    return torch.cat(energies, dim=1)


def ca_map(weight: Tensor, value: Tensor) -> Tensor:
    """The weighted sum of the values on each pixel's criss-cross path.

    weight: [N, H+W-1, H, W], value: [N, C, H, W]. Returns [N, C, H, W]. Or the same with D, as in `ca_weight`.
    """
    out, begin = torch.zeros_like(value), 0
    for axis in _axes(value):
        length = value.shape[axis]
        end = begin + (length - 1 if begin else length)
        along = weight[:, begin:end]
        if begin:  # the pixel itself is already in its row, so its weight here is 0
            zeros = weight.new_zeros(weight.shape[0], length, *weight.shape[2:])
            along = zeros.scatter(1, _others(length, axis, value), along)
        part = torch.einsum("nj...i,nc...j->nc...i", along.movedim(axis, -1), value.movedim(axis, -1))
        out = out + part.movedim(-1, axis)
        begin = end
    return out


def criss_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor | None = None, gamma: Tensor | None = None
) -> Tensor:
    """`ca_map` with the softmax of `ca_weight` over each path as weights; with a residual, residual + gamma * that.

    query, key: [N, C', H, W], value, residual: [N, C, H, W], gamma: [1]. Returns [N, C, H, W]. Or the same with D.
    """
    attended = ca_map(ca_weight(query, key).softmax(dim=1), value)
    if residual is None or gamma is None:
        return attended
    return (residual + gamma * attended).to(attended.dtype)
