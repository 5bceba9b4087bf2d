"""Criss-cross attention: the operators and the modules."""

from . import native
from .functional import ca_map, ca_weight, criss_cross_attention
from .module import CrissCrossAttention, CrissCrossAttention3d

if native.LOADED:
    from . import operators  # noqa: F401  registers their output shapes, gradients and autocast

__version__ = "0.1.0"

__all__ = ["CrissCrossAttention", "CrissCrossAttention3d", "ca_map", "ca_weight", "criss_cross_attention"]
