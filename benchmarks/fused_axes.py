"""Criss-cross attention by PyTorch's fused attention: along rows, along columns, merged by their log-sum-exp.

This is what one would write today without kernels of one's own, and it stores no attention map. A pixel is in its row
and in its column; one of the two is subtracted. Values are cut into heads with as many channels as keys have, which the
kernels expect. On a GPU FlexAttention computes it, under torch.compile; on the CPU, where that has no backward, the
kernel of scaled_dot_product_attention, whose backward takes the merged log-sum-exp as well.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
ROWS, COLUMNS = 1, 2  # the dimension of [N, H, W, ...] that tells the lines apart


def by_pixel(x: Tensor, channels: int) -> Tensor:
    """[N, C, H, W] to [N, H, W, heads, channels]; the kernels expect that channels are the last dimension in memory."""
    return x.permute(0, 2, 3, 1).contiguous().unflatten(3, (-1, channels))


def lines(x: Tensor, axis: int, heads: int = -1) -> Tensor:
    """[N, H, W, heads, C] to [N * lines, heads, length, C]; one head may stand for several."""
    return x.transpose(1, axis).flatten(0, 1).transpose(1, 2).expand(-1, heads, -1, -1)


def pixels(x: Tensor, axis: int, n: int) -> Tensor:
    """The inverse of `lines`."""
    return x.transpose(1, 2).unflatten(0, (n, -1)).transpose(1, axis)


def self_energy(query: Tensor, key: Tensor) -> Tensor:
    precise = torch.promote_types(query.dtype, torch.float32)
    return (query.to(precise) * key.to(precise)).sum(4, keepdim=True)


def merge(parts: list[tuple[Tensor, Tensor]], value: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the log-sum-exp of row and column together, without the pixel itself in one of them."""
    largest = torch.maximum(parts[0][1], parts[1][1]).detach()
    total = (parts[0][1] - largest).exp() + (parts[1][1] - largest).exp() - (own - largest).exp()
    log_sum = largest + total.log()
    out = sum(out * (log_sum_of_one - log_sum).exp().to(out.dtype) for out, log_sum_of_one in parts)
    return out - value * (own - log_sum).exp().to(value.dtype), log_sum


def attend(kernel: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Along rows and along columns by a fused kernel that returns result and log-sum-exp; merged."""
    parts = []
    for axis in (ROWS, COLUMNS):
        out, log_sum = kernel(*(lines(x, axis, value.shape[3]) for x in (query, key, value)), scale=1.0)
        parts.append((pixels(out, axis, len(value)), pixels(log_sum[..., None], axis, len(value))))
    return merge(parts, value, self_energy(query, key))


class _OnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, log_sum = attend(aten._scaled_dot_product_flash_attention_for_cpu, query, key, value)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out, log_sum = ctx.saved_tensors
        (grad_out,), heads = grads, value.shape[3]
        # The pixel itself, whose part is subtracted
        weight = (self_energy(query, key) - log_sum).exp()
        grad_own = (weight * (grad_out * (value - out)).sum(4, keepdim=True)).sum(3, keepdim=True)
        totals = [-grad_own * key, -grad_own * query, -weight * grad_out]
        for axis in (ROWS, COLUMNS):
            g, q, k, v, o = (lines(x, axis, heads) for x in (grad_out, query, key, value, out))
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, o, lines(log_sum, axis)[..., 0], 0.0, False, scale=1.0
            )
            for number, gradient in enumerate(found):
                of_heads = pixels(gradient, axis, len(value))
                totals[number] = totals[number] + (of_heads if number == 2 else of_heads.sum(3, keepdim=True))
        return tuple(total.to(x.dtype) for total, x in zip(totals, (query, key, value), strict=True))


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _on_gpu(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(functools.partial(_flex(), return_lse=True), query, key, value)[0]


def fused_axes_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query and key [N, C', H, W], value [N, C, H, W] with C a multiple of C'."""
    compute = _on_gpu if value.is_cuda else _OnCpu.apply
    out = compute(*(by_pixel(x, key.shape[1]) for x in (query, key, value)))
    return out.flatten(3).permute(0, 3, 1, 2)
