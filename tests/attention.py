"""Shared by the tests of native attention: inputs, and comparison with the reference."""

from contextlib import contextmanager, nullcontext

import torch
from layouts import laid_out

from cc_attention import ca_map, ca_weight, criss_cross_attention, reference

# Largest error, relative to the largest number, of results and gradients
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
DTYPES = list(TOLERANCE)


@contextmanager
def tf32(how):
    """A context in which TF32 is allowed in matrix products, by that interface of PyTorch's."""
    matmul = torch.backends.cuda.matmul
    if how in ("high", "medium"):
        torch.set_float32_matmul_precision(how)
    else:
        setattr(matmul, how, "tf32" if how == "fp32_precision" else True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"  # the default


def rounded_to_tf32(x):
    """To nearest, ties away from 0."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def random_inputs(n, c, cv, *pixels, scale=1.0, residual=False):
    inputs = {
        "query": scale * torch.randn(n, c, *pixels, dtype=torch.float64),
        "key": scale * torch.randn(n, c, *pixels, dtype=torch.float64),
        "value": torch.randn(n, cv, *pixels, dtype=torch.float64),
    }
    if residual:
        inputs["residual"] = torch.randn(n, cv, *pixels, dtype=torch.float64)
        inputs["gamma"] = torch.tensor([0.7], dtype=torch.float64)
    return inputs


def run(function, inputs, upstream):
    """The result and all gradients, by name."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**inputs)
    gradients = torch.autograd.grad(out, list(inputs.values()), upstream.to(out.dtype))
    return {"out": out.detach(), **{f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}}


def assert_close(actual, expected, tolerance):
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape, name
        if wanted.numel():
            largest = wanted.abs().max()
            # Gradients of energies are differences of numbers of about 1, and are 0 for a path of one pixel.
            error = (actual[name].double() - wanted).abs().max() / (largest if largest > 1e-3 else 1)
            assert error <= tolerance, f"{name}: error {error:.1e} of the largest number, expected {tolerance:.0e}"


def assert_as_reference(function, expected_function, inputs, dtype, ways=(nullcontext,)):
    """Compare the function, with inputs rounded to dtype, with the expected one in float64, in each way to run it."""
    rounded = {name: x.to(dtype) for name, x in inputs.items()}
    exact = {name: x.double() for name, x in rounded.items()}
    upstream = torch.randn_like(expected_function(**exact)).to(dtype)
    expected = run(expected_function, exact, upstream.double())
    for way in ways:
        with way():
            assert_close(run(function, rounded, upstream), expected, TOLERANCE[dtype])


def assert_attention_as_reference(inputs, dtype, ways=(nullcontext,)):
    assert_as_reference(criss_cross_attention, reference.criss_cross_attention, inputs, dtype, ways)


def assert_explicit_form_as_reference(inputs, dtype, layout="contiguous", ways=(nullcontext,)):
    """Compare `ca_weight`, and `ca_map` of the weights that `ca_weight` should give."""
    query_and_key = {name: inputs[name] for name in ("query", "key")}
    assert_as_reference(ca_weight, reference.ca_weight, query_and_key, dtype, ways)
    weight = laid_out(reference.ca_weight(**query_and_key).softmax(1), layout)
    assert_as_reference(ca_map, reference.ca_map, {"weight": weight, "value": inputs["value"]}, dtype, ways)


def everything(inputs, in_3d):
    """Yield (name, tensor) of all results and gradients; their random upstream gradients are always the same."""
    torch.manual_seed(0)
    query_and_key = {name: inputs[name] for name in ("query", "key")}
    n, _, h, w = inputs["query"].shape
    weight = torch.rand(n, h + w - 1, h, w, dtype=inputs["query"].dtype)
    with_residual = {**inputs, "residual": inputs["value"].flip(-1), "gamma": torch.tensor([0.7])}
    for function, some in [
        (criss_cross_attention, inputs),
        (criss_cross_attention, with_residual),
        (criss_cross_attention, in_3d),
        (ca_weight, query_and_key),
        (ca_map, {"weight": weight, "value": inputs["value"]}),
    ]:
        for name, x in run(function, some, torch.randn(function(**some).shape)).items():
            yield f"{function.__name__}: {name}", x


def assert_same_bits(results):
    first, *others = results
    for other in others:
        for (name, x), (_, y) in zip(first, other, strict=True):
            assert torch.equal(x, y), name
