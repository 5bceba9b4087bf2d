"""What is done with the running statistics of all batch norms of a network, activated or torch's own."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_statistics(model: nn.Module) -> None:
    """Let every batch norm use its running statistics as constants, until the next `model.train()`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@torch.no_grad()
def update_statistics(batches: Iterable[Any], model: nn.Module) -> None:
    """Let the running statistics of every batch norm be the means over these batches, as averaged weights need them.

    The network runs in training mode, dropout included, and every module is put back to the mode that it had.

    Args:
        batches: what the model is called with; of a tuple or list, its first element. On the model's device.

    Raises:
        ValueError: there is no batch norm that keeps running statistics, or no batch. The statistics are as they were.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        raise ValueError("model: expected a batch norm that keeps running statistics, found none")
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("batches: expected at least one, found none")
    momenta = [norm.momentum for norm in norms]
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        for batch in chain([first], batches):
            model(batch[0] if isinstance(batch, list | tuple) else batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
