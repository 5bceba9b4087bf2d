"""Calls of native operators, with the errors that PyTorch's own operators raise."""

from collections.abc import Callable
from typing import Any

import torch


def call(operator: Callable[..., Any], *inputs: Any) -> Any:
    """The native operator of inputs.

    Raises:
        torch.OutOfMemoryError: a GPU's memory does not suffice. PyTorch's interface to native code hands every error on
            as a RuntimeError, which nobody who tries smaller batches would catch. (Of the CPU's memory PyTorch itself
            says so in a RuntimeError, and so it stays.)
    """
    try:
        return operator(*inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "CUDA out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
