"""Operations on the running statistics of all batch norms of a network, activated or torch's own."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_statistics(model: nn.Module) -> None:
    """Make every batch norm use its running statistics as constants, until the next `model.train()`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@torch.no_grad()
def update_statistics(batches: Iterable[Any], model: nn.Module) -> None:
    """Recompute the running statistics of every batch norm as means over these batches, as averaged weights need it.

    The network runs in training mode, dropout included. Afterwards every module has its former mode again.

    Args:
        batches: inputs of the model, on its device; of a tuple or list, the first element is the input.

    Raises:
        ValueError: there is no batch norm with running statistics, or no batch. Nothing is changed then.
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
