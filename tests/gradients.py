"""Comparison of gradients by name."""

import torch
from torch import Tensor


def assert_same_gradients(result: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    """Assert that the gradients of both for every input are equal; a failure names the input."""
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(result, list(inputs.values()), upstream)
    wanted = torch.autograd.grad(expected, list(inputs.values()), upstream)
    for name, a, b in zip(inputs, gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")
