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


@torch.library.register_fake("ccnet::criss_cross_attention")
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    largest, sum_ = (query.new_empty([query.shape[0], *query.shape[2:]], dtype=dtype) for _ in range(2))
    return _empty_like(value), largest, sum_


@torch.library.register_fake("ccnet::criss_cross_attention_backward")
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, largest: Tensor, sum: Tensor):
    return _empty_like(query), _empty_like(key), _empty_like(value)


@torch.library.register_fake("ccnet::ca_weight")
def _(query: Tensor, key: Tensor) -> Tensor:
    return _empty(query, query.shape[2] + query.shape[3] - 1)


@torch.library.register_fake("ccnet::ca_weight_backward")
def _(grad_energy: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(query), _empty_like(key)


@torch.library.register_fake("ccnet::ca_map")
def _(weight: Tensor, value: Tensor) -> Tensor:
    return _empty_like(value)


@torch.library.register_fake("ccnet::ca_map_backward")
def _(grad_out: Tensor, weight: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(weight), _empty_like(value)


# ---- gradients ----


def _save_attention(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, largest, sum_ = output
    ctx.save_for_backward(*inputs, out, largest, sum_)
    ctx.mark_non_differentiable(largest, sum_)
    ctx.set_materialize_grads(False)  # no tensors of zeros as gradients of largest and sum, which have none


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    operator = getattr(torch.ops.ccnet, f"{name}_backward")

    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return tuple(None for _ in ctx.needs_input_grad)
        return call(operator, grad_out, *ctx.saved_tensors)

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
        def forward(ctx: Any, *inputs: Tensor) -> Any:
            # Only below autograd of this level of torch.func's: that of outer levels has to see the operator.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
                output = run(*inputs)
            save(ctx, inputs, output)
            return output

    Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]

    def differentiate(*inputs: Tensor) -> Any:
        if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
            raise NotImplementedError(
                f"{function} has no forward-mode derivatives in native code; cc_attention.reference.{function} has them"
            )
        if not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                return run(*inputs)
        with enable_single_level_autograd_function():
            return Differentiable.apply(*inputs)  # type: ignore[attr-defined]

    _library.impl(operator, differentiate, "Autograd")


for _name, _save in (
    ("criss_cross_attention", _save_attention),
    ("ca_weight", _save_inputs),
    ("ca_map", _save_inputs),
):
    _register_gradient(_name, _name, _save, _backward(_name))
    _register_gradient(f"{_name}_backward", _name, lambda *_: None, _no_second_derivative(_name))


# ---- vmap ----


def _mapped(operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
    """The operator over a further dimension of its inputs, in `in_dims`, which is made part of the batch."""
    first = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(inputs, in_dims, strict=True)
    ]
    results = call(operator, *(x.flatten(0, 1) for x in first))
    of_samples = tree_map(lambda x: x.unflatten(0, first[0].shape[:2]), results)
    return of_samples, tree_map(lambda _: 0, results)


for _name in ("criss_cross_attention", "ca_weight", "ca_map"):
    for _operator in (_name, f"{_name}_backward"):
        torch.library.register_vmap(f"ccnet::{_operator}", partial(_mapped, getattr(torch.ops.ccnet, _operator)))


# ---- autocast ----


for _name in ("criss_cross_attention", "ca_weight", "ca_map"):
    for _key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(_name, partial(in_autocast_dtype, getattr(torch.ops.ccnet, _name)), _key)


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
