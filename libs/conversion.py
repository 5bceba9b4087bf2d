"""Activated batch norm to and from torch's batch norm and activation, and into the convolution before it."""

import copy

import torch
from torch import Tensor, nn

from .abn import ABN, InPlaceABN

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@torch.no_grad()
def from_batchnorm(
    norm: _BatchNorm,
    activation: str = "identity",
    slope: float = 0.01,
    kind: type[ABN] = InPlaceABN,
    convolution: _Convolution | None = None,
) -> ABN:
    """Activated batch norm that gives in evaluation what `norm` and then the activation give.

    Its factor |weight| + eps is eps at least. A negative weight of `norm` is therefore taken over by the convolution
    before it, whose channel is negated, in place. A weight nearer to 0 than eps is made up for by a larger running_var,
    as which it counts until training has forgotten it.

    Args:
        norm: with running statistics.
        activation, slope: what follows `norm`; see `ABN`.
        kind: ABN, InPlaceABN or InPlaceABNSync.
        convolution: what gives the input of `norm` and of nothing else; needed where weights are negative.

    Raises:
        ValueError: `norm` keeps no running statistics, or has negative weights and there is no convolution that fits.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm: expected running statistics, got track_running_stats=False")
    abn = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, activation, slope)
    abn.to(device=norm.running_mean.device, dtype=norm.running_mean.dtype).train(norm.training)
    abn.running_mean.copy_(norm.running_mean)
    abn.running_var.copy_(norm.running_var)
    if abn.weight is None or abn.bias is None:
        return abn
    gamma = norm.weight.double()
    negative = gamma < 0
    if negative.any():
        _negate(convolution, negative)
        abn.running_mean[negative] *= -1
    gain = gamma.abs()
    abn.weight.copy_((gain - norm.eps).clamp(min=0))
    abn.bias.copy_(norm.bias)
    too_small = gain < norm.eps
    var = (norm.running_var.double() + norm.eps) * (norm.eps / gain).square() - norm.eps
    largest = torch.finfo(abn.running_var.dtype).max
    abn.running_var[too_small] = var.clamp(max=largest).to(abn.running_var.dtype)[too_small]
    return abn


def _negate(convolution: _Convolution | None, channels: Tensor) -> None:
    """Change the sign of these output channels."""
    if convolution is None:
        raise ValueError(
            f"norm: {int(channels.sum())} weights are negative, and activated batch norm has |weight|: expected the "
            "convolution before it, to negate these channels"
        )
    _check_fits(convolution, len(channels))
    convolution.weight[channels] *= -1
    if convolution.bias is not None:
        convolution.bias[channels] *= -1


def _check_fits(convolution: nn.Module, channels: int) -> None:
    if not isinstance(convolution, _Convolution):
        raise ValueError(f"convolution: expected Conv1d, Conv2d or Conv3d, got {type(convolution).__name__}")
    if convolution.out_channels != channels:
        raise ValueError(f"convolution: expected {channels} output channels, got {convolution.out_channels}")


class BatchNormActivation(nn.BatchNorm2d):
    """torch's batch norm, then an activation, by torch's own functions: activation(norm(x) + residual)."""

    def __init__(self, num_features: int, eps: float, momentum: float | None, affine: bool, activation: nn.Module):
        super().__init__(num_features, eps, momentum, affine)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return self.activation(y if residual is None else y + residual)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions, as activated batch norm."""


def _activation_module(abn: ABN) -> nn.Module:
    if abn.activation == "leaky_relu":
        return nn.LeakyReLU(abn.slope)
    return nn.ELU() if abn.activation == "elu" else nn.Identity()


@torch.no_grad()
def to_batchnorm(module: nn.Module) -> nn.Module:
    """A copy of the module, a whole network or one activated batch norm, made of torch's own batch norm only.

    Each activated batch norm becomes a `BatchNormActivation`, whose weight is |weight| + eps. Results are the same in
    training and in evaluation, and so are the names in the state dict, to which num_batches_tracked comes; statistics
    are no longer synchronised.
    """
    if not isinstance(module, ABN):
        module = copy.copy(module)
        module._parameters, module._buffers = copy.deepcopy((module._parameters, module._buffers))
        module._modules = {name: child and to_batchnorm(child) for name, child in module._modules.items()}
        return module
    norm = BatchNormActivation(
        module.num_features, module.eps, module.momentum, module.affine, _activation_module(module)
    )
    norm.to(device=module.running_mean.device, dtype=module.running_mean.dtype).train(module.training)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(module.running_mean)
    norm.running_var.copy_(module.running_var)
    if module.weight is not None and module.bias is not None:
        norm.weight.copy_(module.weight.double().abs() + module.eps)
        norm.bias.copy_(module.bias)
    return norm


@torch.no_grad()
def fold(convolution: _Convolution, abn: ABN) -> nn.Sequential:
    """The convolution and activated batch norm in evaluation as one convolution, with a bias, and the activation.

    Both are left as they are. For deployment: what comes out is of torch's own modules and has no statistics.

    Raises:
        ValueError: the convolution is of another kind or its channels do not fit.
    """
    _check_fits(convolution, abn.num_features)
    scale = (abn.running_var.double() + abn.eps).rsqrt()
    if abn.weight is not None:
        scale = scale * (abn.weight.double().abs() + abn.eps)
    offset = -abn.running_mean.double()
    if convolution.bias is not None:
        offset = offset + convolution.bias.double()
    offset = offset * scale
    if abn.bias is not None:
        offset = offset + abn.bias.double()
    folded = copy.deepcopy(convolution)
    weight = convolution.weight.double() * scale.view(-1, *[1] * (convolution.weight.dim() - 1))
    folded.weight.copy_(weight)
    folded.bias = nn.Parameter(offset.to(folded.weight.dtype))
    return nn.Sequential(folded, _activation_module(abn))


class FoldedNorm(nn.Module):
    """What a convolution leaves of the activated batch norm that it has taken in: activation(x + residual), over x."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation
        if not isinstance(activation, nn.Identity):
            activation.inplace = True  # type: ignore[assignment]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.activation(x if residual is None else x.add_(residual))


@torch.no_grad()
def fold_norms(module: nn.Module) -> nn.Module:
    """A copy of the network in evaluation, where convolutions have taken in the activated batch norms behind them.

    A norm is taken to be behind a convolution if it comes directly after it among its module's children: the network
    must call them in that order, and nothing else may use the convolution's output. Other norms stay.
    """
    module = copy.copy(module)
    module._parameters, module._buffers = copy.deepcopy((module._parameters, module._buffers))
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        before = next(reversed(children), None)
        convolution = children[before] if before is not None else None
        if before is not None and isinstance(convolution, _Convolution) and isinstance(child, ABN):
            children[before], activation = fold(convolution, child)
            children[name] = FoldedNorm(activation)
        else:
            children[name] = child and fold_norms(child)
    module._modules = children
    return module.eval()
