"""Registers the native operators (csrc/criss_cross.cpp) with PyTorch: shapes, gradients, vmap, autocast, counts.

Imported if the operators are loaded.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import register_flop_formula

from .calling import call
from .functional import in_autocast_dtype

_library = torch.library.Library("ccnet", "FRAGMENT")


# ---- shapes ----


def _empty(like: Tensor, channels: int) -> Tensor:
    shape = [like.shape[0], channels, *like.shape[2:]]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=suggest_memory_format(like))


def _empty_like(x: Tensor) -> Tensor:
    return _empty(x, x.shape[1])


def _empty_per_pixel(like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty([like.shape[0], *like.shape[2:]], dtype=dtype)


@torch.library.register_fake("ccnet::criss_cross_attention")
def _(query: Tensor, key: Tensor, value: Tensor, residual=None, gamma=None, allow_tf32=False):
    return _empty_like(value), _empty_per_pixel(query), _empty_per_pixel(query)


@torch.library.register_fake("ccnet::criss_cross_attention_backward")
def _(grad_out, query: Tensor, key: Tensor, value: Tensor, largest, sum, gamma=None, allow_tf32=False):
    return _empty_like(query), _empty_like(key), _empty_like(value), _empty_per_pixel(query)


@torch.library.register_fake("ccnet::ca_weight")
def _(query: Tensor, key: Tensor, allow_tf32: bool = False) -> Tensor:
    return _empty(query, query.shape[2] + query.shape[3] - 1)


@torch.library.register_fake("ccnet::ca_weight_backward")
def _(grad_energy: Tensor, query: Tensor, key: Tensor, allow_tf32: bool = False) -> tuple[Tensor, Tensor]:
    return _empty_like(query), _empty_like(key)


@torch.library.register_fake("ccnet::ca_map")
def _(weight: Tensor, value: Tensor, allow_tf32: bool = False) -> Tensor:
    return _empty_like(value)


@torch.library.register_fake("ccnet::ca_map_backward")
def _(grad_out: Tensor, weight: Tensor, value: Tensor, allow_tf32: bool = False) -> tuple[Tensor, Tensor]:
    return _empty_like(weight), _empty_like(value)


# ---- gradients ----


def _save_attention(
    ctx: Any,
    output: tuple[Tensor, Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    allow_tf32: bool = False,
) -> None:
    _, largest, sum_ = output
    ctx.allow_tf32 = allow_tf32  # of the forward pass
    ctx.save_for_backward(query, key, value, largest, sum_, gamma)  # neither the result nor the residual
    ctx.mark_non_differentiable(largest, sum_)
    ctx.set_materialize_grads(False)  # no tensors of zeros as gradients of largest and sum, which have none


def _attention_backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    inputs = len(ctx.needs_input_grad)
    if grad_out is None:
        return (None,) * inputs
    saved = ctx.saved_tensors  # once: with activation checkpointing, asking computes them
    *gradients, delta = call(torch.ops.ccnet.criss_cross_attention_backward, grad_out, *saved, ctx.allow_tf32)
    if saved[-1] is not None:  # gamma
        gradients += [grad_out, delta.sum().reshape(1)]
    return (*gradients, None, None, None)[:inputs]


def _save_inputs(ctx: Any, output: Tensor, x: Tensor, y: Tensor, allow_tf32: bool = False) -> None:
    ctx.save_for_backward(x, y)
    ctx.allow_tf32 = allow_tf32


def _backward(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    operator = getattr(torch.ops.ccnet, f"{name}_backward")

    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gradients = call(operator, grad_out, *ctx.saved_tensors, ctx.allow_tf32)
        return (*gradients, None)[: len(ctx.needs_input_grad)]

    return backward


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"{name} has no second derivatives in native code; cc_attention.reference.{name} has them"
        )

    return backward


def _register_gradient(operator: str, function: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register the autograd kernel of an operator, which belongs to a public function or to its backward pass.

    torch.library.register_autograd would treat a tensor with a tangent as a constant: forward-mode derivatives would be
    0. This raises an error instead.
    """
    run = getattr(torch.ops.ccnet, operator).default

    class Differentiable(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor | bool | None) -> Any:
            # Only below autograd of this level of torch.func's: that of outer levels has to see the operator.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
                output = run(*inputs)
            save(ctx, output, *inputs)
            return output

    Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]

    def differentiate(*inputs: Tensor | bool | None) -> Any:
        if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
            raise NotImplementedError(
                f"{function} has no forward-mode derivatives in native code; cc_attention.reference.{function} has them"
            )
        if not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                return run(*inputs)
        with enable_single_level_autograd_function():
            return Differentiable.apply(*inputs)  # type: ignore[attr-defined]

    _library.impl(operator, differentiate, "Autograd")


