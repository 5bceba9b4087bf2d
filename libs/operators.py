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


@torch.library.register_fake("ccnet::abn_normaliser_of_batch_")
@torch.library.register_fake("ccnet::abn_normaliser_of_parts_")
def _(x: Tensor, running_mean: Tensor, *_: object) -> Tensor:
    return running_mean.new_empty([4, running_mean.shape[0]])


@torch.library.register_fake("ccnet::abn_normaliser_of_running")
def _(running_mean: Tensor, *_: object) -> Tensor:
    return running_mean.new_empty([4, running_mean.shape[0]])


@torch.library.register_fake("ccnet::abn_forward")
def _(x: Tensor, *_: object) -> Tensor:
    return _empty_as(x)


@torch.library.register_fake("ccnet::abn_forward_")
def _(x: Tensor, *_: object) -> None:
    pass


@torch.library.register_fake("ccnet::abn_backward_sums")
def _(x: Tensor | None, z: Tensor | None, grad_z: Tensor, normaliser: Tensor, *_: object) -> tuple[Tensor, ...]:
    channels = normaliser.shape[1]
    return tuple(normaliser.new_empty(shape) for shape in ([2, channels], [channels], [channels]))


def _elements(x: Tensor | None, z: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the residual."""
    kept, had_residual = (x, z is not None) if x is not None else (z, residual is not None)
    assert kept is not None
    return _empty_as(kept), _empty_as(kept) if had_residual else kept.new_empty([0])


@torch.library.register_fake("ccnet::abn_backward")
def _(
    x: Tensor | None,
    z: Tensor | None,
    grad_z: Tensor,
    normaliser: Tensor,
    sums: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor]:
    return _elements(x, z, residual)


@torch.library.register_fake("ccnet::abn_backward_of_batch")
def _(
    x: Tensor | None,
    z: Tensor | None,
    grad_z: Tensor,
    normaliser: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *_: object,
) -> tuple[Tensor, ...]:
    parameters = (normaliser.new_empty([normaliser.shape[1]]) for _ in range(2))
    return (*_elements(x, z, residual), *parameters)
