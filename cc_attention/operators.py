"""What PyTorch has to know of the native operators (csrc/criss_cross.cpp): shapes, gradients, autocast.

Imported where the operators are loaded. Each function is registered for the operator whose name it is given.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .functional import channels_last_format, in_autocast_dtype

_library = torch.library.Library("ccnet", "FRAGMENT")


# ---- shapes ----


def _empty(like: Tensor, channels: int) -> Tensor:
    shape = [like.shape[0], channels, *like.shape[2:]]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=channels_last_format(like))


def _path_length(x: Tensor) -> int:
    return x.shape[2] + x.shape[3] - 1


@torch.library.register_fake("ccnet::criss_cross_attention")
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    largest, sum_ = (query.new_empty([query.shape[0], *query.shape[2:]], dtype=dtype) for _ in range(2))
    return _empty(value, value.shape[1]), largest, sum_


@torch.library.register_fake("ccnet::criss_cross_attention_backward")
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, largest: Tensor, sum: Tensor):
    return _empty(query, query.shape[1]), _empty(key, key.shape[1]), _empty(value, value.shape[1])


@torch.library.register_fake("ccnet::ca_weight")
def _(query: Tensor, key: Tensor) -> Tensor:
    return _empty(query, _path_length(query))


@torch.library.register_fake("ccnet::ca_weight_backward")
def _(grad_energy: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(query, query.shape[1]), _empty(key, key.shape[1])


@torch.library.register_fake("ccnet::ca_map")
def _(weight: Tensor, value: Tensor) -> Tensor:
    return _empty(value, value.shape[1])


@torch.library.register_fake("ccnet::ca_map_backward")
def _(grad_out: Tensor, weight: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(weight, weight.shape[1]), _empty(value, value.shape[1])


@torch.library.register_fake("ccnet::channels_last")
def _(x: Tensor) -> Tensor:
    return _empty(x, x.shape[1])


# ---- gradients ----


def _save_attention(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, largest, sum_ = output
    ctx.save_for_backward(*inputs, out, largest, sum_)
    ctx.mark_non_differentiable(largest, sum_)


def _attention_backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.ccnet.criss_cross_attention_backward(grad_out, *ctx.saved_tensors)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weight_backward(ctx: Any, grad_energy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.ccnet.ca_weight_backward(grad_energy, *ctx.saved_tensors)


def _map_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.ccnet.ca_map_backward(grad_out, *ctx.saved_tensors)


torch.library.register_autograd(
    "ccnet::criss_cross_attention", _attention_backward, setup_context=_save_attention, lib=_library
)
torch.library.register_autograd("ccnet::ca_weight", _weight_backward, setup_context=_save_inputs, lib=_library)
torch.library.register_autograd("ccnet::ca_map", _map_backward, setup_context=_save_inputs, lib=_library)
torch.library.register_autograd("ccnet::channels_last", lambda ctx, grad: grad, lib=_library)


def _no_second_derivative(name: str) -> Callable[..., None]:
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"{name} has no second derivatives in native code; cc_attention.reference.{name} has them"
        )

    return backward


for _name in ("criss_cross_attention", "ca_weight", "ca_map"):
    torch.library.register_autograd(f"ccnet::{_name}_backward", _no_second_derivative(_name), lib=_library)


# ---- autocast ----


for _name in ("criss_cross_attention", "ca_weight", "ca_map"):
    for _key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(_name, partial(in_autocast_dtype, getattr(torch.ops.ccnet, _name)), _key)
