"""Criss-cross attention: the operators and the module."""

from .functional import ca_map, ca_weight, criss_cross_attention
from .module import CrissCrossAttention

__all__ = ["CrissCrossAttention", "ca_map", "ca_weight", "criss_cross_attention"]
