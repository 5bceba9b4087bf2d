"""What tests of the native attention share: where the operators run, inputs, and comparison with the reference."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import emulation
import pytest
import torch

import cc_attention
from cc_attention import reference
from libs import native

NAMES = ("criss_cross_attention", "ca_weight", "ca_map")
CAPABILITIES = ["baseline", "avx2", "avx512", "avx512_bf16"]
# Where the operators run: on the CPU with each instruction set, on the GPU, and the GPU's kernels in the emulator.
TARGETS = [*CAPABILITIES, pytest.param("emulated", marks=pytest.mark.emulated), "cuda"]

# Largest error over the largest number, of results and of gradients
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
DTYPES = list(TOLERANCE)


@contextmanager
def capability(name: str) -> Iterator[None]:
    before = os.environ.get("CCNET_CPU_CAPABILITY")
    os.environ["CCNET_CPU_CAPABILITY"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["CCNET_CPU_CAPABILITY"]
        else:
            os.environ["CCNET_CPU_CAPABILITY"] = before


def is_supported(name: str) -> bool:
    with capability(name):
        try:
            return native.cpu_capability() == name
        except RuntimeError:
            return False


def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def _on_gpu(function):
    def run_function(*inputs, **named):
        return function(*(x.cuda() for x in inputs), **{name: x.cuda() for name, x in named.items()}).cpu()

    return run_function


@contextmanager
def operators(target: str) -> Iterator[SimpleNamespace]:
    """The operators by name, as functions of tensors on the CPU that run on the target."""
    functions = {name: getattr(cc_attention, name) for name in NAMES}
    if target == "emulated":
        with emulation.emulated_gpu():
            yield emulation.kernels
    elif target == "cuda":
        needs_gpu()
        assert native.runs_on(torch.device("cuda")), "there is a GPU, and libs/_C_cuda is not loaded"
        yield SimpleNamespace(**{name: _on_gpu(function) for name, function in functions.items()})
    else:
        if not is_supported(target):
            pytest.skip(f"this CPU has no {target}")
        with capability(target):
            yield SimpleNamespace(**functions)


def random_inputs(n, c, cv, *pixels, scale=1.0):
    return {
        "query": scale * torch.randn(n, c, *pixels, dtype=torch.float64),
        "key": scale * torch.randn(n, c, *pixels, dtype=torch.float64),
        "value": torch.randn(n, cv, *pixels, dtype=torch.float64),
    }


def laid_out(x, layout):
    """x with other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "sliced":
        return torch.stack([x, x.flip(1)], dim=-1)[..., 0]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def run(function, inputs, upstream):
    """The result and every gradient by name."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**inputs)
    gradients = torch.autograd.grad(out, list(inputs.values()), upstream.to(out.dtype))
    return {"out": out.detach(), **{f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}}


def assert_close(actual, expected, tolerance):
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape, name
        if wanted.numel():
            largest = wanted.abs().max()
            # Gradients of energies are differences of numbers about 1, and vanish on a path of one pixel.
            error = (actual[name].double() - wanted).abs().max() / (largest if largest > 1e-3 else 1)
            assert error <= tolerance, f"{name}: error {error:.1e} of the largest number, expected {tolerance:.0e}"


def assert_as_reference(function, expected_function, inputs, dtype):
    """The function of inputs rounded to dtype is that of the same numbers in float64."""
    rounded = {name: x.to(dtype) for name, x in inputs.items()}
    exact = {name: x.double() for name, x in rounded.items()}
    upstream = torch.randn_like(expected_function(**exact)).to(dtype)
    expected = run(expected_function, exact, upstream.double())
    assert_close(run(function, rounded, upstream), expected, TOLERANCE[dtype])


def assert_attention_as_reference(ops, inputs, dtype):
    assert_as_reference(ops.criss_cross_attention, reference.criss_cross_attention, inputs, dtype)


def assert_explicit_form_as_reference(ops, inputs, dtype, layout="contiguous"):
    """Both halves, the second with the weights that the first should give."""
    query_and_key = {name: inputs[name] for name in ("query", "key")}
    assert_as_reference(ops.ca_weight, reference.ca_weight, query_and_key, dtype)
    weight = laid_out(reference.ca_weight(**query_and_key), layout)
    assert_as_reference(ops.ca_map, reference.ca_map, {"weight": weight, "value": inputs["value"]}, dtype)


def everything(ops, inputs, in_3d):
    """(name, tensor) of all results and gradients; what else they depend on is always the same."""
    torch.manual_seed(0)
    query_and_key = {name: inputs[name] for name in ("query", "key")}
    n, _, h, w = inputs["query"].shape
    weight = torch.rand(n, h + w - 1, h, w, dtype=inputs["query"].dtype)
    for operator, some in [
        ("criss_cross_attention", inputs),
        ("criss_cross_attention", in_3d),
        ("ca_weight", query_and_key),
        ("ca_map", {"weight": weight, "value": inputs["value"]}),
    ]:
        function = getattr(ops, operator)
        for name, x in run(function, some, torch.randn(function(**some).shape)).items():
            yield f"{operator}: {name}", x


def assert_same_bits(results):
    first, *others = results
    for other in others:
        for (name, x), (_, y) in zip(first, other, strict=True):
            assert torch.equal(x, y), name
