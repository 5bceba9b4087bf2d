"""Activated batch norm: plain, in place, in place over all processes, and its conversion."""

from cc_attention import native

from .abn import ABN, ABNSync, InPlaceABN, InPlaceABNSync
from .conversion import absorb_negative_weights, fold, fold_norms, from_batchnorm, to_batchnorm
from .functional import activated_batch_norm
from .statistics import freeze_statistics, update_statistics

if native.LOADED:
    from . import operators  # noqa: F401  registers their output shapes

__all__ = [
    "ABN",
    "ABNSync",
    "InPlaceABN",
    "InPlaceABNSync",
    "absorb_negative_weights",
    "activated_batch_norm",
    "fold",
    "fold_norms",
    "freeze_statistics",
    "from_batchnorm",
    "to_batchnorm",
    "update_statistics",
]