for _name, _save, _gradient in (
    ("criss_cross_attention", _save_attention, _attention_backward),
    ("ca_weight", _save_inputs, _backward("ca_weight")),
    ("ca_map", _save_inputs, _backward("ca_map")),
):
    _register_gradient(_name, _name, _save, _gradient)
    _register_gradient(f"{_name}_backward", _name, lambda *_: None, _no_second_derivative(_name))


# ---- vmap ----


def _mapped(operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
    """The operator over a further dimension of its inputs, in `in_dims`, which is made part of the batch."""
    first = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(inputs, in_dims, strict=True)
        if isinstance(x, Tensor)
    ]
    results = call(operator, *(x.flatten(0, 1) for x in first), *inputs[len(first) :])
    of_samples = tree_map(lambda x: x.unflatten(0, first[0].shape[:2]), results)
    return of_samples, tree_map(lambda _: 0, results)


def _scale(x: Tensor, by: Tensor, dim: int | None) -> Tensor:
    """x, whose first dimension is mapped over, times one number, or with `dim` one for each of the mapped."""
    factors = by.reshape(()) if dim is None else by.movedim(dim, 0).reshape(-1, *(1 for _ in x.shape[1:]))
    return (x * factors).to(x.dtype)


# One call for all samples knows one gamma only, so gamma is applied outside.
def _mapped_attention(info, in_dims, query, key, value, residual=None, gamma=None, allow_tf32=False):
    operator = partial(torch.ops.ccnet.criss_cross_attention, allow_tf32=allow_tf32)
    (out, largest, sum_), out_dims = _mapped(operator, info, in_dims[:3], query, key, value)
    if residual is not None:
        attended = _scale(out, gamma, in_dims[4])
        out = attended + (residual if in_dims[3] is None else residual.movedim(in_dims[3], 0))
    return (out, largest, sum_), out_dims


def _mapped_attention_backward(info, in_dims, grad_out, query, key, value, largest, sum_, gamma=None, allow_tf32=False):
    operator = partial(torch.ops.ccnet.criss_cross_attention_backward, allow_tf32=allow_tf32)
    tensors = (grad_out, query, key, value, largest, sum_)
    (*gradients, delta), out_dims = _mapped(operator, info, in_dims[:6], *tensors)
    if gamma is not None:
        gradients = [_scale(x, gamma, in_dims[6]) for x in gradients]
    return (*gradients, delta), out_dims


torch.library.register_vmap("ccnet::criss_cross_attention", _mapped_attention)
torch.library.register_vmap("ccnet::criss_cross_attention_backward", _mapped_attention_backward)
for _name in ("ca_weight", "ca_map", "ca_weight_backward", "ca_map_backward"):
    torch.library.register_vmap(f"ccnet::{_name}", partial(_mapped, getattr(torch.ops.ccnet, _name)))


# ---- autocast ----


def _attention_under_autocast(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    allow_tf32: bool = False,
) -> Any:
    def attention(*inputs: Tensor) -> Any:  # gamma keeps its dtype
        query, key, value, residual = (*inputs, None)[:4]
        return torch.ops.ccnet.criss_cross_attention(query, key, value, residual, gamma, allow_tf32)

    inputs = (query, key, value) if residual is None else (query, key, value, residual)
    return in_autocast_dtype(attention, *inputs)


def _under_autocast(operator: Callable[..., Tensor], x: Tensor, y: Tensor, allow_tf32: bool = False) -> Tensor:
    return in_autocast_dtype(partial(operator, allow_tf32=allow_tf32), x, y)


for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("criss_cross_attention", _attention_under_autocast, _key)
    for _name in ("ca_weight", "ca_map"):
        _library.impl(_name, partial(_under_autocast, getattr(torch.ops.ccnet, _name)), _key)


# ---- floating-point operations, for torch.utils.flop_counter: those of the matrix products of the plain form ----


def _products(pixels: list[int], channels: int) -> int:
    """Of one number for each position of each line through each pixel, summed over the channels; a pixel itself is in
    all of its lines."""
    batch, _, *sizes = pixels
    return 2 * batch * math.prod(sizes) * sum(sizes) * channels


def _register_operations(name: str, count: Callable[..., int]) -> None:
    """Register the count of an operator by the shapes of its inputs; its backward pass has twice as many."""
    register_flop_formula(getattr(torch.ops.ccnet, name))(lambda *shapes, **_: count(*shapes))
    register_flop_formula(getattr(torch.ops.ccnet, f"{name}_backward"))(lambda grad, *shapes, **_: 2 * count(*shapes))


_register_operations("criss_cross_attention", lambda query, key, value, *_: _products(query, query[1] + value[1]))
_register_operations("ca_weight", lambda query, key, *_: _products(query, query[1]))
_register_operations("ca_map", lambda weight, value, *_: _products(value, value[1]))
