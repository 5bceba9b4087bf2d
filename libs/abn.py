"""Activated batch norm modules, with the constructor arguments and state-dict names of the original."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import reference
from .functional import activated_batch_norm, check_invertible

# torch.fx makes one node of a call.
torch.fx.wrap("activated_batch_norm")
torch.fx.wrap("_check_channels")


def _check_channels(x: Tensor, channels: int) -> None:
    if not torch.jit.is_tracing() and (x.dim() < 2 or x.shape[1] != channels):  # sizes are tensors while it traces
        raise ValueError(f"x: expected shape [N, {channels}, ...], got {list(x.shape)}")


class ABN(_BatchNorm):
    """Batch norm followed by an activation: z = activation(xhat * (|weight| + eps) + bias).

    It is a subclass of torch's `_BatchNorm`, so that code which looks for batch norms finds it (docs/inplace_abn.md).

    Args:
        num_features: channels C.
        eps: added to the variance and to |weight|; more than 0.
        momentum: weight of the new batch in the running statistics; None for the mean over all batches since the
            module was created or its statistics were reset. State dicts do not contain the number of batches.
        affine: whether it has a weight (1 at the start) and a bias (0).
        activation: leaky_relu, relu, elu, identity, or none (the same as identity). relu cannot be inverted: with it,
            the backward pass keeps x instead of the result, and with a residual both.
        slope: leaky_relu's slope on the negative side.
        device, dtype: those of parameters and statistics.
        activation_param: inplace_abn's name for slope. For elu it must be 1.

    Shape: [N, C, ...] to the same. In training it uses the statistics of the batch and updates the running ones
    (running_var with the unbiased estimate); in evaluation it uses the running ones.

    State dict: weight, bias, running_mean, running_var. A state dict of torch's batch norm, recognised by its
    num_batches_tracked, is converted so that the module computes the same; its weights must not be negative.

    Raises:
        ValueError: the activation or its parameter is not one of these.
    """

    running_mean: Tensor
    running_var: Tensor
    _in_place = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        activation: str = "leaky_relu",
        slope: float = 0.01,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation_param: float | None = None,
    ):
        nn.Module.__init__(self)  # not _BatchNorm's, which registers num_batches_tracked
        if activation not in reference.ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
        if activation_param is not None:
            if activation == "elu" and activation_param != 1:
                raise ValueError(f"activation_param: expected 1, the alpha of elu, got {activation_param}")
            slope = activation_param if activation == "leaky_relu" else slope
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = True
        self.activation = activation
        self.slope = slope
        self.batches_seen = 0
        for name in ("weight", "bias"):
            empty = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, empty)
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def num_batches_tracked(self) -> None:  # type: ignore[override]
        """Not available. `convert_sync_batchnorm`, which would drop the activation, reads it and gets an error."""
        raise NotImplementedError(
            f"{type(self).__name__} has no num_batches_tracked and is not converted to nn.SyncBatchNorm, which would "
            "drop its activation; use ABNSync or InPlaceABNSync, or libs.to_batchnorm first"
        )

    def __dir__(self) -> list[str]:
        # torch.jit.trace reads every attribute.
        return [name for name in super().__dir__() if name != "num_batches_tracked"]

    def reset_running_stats(self) -> None:
        """Reset the running mean to 0, the running variance to 1, and the number of batches."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.batches_seen = 0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise x; with a residual: activation(xhat * (|weight| + eps) + bias + residual).

        Raises:
            ValueError, NotImplementedError: as `activated_batch_norm`.
        """
        _check_channels(x, self.num_features)
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
        """The weight of the batch in the running statistics."""
        if not (self.training and self.track_running_stats):
            return 0.0
        if self.momentum is not None:
            return self.momentum
        self.batches_seen += 1
        return 1 / self.batches_seen

    def _synchronised_over(self) -> dist.ProcessGroup | None:
        """The process group whose batches are normalised together; None for this process alone."""
        return None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Only torch's norm has this counter; it multiplies by weight, not by |weight| + eps.
        if state_dict.pop(f"{prefix}num_batches_tracked", None) is not None:
            self._load_from_batchnorm(state_dict, prefix, error_msgs)
        # not _BatchNorm's, which adds the counter
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_from_batchnorm(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
        """Convert the weight and running variance of torch's batch norm to this module's form."""
        weight, var = (state_dict.get(prefix + name) for name in ("weight", "running_var"))
        if weight is None or var is None or weight.is_meta or weight.shape != var.shape:
            return
        if (weight < 0).any():
            error_msgs.append(
                f"{prefix}weight: expected none below 0 in the state dict of torch's batch norm (it has "
                f"num_batches_tracked), found {int((weight < 0).sum())}; activated batch norm has |weight|: use "
                "libs.absorb_negative_weights with the convolution before it"
            )
            return
        state_dict[f"{prefix}weight"], state_dict[f"{prefix}running_var"] = numbers_of_abn(weight, var, self.eps)

    def extra_repr(self) -> str:
        slope = f", slope={self.slope}" if self.activation == "leaky_relu" else ""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"activation={self.activation}{slope}"
        )


def numbers_of_abn(weight: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Weight and running variance, [C], for which activated batch norm in evaluation equals torch's batch norm.

    |weight| + eps is never less than eps. For a smaller `weight` (0 or more) a larger running_var has the same effect.
    """
    exact = weight.detach().double()
    var = (running_var.double() + eps) * (eps / exact).square() - eps
    var = var.clamp(max=torch.finfo(running_var.dtype).max).to(running_var.dtype)
    return (exact - eps).clamp(min=0).to(weight.dtype), torch.where(exact < eps, var, running_var)


class InPlaceABN(ABN):
    """ABN that writes its output over its input, which must not be used afterwards.

    The backward pass inverts the activation, so it cannot be relu, and slope must be more than 0. For conditions on the
    input and errors see `activated_batch_norm`. (Plain PyTorch, used where there is no native code, does not overwrite
    the input.)
    """

    _in_place = True

    def __init__(self, num_features: int, *args, **kwargs):
        super().__init__(num_features, *args, **kwargs)
        check_invertible(self.activation, self.slope)


class ABNSync(ABN):
    """ABN with statistics over the batches of all processes of a torch.distributed group.

    Args:
        group: the process group; None for all processes. Other arguments are those of `ABN`.

    Every process must take part in each training step, also with an empty batch. If one fails, the collective raises an
    error in the others. If torch.distributed is not initialised, or the group has one process, this is ABN.
    """

    def __init__(self, num_features: int, *args, group: dist.ProcessGroup | None = None, **kwargs):
        super().__init__(num_features, *args, **kwargs)
        self.group = group

    def _synchronised_over(self) -> dist.ProcessGroup | None:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.group if self.group is not None else dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


class InPlaceABNSync(ABNSync, InPlaceABN):
    """ABNSync that, as InPlaceABN, writes its output over its input."""
