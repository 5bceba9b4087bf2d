"""Activated batch norm by its definition, in plain PyTorch.

Faster implementations are tested against it. Rota Bulo et al., "In-Place Activated BatchNorm for
Memory-Optimized Training of DNNs", arXiv 1712.02616: y = xhat * (|weight| + eps) + bias, z = activation(y). The
in-place form writes z over x and recovers x from z in the backward pass. This one does not overwrite x: it gives the
same numbers but saves no memory.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("leaky_relu", "relu", "elu", "identity", "none")


def activate(y: Tensor, activation: str, slope: float) -> Tensor:
    """Apply one of ACTIVATIONS to a tensor; `slope` is for leaky_relu. Raises ValueError for another name."""
    if activation == "leaky_relu":
        return F.leaky_relu(y, slope)
    if activation == "relu":
        return F.relu(y)
    if activation == "elu":
        return F.elu(y)
    if activation in ("identity", "none"):
        return y
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _synchronised_batch_norm(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """Training batch norm over the batches of all processes, which may differ in size or be empty.

    The variance is computed around the common mean, which is numerically stable.
    """
    from torch.distributed.nn.functional import all_reduce  # differentiable; importing it needs a distributed build

    dtype = x.dtype
    x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    dims = [0, *range(2, x.dim())]
    count = torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64, device=x.device)
    dist.all_reduce(count, group=group)
    count = count.to(x.dtype).clamp(min=1)
    mean = all_reduce(x.sum(dims), group=group) / count
    centred = x - mean.view(per_channel)
    var = all_reduce(centred.square().sum(dims), group=group) / count
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1).clamp(min=1))).to(running_var.dtype), momentum)
    y = centred * (var + eps).rsqrt().view(per_channel)
    if scale is not None and bias is not None:
        y = y * scale.view(per_channel) + bias.view(per_channel)
    return y.to(dtype)


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
    residual: Tensor | None = None,
) -> Tensor:
    """Batch norm, plus `residual` if there is one, then the activation.

    x, residual: [N, C, ...]; weight, bias (both or neither) and the running statistics: [C]. Training uses the
    statistics of the batch, over all processes of `group` if there is one, and updates the running ones in place.
    """
    scale = None if weight is None else weight.abs() + eps
    if training and group is not None:
        y = _synchronised_batch_norm(x, scale, bias, running_mean, running_var, momentum, eps, group)
    else:
        y = F.batch_norm(x, running_mean, running_var, scale, bias, training, momentum, eps)
    return activate(y if residual is None else y + residual, activation, slope)
