"""Activated batch norm as a function: inputs are checked here, then handed to native code or to the reference.

Native code saves for the backward pass the result z and not the input x: activation and affine map are inverted there
(Rota Bulo et al., "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", arXiv 1712.02616).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cc_attention import native

from . import reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def activated_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    slope: float,
    group: dist.ProcessGroup | None = None,
    in_place: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """z = activation(xhat * (|weight| + eps) + bias + residual), xhat = (x - mean) / sqrt(var + eps).

    Args:
        x: [N, C, ...] in float32, float64, bfloat16 or float16, of any strides; contiguous and channels_last tensors
            are not copied. N may be 0.
        weight, bias: [C] in the dtype of x, or float32 for x of 16 bits. None for 1 and 0.
        running_mean, running_var: [C]. In training, `momentum` of the batch's is mixed into them, the variance as its
            unbiased estimate; otherwise they are used as constants.
        eps: more than 0.
        activation, slope: leaky_relu (with that slope), elu, identity, or none.
        group: processes whose batches make one batch, in training. One collective each way.
        in_place: whether z is written over x, which must not be used afterwards. x must then not be a leaf that
            requires a gradient, nor hold elements that share memory; and PyTorch raises an error in the backward pass
            if what made x needs it unchanged. The reference has the same conditions and does not overwrite.
        residual: of the shape, dtype and device of x; None for 0. It is kept for the backward pass beside z, and y is
            recovered as the difference of the two: to the accuracy of their dtype, not of y.

    Returns:
        z, of the shape and dtype of x. Second derivatives are not implemented in native code.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, there is one element a channel to train on, or in-place
            computation is not possible; the message names the argument.
    """
    _check(x, weight, bias, running_mean, running_var)
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual: expected {list(x.shape)} {x.dtype} on {x.device} as x is, got {list(residual.shape)} "
            f"{residual.dtype} on {residual.device}"
        )
    if not eps > 0:
        raise ValueError(f"eps: expected more than 0, since a weight of 0 could not be inverted without, got {eps}")
    if training and group is None and x.numel() == x.shape[1]:
        raise ValueError(f"x: expected more than one element a channel in training, got {list(x.shape)}")
    if in_place:
        _check_in_place(x, activation, slope)
    invertible = activation != "leaky_relu" or slope > 0
    if not (native.runs_on(x.device) and invertible):
        return reference.activated_batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps, activation, slope, group, residual
        )
    with torch.no_grad():
        if training:
            statistics = torch.ops.ccnet.abn_statistics(x)
            if group is not None:
                statistics = _of_all(statistics, group)
            _update_running(running_mean, running_var, statistics, momentum)
        else:  # as of a batch of one
            mean = running_mean.double()
            statistics = torch.stack([torch.ones_like(mean), mean, running_var.double()])
    # Compiled, x may be an input of the graph, and PyTorch 2.14 loses the gradient of one that is written to: z gets
    # memory of its own there, and the compiler frees that of x.
    in_place = in_place and not torch.compiler.is_compiling()
    accumulated_in = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (p if p is None else p.to(accumulated_in) for p in (weight, bias))
    return _ActivatedBatchNorm.apply(
        x, statistics, weight, bias, residual, eps, activation, float(slope), training, group, in_place
    )


class _ActivatedBatchNorm(torch.autograd.Function):
    """Normalises by given statistics; where they are those of x, its gradient goes through them too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        statistics: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        activation: str,
        slope: float,
        of_batch: bool,
        group: dist.ProcessGroup | None,
        in_place: bool,
    ) -> Tensor:
        if in_place:
            torch.ops.ccnet.abn_forward_(x, statistics, weight, bias, residual, eps, activation, slope)
            ctx.mark_dirty(x)
            z = x
        else:
            z = torch.ops.ccnet.abn_forward(x, statistics, weight, bias, residual, eps, activation, slope)
        ctx.save_for_backward(z, statistics, weight, bias, residual)
        ctx.constants = (eps, activation, slope)
        ctx.of_batch, ctx.group = of_batch, group
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        z, statistics, *tensors = ctx.saved_tensors
        weight, bias, residual = tensors
        needs_x, _, needs_weight, needs_bias, needs_residual, *others = ctx.needs_input_grad
        grad_x = grad_residual = None
        sums: Any = None
        if ctx.of_batch or needs_weight or needs_bias:
            sums = torch.ops.ccnet.abn_backward_sums(z, grad_z, *tensors, *ctx.constants)
        grad_weight = (sums[1] * weight.sign()).to(weight.dtype) if needs_weight else None
        grad_bias = sums[0].to(bias.dtype) if needs_bias else None
        if needs_x or needs_residual:
            if not ctx.of_batch:
                sums = None
            elif ctx.group is not None:
                sums = sums.clone()  # those of weight and bias stay this process's own
                dist.all_reduce(sums, group=ctx.group)
            grad_x, grad_residual = torch.ops.ccnet.abn_backward(z, grad_z, statistics, sums, *tensors, *ctx.constants)
        return (
            grad_x,
            None,
            grad_weight,
            grad_bias,
            None if residual is None else grad_residual,
            *(None for _ in others),
        )


