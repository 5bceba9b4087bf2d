"""Criss-cross attention against loops over pixels, in float64, with gradients by name."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradients import assert_same_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

import cc_attention
from cc_attention import (
    CrissCrossAttention,
    CrissCrossAttention3d,
    ca_map,
    ca_weight,
    criss_cross_attention,
    native,
    reference,
)


def path_of(pixel, size):
    """The criss-cross path: the pixel's row, then its column without itself, then its depth without itself."""
    path = []
    for axis in reversed(range(len(size))):
        for position in range(size[axis]):
            if position != pixel[axis] or axis == len(size) - 1:
                path.append((*pixel[:axis], position, *pixel[axis + 1 :]))
    return path


def at(x, pixel):
    """[N, C] of x [N, C, ...]."""
    return x[(slice(None), slice(None), *pixel)]


def each_pixel(x):
    return itertools.product(*(range(size) for size in x.shape[2:]))


def loop_weight(query, key):
    columns = []
    for pixel in each_pixel(query):
        energy = torch.stack(
            [(at(query, pixel) * at(key, other)).sum(1) for other in path_of(pixel, query.shape[2:])], 1
        )
        columns.append(energy)
    return torch.stack(columns, dim=2).unflatten(2, query.shape[2:])


def loop_map(weight, value):
    columns = []
    for pixel in each_pixel(value):
        weights = at(weight, pixel)
        path = path_of(pixel, value.shape[2:])
        columns.append(sum(weights[:, k, None] * at(value, other) for k, other in enumerate(path)))
    return torch.stack(columns, dim=2).unflatten(2, value.shape[2:])


def loop_attention(query, key, value):
    return loop_map(loop_weight(query, key).softmax(1), value)


def random_inputs(shapes):
    return {name: torch.randn(shape, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}


def assert_same(function, definition, inputs):
    """Results and every gradient agree."""
    result, expected = function(**inputs), definition(**inputs)
    torch.testing.assert_close(result, expected)
    assert_same_gradients(result, expected, inputs)


SHAPES = [(2, 3, 5, 4, 6), (1, 2, 2, 1, 5), (2, 1, 3, 5, 1), (1, 4, 4, 1, 1), (1, 8, 2, 6, 3)]
SHAPES_3D = [(2, 3, 4, 3, 4, 5), (1, 2, 3, 1, 4, 3), (1, 3, 2, 4, 1, 3), (1, 3, 2, 3, 4, 1), (1, 2, 2, 5, 1, 1)]


def attention_inputs(n, c, cv, *pixels):
    return random_inputs({"query": (n, c, *pixels), "key": (n, c, *pixels), "value": (n, cv, *pixels)})


@pytest.mark.parametrize("function", [criss_cross_attention, reference.criss_cross_attention])
@pytest.mark.parametrize("shape", SHAPES + SHAPES_3D, ids=str)
def test_attention_matches_its_definition(function, shape):
    assert_same(function, loop_attention, attention_inputs(*shape))


@pytest.mark.parametrize("implementation", [cc_attention, reference])
@pytest.mark.parametrize(("n", "c", "cv", "h", "w"), SHAPES)
def test_explicit_form_matches_its_definition(implementation, n, c, cv, h, w):
    inputs = attention_inputs(n, c, cv, h, w)
    value = inputs.pop("value")
    assert_same(implementation.ca_weight, loop_weight, inputs)
    weight = torch.randn(n, h + w - 1, h, w, dtype=torch.float64, requires_grad=True)
    assert_same(implementation.ca_map, loop_map, {"weight": weight, "value": value})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2), st.integers(1, 5), st.integers(1, 5), st.lists(st.integers(1, 5), min_size=2, max_size=3))
def test_any_shape(n, c, cv, pixels):
    assert_same(criss_cross_attention, loop_attention, attention_inputs(n, c, cv, *pixels))


def test_non_contiguous_and_channels_last():
    whole = torch.randn(2, 4, 5, 12, dtype=torch.float64)
    key = torch.randn(2, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    query, value = whole[..., ::2], whole.transpose(2, 3)[:, :, 1:7].transpose(2, 3)
    torch.testing.assert_close(criss_cross_attention(query, key, value), loop_attention(query, key, value))


def test_order_of_the_weights():
    """Entries 0..W-1 are the row; the rest the column from the top, the pixel itself left out."""
    query, key = torch.zeros(1, 1, 4, 5), torch.zeros(1, 1, 4, 5)
    query[0, 0, 2, 3] = 1
    key[0, 0, 2, 1] = 100  # in the row: entry 1
    assert ca_weight(query, key)[0, :, 2, 3].argmax() == 1
    key[0, 0, 3, 3] = 200  # in the column, below: the third of rows 0, 1, 3
    assert ca_weight(query, key)[0, :, 2, 3].argmax() == 5 + 2
    key[0, 0, 0, 0] = 300  # on no path
    assert ca_weight(query, key)[0, :, 2, 3].argmax() == 5 + 2


@pytest.mark.parametrize("implementation", [cc_attention, reference])
def test_the_fused_form_is_the_explicit_one_with_softmax_between(implementation):
    query, key, value = 3 * torch.randn(3, 2, 3, 4, 5, dtype=torch.float64)
    weight = implementation.ca_weight(query, key).softmax(1)
    fused = implementation.criss_cross_attention(query, key, value)
    torch.testing.assert_close(implementation.ca_map(weight, value), fused)


@pytest.mark.parametrize(("kind", "pixels"), [(CrissCrossAttention, (3, 5)), (CrissCrossAttention3d, (2, 3, 4))])
def test_module_with_nonzero_gamma(kind, pixels):
    module = kind(16).double()
    module.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, *pixels, dtype=torch.float64, requires_grad=True)

    def by_definition():
        attended = loop_attention(module.query_conv(x), module.key_conv(x), module.value_conv(x))
        return module.gamma * attended + x

    result, expected = module(x), by_definition()
    torch.testing.assert_close(result, expected)
    assert_same_gradients(result, expected, {"x": x, **dict(module.named_parameters())})


