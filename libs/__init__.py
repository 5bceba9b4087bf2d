"""Activated batch norm: plain, in place, and in place over all processes."""

from . import native
from .abn import ABN, InPlaceABN, InPlaceABNSync
from .functional import activated_batch_norm

if native.LOADED:
    from . import operators  # noqa: F401  tells PyTorch of the operators' shapes

__all__ = ["ABN", "InPlaceABN", "InPlaceABNSync", "activated_batch_norm"]
