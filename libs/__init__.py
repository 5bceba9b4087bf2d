"""Activated batch norm: plain, in place, and in place over all processes."""

from .abn import ABN, InPlaceABN, InPlaceABNSync

__all__ = ["ABN", "InPlaceABN", "InPlaceABNSync"]
