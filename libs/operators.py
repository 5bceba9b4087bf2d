"""Registers with PyTorch the output shapes of the native operators of activated batch norm (csrc/abn.cpp).

Imported if the operators are loaded. Their gradients are in libs/functional.py.
"""

import torch
from torch import Tensor


def _empty_as(x: Tensor) -> Tensor:
    """An empty tensor with the strides of x if it is contiguous or channels_last, otherwise contiguous."""
    dimensions = range(x.dim())
    if x.numel() == 0 or any(_is_in_order(x, order) for order in ([*dimensions], [0, *dimensions[2:], 1])):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _is_in_order(x: Tensor, order: list[int]) -> bool:
    stride = 1
    for dimension in reversed(order):
        if x.shape[dimension] != 1 and x.stride(dimension) != stride:
            return False
        stride *= x.shape[dimension]
    return True


@torch.library.register_fake("ccnet::abn_statistics")
def _(x: Tensor) -> Tensor:
    return x.new_empty([3, x.shape[1]], dtype=torch.float64)


@torch.library.register_fake("ccnet::abn_update_running_")
def _(running_mean: Tensor, running_var: Tensor, statistics: Tensor, momentum: float) -> None:
    pass


@torch.library.register_fake("ccnet::abn_forward")
def _(x: Tensor, *_: object) -> Tensor:
    return _empty_as(x)


@torch.library.register_fake("ccnet::abn_forward_")
def _(x: Tensor, *_: object) -> None:
    pass


@torch.library.register_fake("ccnet::abn_backward_sums")
def _(z: Tensor, *_: object) -> Tensor:
    return z.new_empty([2, z.shape[1]], dtype=torch.float64)


@torch.library.register_fake("ccnet::abn_backward")
def _(z: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    residual = others[5]
    return _empty_as(z), z.new_empty([0]) if residual is None else _empty_as(z)
