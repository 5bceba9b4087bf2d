"""Calls of native operators that raise the same errors as PyTorch's own operators."""

from collections.abc import Callable
from typing import Any

import torch


def call(operator: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Call a native operator.

    Raises:
        torch.OutOfMemoryError: a GPU is out of memory. PyTorch's interface to native code turns every error into a
            RuntimeError, which code that catches this error to try smaller batches would miss. (If the CPU is out of
            memory, PyTorch itself raises a RuntimeError.)
    """
    try:
        return operator(*inputs, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "CUDA out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