def _of_all(statistics: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Statistics [3, C], of `abn_statistics`, of the batches of all processes together.

    The parts' means may differ much: their squares are taken as deviations from the mean of all.
    """
    parts = statistics.new_empty([dist.get_world_size(group), *statistics.shape])
    dist.all_gather(list(parts.unbind()), statistics, group=group)
    count, mean, squares = parts.unbind(1)
    total = count.sum(0)
    mean_of_all = (count * mean).sum(0) / total.clamp(min=1)
    return torch.stack([total, mean_of_all, (squares + count * (mean - mean_of_all).square()).sum(0)])


def _update_running(running_mean: Tensor, running_var: Tensor, statistics: Tensor, momentum: float) -> None:
    if running_mean.dtype in (torch.float32, torch.float64):
        torch.ops.ccnet.abn_update_running_(running_mean, running_var, statistics, momentum)
        return
    mean, var = running_mean.float(), running_var.float()
    torch.ops.ccnet.abn_update_running_(mean, var, statistics, momentum)
    running_mean.copy_(mean)
    running_var.copy_(var)


# ---- checks ----


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [N, C, ...], got {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    of_16_bits = x.dtype.itemsize == 2
    per_channel = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, numbers in per_channel.items():
        if numbers is None:
            continue
        if numbers.dim() != 1 or numbers.shape[0] != x.shape[1]:
            raise ValueError(f"{name}: expected shape [{x.shape[1]}] for x {list(x.shape)}, got {list(numbers.shape)}")
        if numbers.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} as x is, got {numbers.device}")
        if numbers.dtype != x.dtype and not (of_16_bits and numbers.dtype == torch.float32):
            wanted = f"{x.dtype} or torch.float32" if of_16_bits else f"{x.dtype}"
            raise ValueError(f"{name}: expected {wanted} for x of {x.dtype}, got {numbers.dtype}")


def _check_in_place(x: Tensor, activation: str, slope: float) -> None:
    if torch.is_grad_enabled() and x.is_leaf and x.requires_grad:
        raise ValueError("x: a leaf that requires a gradient cannot be overwritten; use ABN, or pass a copy of it")
    if _shares_memory(x):
        raise ValueError(
            f"x: expected elements that do not share memory, got shape {list(x.shape)} with strides "
            f"{list(x.stride())}; use ABN, or pass x.contiguous()"
        )
    if activation == "leaky_relu" and not slope > 0:
        raise ValueError(f"slope: expected more than 0 for an activation that can be inverted, got {slope}")


def _shares_memory(x: Tensor) -> bool:
    """Whether two of the elements may be one in memory, as after expand."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return False
    reach = 0  # the farthest element so far, along the dimensions of smaller strides
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
