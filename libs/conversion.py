"""Conversion between activated batch norm and torch's batch norm, and folding into the preceding convolution."""

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .abn import ABN, InPlaceABN

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def from_batchnorm(
    norm: _BatchNorm,
    activation: str = "identity",
    slope: float = 0.01,
    kind: type[ABN] = InPlaceABN,
    convolution: _Convolution | None = None,
) -> ABN:
    """An activated batch norm that in evaluation equals `norm` followed by the activation.

    Its factor |weight| + eps is never negative. For a negative weight of `norm`, the output channel of the preceding
    convolution is negated instead, in place. A weight below eps cannot be represented, so running_var is enlarged to
    give the same output.

    Args:
        norm: batch norm with running statistics.
        activation, slope: the activation after `norm`; see `ABN`.
        kind: ABN, ABNSync, InPlaceABN or InPlaceABNSync.
        convolution: the convolution whose output only `norm` uses; needed if weights are negative.

    Raises:
        ValueError: `norm` has no running statistics, or has negative weights but no convolution that fits.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm: expected running statistics, got track_running_stats=False")
    abn = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, activation, slope)
    abn.to(device=norm.running_mean.device, dtype=norm.running_mean.dtype).train(norm.training)
    state = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    negative = int((state["weight"] < 0).sum()) if norm.affine else 0
    if negative:
        if convolution is None:
            raise ValueError(
                f"norm: {negative} weights are negative, and activated batch norm has |weight|: expected the "
                "convolution before it, to negate these channels"
            )
        _check_fits(convolution, norm.num_features)
        _absorb_signs(state, "", convolution.weight, convolution.bias)
    abn.load_state_dict(state)
    return abn


def _absorb_signs(state: dict[str, Tensor], prefix: str, weight: Tensor, bias: Tensor | None) -> None:
    """Where a weight of the norm is negative, negate it, the running mean and the convolution's channel, in place."""
    sign = torch.where(state[f"{prefix}weight"] < 0, -1, 1)
    weight.mul_(sign.view(-1, *[1] * (weight.dim() - 1)))
    for numbers in (bias, state[f"{prefix}running_mean"], state[f"{prefix}weight"]):
        if numbers is not None:
            numbers.mul_(sign)


def norms_behind_convolutions(module: nn.Module) -> dict[str, str]:
    """The names of activated batch norms that directly follow a convolution, mapped to the name of that convolution.

    The two are neighbours among the children of one module. That module must call them in this order, and nothing else
    may use the output of the convolution.
    """
    pairs = {}
    for parent, container in module.named_modules():
        names = [f"{parent}.{name}" if parent else name for name, _ in container.named_children()]
        children = [*container.children()]
        for before, name, convolution, norm in zip(names, names[1:], children, children[1:], strict=False):
            if isinstance(convolution, _Convolution) and isinstance(norm, ABN):
                pairs[name] = before
    return pairs


