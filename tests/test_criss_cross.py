"""Criss-cross attention against loops over pixels, in float64, with gradients by name."""

import pytest
import torch
from gradients import assert_same_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from cc_attention import CrissCrossAttention, ca_map, ca_weight, criss_cross_attention


def path_of(i, j, height, width):
    """The criss-cross path of pixel (i, j): its row, then its column without itself."""
    return [(i, v) for v in range(width)] + [(u, j) for u in range(height) if u != i]


def loop_weight(query, key):
    batch, _, height, width = query.shape
    columns = []
    for i in range(height):
        for j in range(width):
            path = path_of(i, j, height, width)
            energy = torch.stack([(query[:, :, i, j] * key[:, :, u, v]).sum(1) for u, v in path], dim=1)
            columns.append(energy.softmax(1))
    return torch.stack(columns, dim=2).reshape(batch, height + width - 1, height, width)


def loop_map(weight, value):
    batch, channels, height, width = value.shape
    columns = []
    for i in range(height):
        for j in range(width):
            path = path_of(i, j, height, width)
            columns.append(sum(weight[:, k, i, j, None] * value[:, :, u, v] for k, (u, v) in enumerate(path)))
    return torch.stack(columns, dim=2).reshape(batch, channels, height, width)


def loop_attention(query, key, value):
    return loop_map(loop_weight(query, key), value)


def random_inputs(shapes):
    return {name: torch.randn(shape, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}


def assert_same(function, definition, inputs):
    """Results and every gradient agree."""
    result, expected = function(**inputs), definition(**inputs)
    torch.testing.assert_close(result, expected)
    assert_same_gradients(result, expected, inputs)


SHAPES = [(2, 3, 5, 4, 6), (1, 2, 2, 1, 5), (2, 1, 3, 5, 1), (1, 4, 4, 1, 1), (1, 8, 2, 6, 3)]


@pytest.mark.parametrize(("n", "c", "cv", "h", "w"), SHAPES)
def test_attention_matches_its_definition(n, c, cv, h, w):
    inputs = random_inputs({"query": (n, c, h, w), "key": (n, c, h, w), "value": (n, cv, h, w)})
    assert_same(criss_cross_attention, loop_attention, inputs)


@pytest.mark.parametrize(("n", "c", "cv", "h", "w"), SHAPES)
def test_explicit_form_matches_its_definition(n, c, cv, h, w):
    assert_same(ca_weight, loop_weight, random_inputs({"query": (n, c, h, w), "key": (n, c, h, w)}))
    assert_same(ca_map, loop_map, random_inputs({"weight": (n, h + w - 1, h, w), "value": (n, cv, h, w)}))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_any_shape(n, c, cv, h, w):
    inputs = random_inputs({"query": (n, c, h, w), "key": (n, c, h, w), "value": (n, cv, h, w)})
    assert_same(criss_cross_attention, loop_attention, inputs)


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


def test_weights_sum_to_one_and_huge_energies_stay_finite():
    query, key = 100 * torch.randn(2, 3, 4, 5), 100 * torch.randn(2, 3, 4, 5)
    weight = ca_weight(query, key)
    assert torch.isfinite(weight).all()
    torch.testing.assert_close(weight.sum(1), torch.ones(2, 4, 5))


def test_module_with_nonzero_gamma():
    module = CrissCrossAttention(16).double()
    module.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64, requires_grad=True)

    def by_definition():
        attended = loop_attention(module.query_conv(x), module.key_conv(x), module.value_conv(x))
        return 0.7 * attended + x

    result, expected = module(x), by_definition()
    torch.testing.assert_close(result, expected)
    inputs = {"x": x, **{name: p for name, p in module.named_parameters() if name != "gamma"}}
    assert_same_gradients(result, expected, inputs)
    upstream = torch.randn_like(expected)
    (gamma_gradient,) = torch.autograd.grad(module(x), module.gamma, upstream)
    torch.testing.assert_close(gamma_gradient, (upstream * (expected - x) / 0.7).sum().reshape(1))


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
    with pytest.raises(ValueError, match=r"query: expected a floating-point tensor, got torch.int64"):
        criss_cross_attention(x.long(), x.long(), x.long())
    with pytest.raises(ValueError, match=r"key: expected on cpu as query is, got .* on meta"):
        ca_weight(x, x.to("meta"))
    with pytest.raises(ValueError, match="in_dim: expected at least 8"):
        CrissCrossAttention(4)
