"""Activated batch norm as a function: it checks its inputs and calls native code or the reference.

Native code saves the result z for the backward pass, not the input x, and inverts the activation and the affine map
(Rota Bulo et al., "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", arXiv 1712.02616). relu cannot
be inverted: with it, x is saved, and of z only the sign is needed, which x tells if there is no residual.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from cc_attention import native
from cc_attention.calling import call

from . import reference

_NOT_IN_NATIVE_CODE = (
    "activated_batch_norm has no {} in native code; libs.reference.activated_batch_norm has, in plain PyTorch"
)
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
        x: [N, C, ...] in float32, float64, bfloat16 or float16, with any strides; contiguous and channels_last tensors
            are not copied. N may be 0.
        weight, bias: [C] in the dtype of x, or float32 if x has 16 bits. None for 1 and 0.
        running_mean, running_var: [C] in the same dtypes. In training they are updated in place with those of the
            batch, weighted by `momentum`, the variance as its unbiased estimate; otherwise they are used as constants.
        eps: more than 0.
        activation, slope: leaky_relu (with that slope), elu, identity or none, for which the backward pass keeps z; or
            relu, for which it keeps x, and with a residual z as well.
        group: process group whose batches are normalised together in training, with one collective in the forward and
            one in the backward pass.
        in_place: whether z is written over x, which must not be used afterwards. Then x must not be a leaf that
            requires a gradient, and its elements must not share memory; and PyTorch raises an error in the backward
            pass if the operation that produced x needs it. The reference has the same conditions, but does not
            overwrite x; neither does native code while torch.compile or activation checkpointing runs it.
        residual: same shape, dtype and device as x; None for 0. Unless the activation is relu, the backward pass keeps
            it, and recovers the sum without it as a difference, to the absolute accuracy of the larger numbers.

    Returns:
        z, with the shape and dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, training has a single element per channel, or in-place
            computation is not possible; the message names the argument.
        NotImplementedError: second or forward-mode derivatives, or vmap, are requested of native code.
    """
    settings = (training, momentum, eps, activation, slope, group, residual)
    if torch.jit.is_tracing():  # sizes are tensors then, and what it makes cannot hold a torch.autograd.Function
        return reference.activated_batch_norm(x, weight, bias, running_mean, running_var, *settings)
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
    in_native_code = native.runs_on(x.device) and (activation != "leaky_relu" or slope > 0)
    if in_native_code:
        _check_transforms(x, weight, bias, running_mean, running_var, residual)
    if in_place:
        _check_in_place(x, activation, slope)
    if not in_native_code:
        return reference.activated_batch_norm(x, weight, bias, running_mean, running_var, *settings)
    with torch.no_grad():
        normaliser = _normaliser(x, running_mean, running_var, training, momentum, eps, group)
    in_place = in_place and not _is_input_kept()
    accumulated_in = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (p if p is None else p.to(accumulated_in) for p in (weight, bias))
    constants = (eps, activation, float(slope))
    return _ActivatedBatchNorm.apply(x, normaliser, weight, bias, residual, constants, training, group, in_place)