@torch.no_grad()
def absorb_negative_weights(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with negative weights of torch's batch norms removed, where a convolution precedes the norm.

    Activated batch norm multiplies by |weight| + eps. The weights of torch's batch norm, recognised by its
    num_batches_tracked, may be negative. For these channels the signs of the weight, the running mean and the
    convolution's channel are changed, which does not change the output.

    Args:
        module: the module that will load it; see `norms_behind_convolutions`.
        state: state dict of that module with torch's batch norms; it is not changed.

    Returns:
        A state dict for `module.load_state_dict`, which refuses negative weights that remain.
    """
    state = dict(state)
    for norm, convolution in norms_behind_convolutions(module).items():
        weight = state.get(f"{norm}.weight")
        needed = [f"{norm}.weight", f"{norm}.running_mean", f"{convolution}.weight"]
        if weight is None or f"{norm}.num_batches_tracked" not in state or not (weight < 0).any():
            continue
        changed = {name: state[name].clone() for name in [*needed, f"{convolution}.bias"] if name in state}
        if all(name in changed and changed[name].shape[0] == len(weight) for name in needed):
            _absorb_signs(changed, f"{norm}.", changed[f"{convolution}.weight"], changed.get(f"{convolution}.bias"))
            state |= changed
    return state


def _check_fits(convolution: nn.Module, channels: int) -> None:
    if not isinstance(convolution, _Convolution):
        raise ValueError(f"convolution: expected Conv1d, Conv2d or Conv3d, got {type(convolution).__name__}")
    if convolution.out_channels != channels:
        raise ValueError(f"convolution: expected {channels} output channels, got {convolution.out_channels}")


class NormActivation(nn.Module):
    """activation(norm(x) + residual); its state dict has the norm's names, without a prefix.

    The activation is a separate module, which code that replaces or folds batch norms leaves alone.
    """

    def __init__(self, norm: nn.Module, activation: nn.Module):
        super().__init__()
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return self.activation(y if residual is None else y + residual)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return self.norm.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # PyTorch then loads the children from the same dictionary.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}norm.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _activation_module(abn: ABN) -> nn.Module:
    if abn.activation == "leaky_relu":
        return nn.LeakyReLU(abn.slope)
    if abn.activation == "relu":
        return nn.ReLU()
    return nn.ELU() if abn.activation == "elu" else nn.Identity()


_BY_DIMENSIONS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@torch.no_grad()
def to_batchnorm(module: nn.Module, dimensions: int = 2) -> nn.Module:
    """A copy of a network, or of one activated batch norm, with torch's batch norms.

    Each activated batch norm becomes a `NormActivation` of torch's batch norm, with weight |weight| + eps, and the
    activation. Results are the same in training and in evaluation. The state dict has the same names and, in addition,
    num_batches_tracked. Statistics are no longer synchronised.

    Args:
        module: the network or norm; it is not changed.
        dimensions: spatial dimensions, which choose BatchNorm1d (for [N, C] too), BatchNorm2d or BatchNorm3d.
    """
    if not isinstance(module, ABN):
        module = copy.copy(module)
        module._parameters, module._buffers = copy.deepcopy((module._parameters, module._buffers))
        module._modules = {
            name: child if child is None else to_batchnorm(child, dimensions) for name, child in module._modules.items()
        }
        return module
    norm = _BY_DIMENSIONS[dimensions](module.num_features, module.eps, module.momentum, module.affine)
    norm.to(device=module.running_mean.device, dtype=module.running_mean.dtype)
    state = module.state_dict()
    if module.affine:
        state["weight"] = state["weight"].double().abs() + module.eps
    norm.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    return NormActivation(norm, _activation_module(module)).train(module.training)


@torch.no_grad()
def fold(convolution: _Convolution, abn: ABN) -> nn.Sequential:
    """A convolution and an activated batch norm in evaluation as one convolution, with bias, and the activation.

    The arguments are not changed. The result consists of torch's own modules and has no statistics.

    Raises:
        ValueError: the convolution is of another kind, or its output channels differ from the norm's.
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
    """What remains of an activated batch norm folded into a convolution: activation(x + residual), in place."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation
        if not isinstance(activation, nn.Identity):
            activation.inplace = True  # type: ignore[assignment]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.activation(x if residual is None else x.add_(residual))


@torch.no_grad()
def fold_norms(module: _Module) -> _Module:
    """A copy of the network in evaluation mode, with activated batch norms folded into the convolutions before them.

    Only the norms that `norms_behind_convolutions` finds are folded.
    """
    return _fold_norms(module, {module.get_submodule(name) for name in norms_behind_convolutions(module)}).eval()


def _fold_norms(module: _Module, foldable: set[nn.Module]) -> _Module:
    module = copy.copy(module)
    module._parameters, module._buffers = copy.deepcopy((module._parameters, module._buffers))
    children: dict[str, nn.Module | None] = {}
    before = ""
    for name, child in module._modules.items():
        if child is None:
            children[name] = None
            continue
        if isinstance(child, ABN) and child in foldable:
            children[before], activation = fold(cast(_Convolution, children[before]), child)
            children[name] = FoldedNorm(activation)
        else:
            children[name] = _fold_norms(child, foldable)
        before = name
    module._modules = children
    return module
