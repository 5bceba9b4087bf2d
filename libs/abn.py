"""Activated batch norm modules, with the constructor arguments and state-dict names of the original."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import reference
from .functional import activated_batch_norm


class ABN(nn.Module):
    """Batch norm followed by an activation: z = activation(xhat * (|weight| + eps) + bias).

    Args:
        num_features: channels C.
        eps: added to the variance, and to |weight|; more than 0.
        momentum: weight of the new batch in the running statistics; None for the mean over all batches, which are
            counted from when the module was made.
        affine: whether there are a weight (1 at the start) and a bias (0).
        activation: leaky_relu, elu, identity, or none (the same as identity).
        slope: leaky_relu's slope on the negative side.

    Shape: [N, C, ...] to the same. In training the statistics are the batch's, and the running ones are updated
    (running_var by the unbiased n/(n-1)); in evaluation they are the running ones.

    State dict: weight, bias, running_mean, running_var. There is no num_batches_tracked.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    _in_place = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        activation: str = "leaky_relu",
        slope: float = 0.01,
    ):
        super().__init__()
        if activation not in reference.ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.activation = activation
        self.slope = slope
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if affine else None)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        # In no state dict: the original's have none.
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """With a residual: activation(xhat * (|weight| + eps) + bias + residual)."""
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"x: expected shape [N, {self.num_features}, ...], got {list(x.shape)}")
        return activated_batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            self._weight_of_batch(),
            self.eps,
            self.activation,
            self.slope,
            self._synchronised_over(),
            self._in_place,
            residual,
        )

    def _weight_of_batch(self) -> float:
        """The batch's part in the running statistics."""
        if self.momentum is not None or not self.training:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return 1 / float(self.num_batches_tracked)

    def _synchronised_over(self) -> dist.ProcessGroup | None:
        """The process group that shares its statistics; None for this process alone."""
        return None

    def extra_repr(self) -> str:
        slope = f", slope={self.slope}" if self.activation == "leaky_relu" else ""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"activation={self.activation}{slope}"
        )


class InPlaceABN(ABN):
    """ABN that overwrites its input with its output, which must not be used afterwards.

    The activation is inverted in the backward pass: slope has to be more than 0. What the input has to be, and the
    errors, are told at `activated_batch_norm`. (The plain PyTorch form, which runs where there is no native one, does
    not overwrite.)
    """

    _in_place = True

    def __init__(self, num_features: int, *args, **kwargs):
        super().__init__(num_features, *args, **kwargs)
        if self.activation == "leaky_relu" and not self.slope > 0:
            raise ValueError(f"slope: expected more than 0 for an activation that can be inverted, got {self.slope}")


class InPlaceABNSync(InPlaceABN):
    """InPlaceABN whose batch is that of all processes of a torch.distributed group.

    Args:
        group: the process group; None for all processes. The others as in `ABN`.

    Every process takes part in each training step, also one with an empty batch. If one of them fails, the error of
    the collective is raised in the others. Where torch.distributed is not initialised, or the group is of one process,
    this is InPlaceABN.
    """

    def __init__(self, num_features: int, *args, group: dist.ProcessGroup | None = None, **kwargs):
        super().__init__(num_features, *args, **kwargs)
        self.group = group

    def _synchronised_over(self) -> dist.ProcessGroup | None:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.group if self.group is not None else dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None