def _normaliser(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """What normalises x (csrc/abn.cpp), by the statistics of the batch, which the running ones take in, or by these."""
    if running_mean.dtype not in (torch.float32, torch.float64):
        mean, var = running_mean.float(), running_var.float()
        normaliser = _normaliser(x, mean, var, training, momentum, eps, group)
        if training:
            running_mean.copy_(mean)
            running_var.copy_(var)
        return normaliser
    running = (running_mean, running_var)
    if not training:
        return call(torch.ops.ccnet.abn_normaliser_of_running, *running, eps)
    if group is None:
        return call(torch.ops.ccnet.abn_normaliser_of_batch_, x, *running, momentum, eps)
    parts = _gathered(call(torch.ops.ccnet.abn_statistics, x), group)
    return call(torch.ops.ccnet.abn_normaliser_of_parts_, parts, *running, momentum, eps)


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all processes, [rows, columns], as [processes, rows, columns]."""
    size, (rows, columns) = dist.get_world_size(group), own.shape
    parts = own.new_empty([size * rows, columns])
    # The newer name of all_gather_into_tensor, of which newer versions of PyTorch warn
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(parts, own, group=group)
    return parts.view(size, rows, columns)


class _ActivatedBatchNorm(torch.autograd.Function):
    """Normalise with a given normaliser. If it is of the batch, the gradient of x accounts for that."""

    @staticmethod
    def forward(
        x: Tensor,
        normaliser: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        constants: tuple[float, str, float],
        of_batch: bool,
        group: dist.ProcessGroup | None,
        in_place: bool,
    ) -> Tensor:
        if not in_place:
            return call(torch.ops.ccnet.abn_forward, x, normaliser, weight, bias, residual, *constants)
        call(torch.ops.ccnet.abn_forward_, x, normaliser, weight, bias, residual, *constants)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, normaliser, weight, bias, residual, ctx.constants, ctx.of_batch, ctx.group, in_place = inputs
        if in_place:
            ctx.mark_dirty(x)
        if ctx.constants[1] == "relu":
            kept = (x, None if residual is None else output, None)
        else:
            kept = (None, output, residual)
        ctx.save_for_backward(*kept, normaliser, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        needs = (needs_x or needs_residual, needs_weight or needs_bias)
        grad_x, grad_residual, grad_weight, grad_bias = _Gradients.apply(
            grad_z, *ctx.saved_tensors, ctx.constants, ctx.of_batch, ctx.group, needs
        )
        return (
            grad_x,
            None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            grad_residual if needs_residual else None,
            *[None] * 4,
        )


class _Gradients(torch.autograd.Function):
    """The gradients of `_ActivatedBatchNorm`, as a separate function, so that their derivative raises an error.

    They depend on both what is kept and the gradient of z. `once_differentiable` considers only the latter, so that a
    second derivative of a loss that is linear in z would silently be 0.
    """

    @staticmethod
    def forward(
        grad_z: Tensor,
        x: Tensor | None,
        z: Tensor | None,
        residual: Tensor | None,
        normaliser: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        constants: tuple[float, str, float],
        of_batch: bool,
        group: dist.ProcessGroup | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, residual, weight and bias; those that are not needed may be None."""
        needs_x, needs_parameters = needs
        kept = (x, z, grad_z, normaliser)
        more = (weight, bias, residual, *constants)
        if needs_x and of_batch and group is None:
            return call(torch.ops.ccnet.abn_backward_of_batch, *kept, *more)
        sums: Any = None
        grad_x = grad_residual = grad_weight = grad_bias = None
        if of_batch or needs_parameters:
            sums, grad_weight, grad_bias = call(torch.ops.ccnet.abn_backward_sums, *kept, *more)
        if needs_x:
            if not of_batch:
                sums = None
            elif group is not None:  # the gradients of weight and bias are those of this process
                dist.all_reduce(sums, group=group)
            grad_x, grad_residual = call(torch.ops.ccnet.abn_backward, *kept, sums, *more)
        return grad_x, grad_residual, grad_weight, grad_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        raise NotImplementedError(_NOT_IN_NATIVE_CODE.format("second derivatives"))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> None:
        raise NotImplementedError(_NOT_IN_NATIVE_CODE.format("batching rule for vmap"))


def _is_input_kept() -> bool:
    """Whether somebody may need x as it is, so that z gets memory of its own.

    In compiled code x may be an input of the graph, and PyTorch 2.14 loses the gradient of an input that is
    overwritten; the compiler frees x. Activation checkpointing, known by its hooks on saved tensors, runs the forward
    pass again from x.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


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


def _check_transforms(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError under forward-mode derivatives, for which results would be constants, and vmap.

    Compiled code need not check: there PyTorch itself refuses both.
    """
    if torch.compiler.is_compiling():
        return
    transforms = {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}
    if torch._C._functorch.TransformType.Vmap in transforms:
        raise NotImplementedError(_NOT_IN_NATIVE_CODE.format("batching rule for vmap"))
    if torch._C._functorch.TransformType.Jvp in transforms or any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise NotImplementedError(_NOT_IN_NATIVE_CODE.format("forward-mode derivatives"))


def _check_in_place(x: Tensor, activation: str, slope: float) -> None:
    if torch.is_grad_enabled() and x.is_leaf and x.requires_grad:
        raise ValueError("x: a leaf that requires a gradient cannot be overwritten; use ABN, or pass a copy of it")
    if _shares_memory(x):
        raise ValueError(
            f"x: expected elements that do not share memory, got shape {list(x.shape)} with strides "
            f"{list(x.stride())}; use ABN, or pass x.contiguous()"
        )
    check_invertible(activation, slope)


def check_invertible(activation: str, slope: float) -> None:
    """Raise a ValueError if the activation is not invertible, as in-place computation requires."""
    if activation == "relu":
        raise ValueError("activation: relu cannot be inverted, so its input is kept; use leaky_relu, or ABN or ABNSync")
    if activation == "leaky_relu" and not slope > 0:
        raise ValueError(f"slope: expected more than 0 for an activation that can be inverted, got {slope}")


def _shares_memory(x: Tensor) -> bool:
    """Whether two elements may have the same address, as after expand."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return False
    reach = 0  # offset of the last element along the dimensions with smaller strides
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
