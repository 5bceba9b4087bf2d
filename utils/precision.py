"""Automatic mixed precision: the network's convolutions and attention in 16 bits, everything else in float32."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def in_mixed_precision(model: nn.Module, device: torch.device, amp: str) -> Callable[[Tensor], list[Tensor]]:
    """The network, images to logits, run under autocast as --amp says.

    The logits, and so the losses computed from them, are float32. Activated batch norm accumulates its statistics in
    float64 for every input dtype.

    Args:
        amp: a key of AMP_DTYPES; with "off" the model itself is returned.
    """
    dtype = AMP_DTYPES[amp]
    if dtype is None:
        return model

    def logits(images: Tensor) -> list[Tensor]:
        with torch.autocast(device.type, dtype):
            result = model(images)
        return [part.float() for part in result]

    return logits