def test_new_module_is_the_identity_and_has_the_originals_names():
    module = CrissCrossAttention(64)
    x = torch.randn(1, 64, 4, 4)
    assert torch.equal(module(x), x)
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "gamma": [1],
        "query_conv.weight": [8, 64, 1, 1],
        "query_conv.bias": [8],
        "key_conv.weight": [8, 64, 1, 1],
        "key_conv.bias": [8],
        "value_conv.weight": [64, 64, 1, 1],
        "value_conv.bias": [64],
    }


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (
            criss_cross_attention,
            [(1, 2, 3), (1, 2, 3), (1, 2, 3)],
            r"query: expected shape \[N, C', H, W\], got \[1, 2, 3\]",
        ),
        (criss_cross_attention, [(1, 2, 3, 4), (1, 3, 3, 4), (1, 2, 3, 4)], r"key: expected shape \[1, 2, 3, 4\], got"),
        (
            criss_cross_attention,
            [(1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 4, 3)],
            r"value: expected shape \[1, C, 3, 4\], got",
        ),
        (criss_cross_attention, [(1, 2, 0, 4), (1, 2, 0, 4), (1, 2, 0, 4)], r"query: expected at least one row"),
        (
            criss_cross_attention,
            [(1, 2, 5, 3, 4), (1, 2, 5, 3, 4), (1, 2, 4, 3, 4)],
            r"value: expected shape \[1, C, 5, 3, 4\], got",
        ),
        (ca_weight, [(1, 2, 2, 3, 4), (1, 2, 2, 3, 4)], r"query: expected shape \[N, C', H, W\], got"),
        (ca_weight, [(1, 2, 3, 4), (2, 2, 3, 4)], r"key: expected shape \[1, 2, 3, 4\], got \[2, 2, 3, 4\]"),
        (ca_map, [(1, 7, 3, 4), (1, 2, 3, 4)], r"weight: expected shape \[1, 6, 3, 4\], got \[1, 7, 3, 4\]"),
    ],
)
def test_wrong_shapes_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*(torch.zeros(shape) for shape in arguments))


def test_wrong_dtypes_and_devices_are_named():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"value: expected torch.float32 as query is, got .*float64"):
        criss_cross_attention(x, x, x.double())
    with pytest.raises(ValueError, match=r"query: expected float32, float64, bfloat16 or float16, got torch.int64"):
        criss_cross_attention(x.long(), x.long(), x.long())
    with pytest.raises(ValueError, match=r"key: expected on cpu as query is, got .* on meta"):
        ca_weight(x, x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"value: expected torch.float32 as"):
        criss_cross_attention(x, x, x.double())
    for module, shape in ((CrissCrossAttention(8), (1, 8, 3, 4)), (CrissCrossAttention3d(8), (1, 8, 2, 3, 4))):
        for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64):
            with pytest.raises(ValueError, match=rf"x: expected float32, .* or float16, got {dtype}"):
                module(torch.zeros(shape, dtype=dtype))
    for function in (lambda y: criss_cross_attention(y, y, y), lambda y: ca_weight(y, y)):
        with pytest.raises(ValueError, match=r"query: expected float32, .* got torch.uint8"):
            function(x.byte())
    with pytest.raises(ValueError, match=r"value: expected float32, .* got torch.uint8"):
        ca_map(torch.zeros(1, 6, 3, 4).byte(), x.byte())
    with pytest.raises(ValueError, match="in_dim: expected at least 8"):
        CrissCrossAttention(4)
    with pytest.raises(ValueError, match=r"x: expected shape \[N, in_dim, D, H, W\], got \[1, 8, 3, 4\]"):
        CrissCrossAttention3d(8)(torch.zeros(1, 8, 3, 4))


def test_a_project_with_a_folder_libs_of_its_own(tmp_path):
    """As CCNet's forks have: cc_attention does not need that name."""
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "__init__.py").write_text("raise SystemExit('the wrong libs')")
    path = [str(tmp_path), str(Path(cc_attention.__file__).parents[1])]
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = {path}; import cc_attention; assert 'libs' not in sys.modules",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr


def test_reference_has_the_memory_format_of_its_inputs(monkeypatch):
    """Where there is no native code."""
    monkeypatch.setattr(native, "runs_on", lambda device: False)
    x = torch.randn(2, 16, 3, 5)
    assert CrissCrossAttention(16)(x).is_contiguous()
    last = CrissCrossAttention(16)(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_reference_has_the_native_dtypes_under_autocast(monkeypatch):
    """Where there is no native code."""
    monkeypatch.setattr(native, "runs_on", lambda device: False)
    inputs = [torch.randn(1, 4, 3, 5) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = ca_weight(*inputs[:2])
        assert weight.dtype == ca_map(weight.float(), inputs[2]).dtype == torch.bfloat16
        assert criss_cross_attention(*inputs).dtype == torch.bfloat16
        assert criss_cross_attention(*(x.double() for x in inputs)).dtype == torch.float64


def test_importing_does_not_import_the_compiler():
    """It takes as long as PyTorch itself; what is marked for it has the mark of PyTorch's decorator."""
    code = "import sys, cc_attention, libs; assert 'torch._dynamo' not in sys.modules, 'torch._dynamo'"
    subprocess.run([sys.executable, "-c", code], check=True)
    decorated = torch.compiler.assume_constant_result(lambda: None)
    assert vars(native._gpu_has_code) == vars(decorated) != {}
