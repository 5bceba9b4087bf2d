"""The criss-cross attention operators: they check their inputs and call native code or the reference.

Native code runs on the CPU and on CUDA GPUs. Memory formats are kept as by PyTorch's own modules: a result has that of
the query (`ca_weight`) or of the value, and a gradient that of its input. channels_last is faster than NCHW. Dtypes are
float32, float64, bfloat16 and float16; under autocast all but float64 are converted to autocast's dtype.

On GPUs from sm_80 on, native code makes products of float32 of TF32 where PyTorch may: where
torch.backends.cuda.matmul.fp32_precision is "tf32", as matmul.allow_tf32 and torch.set_float32_matmul_precision set it
too. It is read when an operator is called. The backward pass goes by what it was then, unlike PyTorch's own, and an
exported program by what it was at the export; compiled code follows it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import native, reference
from .calling import call

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _is_autocast_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def in_autocast_dtype(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Call the function with inputs cast to autocast's dtype, all but float64 ones, and with autocast off."""
    device_type = inputs[0].device.type
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        return function(*(x if x.dtype == torch.float64 else x.to(dtype) for x in inputs))


def _allows_tf32() -> bool:
    """Whether matrix products of float32 may be made of TF32, which native code has to be told.

    Unlike matmul.allow_tf32 it can be read whichever of PyTorch's interfaces it was set by.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# The compiler cannot look into the attribute, but compiles anew if the setting has changed.
_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _by_reference(function: Callable[..., Tensor], *inputs: Tensor, like: Tensor) -> Tensor:
    """Call the reference like a native operator: under autocast with its dtype, and in the memory format of `like`."""
    result = in_autocast_dtype(function, *inputs) if _is_autocast_on(like.device) else function(*inputs)
    return result.contiguous(memory_format=suggest_memory_format(like))


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")


def _check(*arguments: tuple[str, Tensor, str]) -> None:
    """Raise ValueError unless the arguments, (name, tensor, dimensions), are floating-point and fit together.

    Dimensions are names, as in "N C H W". The same name means the same size, and H+W-1 is computed from H and W. All
    tensors must have the dtype and device of the first one. Under torch.jit.trace, whose sizes are tensors, nothing is
    checked here; native code checks as well.
    """
    if torch.jit.is_tracing():
        return
    sizes: dict[str, int] = {}
    first_name, first, _ = arguments[0]
    for name, tensor, dimensions in arguments:
        expected = [sizes.get(dimension, dimension) for dimension in dimensions.split()]
        if tensor.dim() != len(expected) or any(
            not isinstance(size, str) and size != actual for size, actual in zip(expected, tensor.shape, strict=True)
        ):
            raise ValueError(f"{name}: expected shape [{', '.join(map(str, expected))}], got {list(tensor.shape)}")
        check_dtype(name, tensor)
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected on {first.device} as {first_name} is, got {_describe(tensor)}")
        if tensor.dtype != first.dtype and (
            # Autocast will convert all dtypes but float64 to one.
            torch.float64 in (tensor.dtype, first.dtype) or not _is_autocast_on(tensor.device)
        ):
            raise ValueError(f"{name}: expected {first.dtype} as {first_name} is, got {_describe(tensor)}")
        if any(size < 1 for size in tensor.shape[2:]):
            raise ValueError(f"{name}: expected at least one row and one column, got {list(tensor.shape)}")
        sizes.update(zip(dimensions.split(), tensor.shape, strict=True))
        if "D" not in sizes:
            sizes["H+W-1"] = sizes["H"] + sizes["W"] - 1


def ca_weight(query: Tensor, key: Tensor) -> Tensor:
    """Energies over the criss-cross path (paper, eq. 1): `softmax(ca_weight(query, key), dim=1)` are the weights.

    Args:
        query, key: [N, C', H, W], the same floating-point dtype and device.

    Returns:
        [N, H+W-1, H, W], the products query_u . key_v, unscaled and without softmax: entries 0..W-1 are for the pixels
        of the row of u, including u; entries W..H+W-2 for those of its column from the top, without u.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the tensor.
    """
    _check(("query", query, "N C' H W"), ("key", key, "N C' H W"))
    if native.runs_on(query.device):
        return call(torch.ops.ccnet.ca_weight, query, key, allow_tf32=_allows_tf32())
    return _by_reference(reference.ca_weight, query, key, like=query)


def ca_map(weight: Tensor, value: Tensor) -> Tensor:
    """Weighted sum of the values on the criss-cross path (paper, eq. 2).

    Args:
        weight: [N, H+W-1, H, W] in the order of `ca_weight`.
        value: [N, C, H, W], the same floating-point dtype and device.

    Returns:
        [N, C, H, W].

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the tensor.
    """
    _check(("value", value, "N C H W"), ("weight", weight, "N H+W-1 H W"))
    if native.runs_on(value.device):
        return call(torch.ops.ccnet.ca_map, weight, value, allow_tf32=_allows_tf32())
    return _by_reference(reference.ca_map, weight, value, like=value)


def criss_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor | None = None, gamma: Tensor | None = None
) -> Tensor:
    """Criss-cross attention: each pixel attends to the H+W-1 pixels of its row and column.

    Equal to `ca_map(softmax(ca_weight(query, key), dim=1), value)`; energies are not scaled. In three dimensions each
    position attends to the D+H+W-2 positions that differ from it in at most one coordinate. Native code stores neither
    the weights nor, for the backward pass, the result (docs/criss_cross.md).

    Args:
        query, key: [N, C', H, W] or [N, C', D, H, W].
        value: [N, C, H, W] or [N, C, D, H, W]; C may differ from C'. All have the same floating-point dtype and device.
        residual, gamma: of value's shape and dtype, and [1]; both or neither. The result is residual + gamma *
            attention, as in the module of the paper (figure 3), in one pass. gamma may have another dtype.

    Returns:
        A tensor with the shape of value.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the tensor.
        NotImplementedError: second or forward-mode derivatives are requested of native code.
    """
    pixels = "D H W" if query.dim() == 5 else "H W"
    arguments = [("query", query, f"N C' {pixels}"), ("key", key, f"N C' {pixels}"), ("value", value, f"N C {pixels}")]
    if residual is None or gamma is None:
        if residual is not None or gamma is not None:
            raise ValueError("residual and gamma: expected both or neither")
        _check(*arguments)
        inputs: tuple[Tensor, ...] = (query, key, value)
    else:
        _check(*arguments, ("residual", residual, f"N C {pixels}"))
        if not torch.jit.is_tracing() and (gamma.numel() != 1 or gamma.device != query.device):
            raise ValueError(f"gamma: expected one number on {query.device}, got {_describe(gamma)}")
        precise = torch.float64 if query.dtype == torch.float64 else torch.float32
        inputs = (query, key, value, residual, gamma.reshape(1).to(precise))
    if native.runs_on(query.device):
        return call(torch.ops.ccnet.criss_cross_attention, *inputs, allow_tf32=_allows_tf32())[0]
    return _by_reference(reference.criss_cross_attention, *inputs, like=value)
