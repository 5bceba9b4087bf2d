"""3x3 convolutions by Winograd's minimal filtering, against PyTorch's."""

import pytest
import torch
from gradients import assert_same_gradients
from torch import nn
from torch.nn import functional as F

from libs import InPlaceABN
from networks import build_model, winograd
from networks.winograd import Conv3x3


@pytest.fixture
def always(monkeypatch):
    """Every convolution of stride 1 is computed this way, in float64 too."""
    monkeypatch.setattr(Conv3x3, "_is_faster_by_winograd", lambda self, x: self.stride == (1, 1))


def inputs_of(size, out_channels=5, dtype=torch.float64, layout=torch.channels_last):
    x = torch.randn(size, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(out_channels, size[1], 3, 3, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    return {"x": x, "weight": weight, "bias": torch.randn(out_channels, dtype=dtype, requires_grad=True)}


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("size", [(2, 3, 25, 18), (1, 4, 16, 32), (3, 2, 1, 5), (2, 1, 7, 3)])
@pytest.mark.parametrize("tiles", [1, 640])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "NCHW"])
def test_result_and_gradients(dilation, size, tiles, layout, monkeypatch):
    """In one piece and in bands."""
    monkeypatch.setattr(winograd, "_TILES_AT_A_TIME", tiles)
    inputs = inputs_of(size, layout=layout)
    expected = F.conv2d(*inputs.values(), padding=dilation, dilation=dilation)
    result = winograd._Winograd.apply(*inputs.values(), dilation)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected)
    assert_same_gradients(result, expected, inputs)


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_each_gradient_alone(needed):
    inputs = inputs_of((2, 3, 9, 10))
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == needed)
    expected = F.conv2d(*inputs.values(), padding=2, dilation=2)
    assert_same_gradients(winograd._Winograd.apply(*inputs.values(), 2), expected, {needed: inputs[needed]})


@pytest.mark.parametrize("dilation", [1, 4])
def test_float32_is_nearly_as_exact_as_direct_summation(dilation):
    exact = inputs_of((1, 256, 33, 33), 128)
    rounded = {name: tensor.detach().float().requires_grad_() for name, tensor in exact.items()}
    upstream = torch.randn(1, 128, 33, 33, dtype=torch.float64)

    def results(inputs, by_winograd):
        convolution = winograd._Winograd.apply if by_winograd else F.conv2d
        rest = (dilation,) if by_winograd else (1, dilation, dilation)
        out = convolution(*inputs.values(), *rest)
        return [out, *torch.autograd.grad(out, list(inputs.values()), upstream.to(out.dtype))]

    wanted = results({name: tensor.detach().double().requires_grad_() for name, tensor in rounded.items()}, False)
    for what, result, direct, expected in zip(
        ("result", *exact), results(rounded, True), results(rounded, False), wanted, strict=True
    ):
        error, of_direct = ((y - expected).norm() / expected.norm() for y in (result, direct))
        assert error < 16 * of_direct + 1e-7, f"{what}: {error:.1e}, of direct summation {of_direct:.1e}"
        assert error < 5e-6, what


def test_where_it_is_used():
    large, small = Conv3x3(512, 512), Conv3x3(64, 64)
    x = torch.empty(2, 512, 49, 49)
    assert large._is_faster_by_winograd(x)
    assert not small._is_faster_by_winograd(torch.empty(2, 64, 49, 49))
    assert not large._is_faster_by_winograd(x.double())
    assert not large._is_faster_by_winograd(x.to("meta"))
    assert not large._is_faster_by_winograd(x[:0])
    assert not Conv3x3(512, 512, stride=2)._is_faster_by_winograd(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not large._is_faster_by_winograd(x)
        assert large(x[:, :, :3, :3]).dtype == torch.bfloat16


def test_what_follows_may_write_over_it(always):
    network = nn.Sequential(Conv3x3(4, 6, dilation=2), InPlaceABN(6)).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(x, network[0].weight, None, 1, 2, 2)
    expected = F.leaky_relu(F.batch_norm(plain, None, None, network[1].weight + 1e-5, training=True), 0.01)
    result = network(x)
    torch.testing.assert_close(result, expected)
    assert_same_gradients(result, expected, {"x": x, "weight": network[0].weight})


def test_a_whole_network(monkeypatch):
    model = build_model("resnet18").double().eval()
    images = torch.randn(1, 3, 97, 65, dtype=torch.float64)
    expected = model(images)
    monkeypatch.setattr(Conv3x3, "_is_faster_by_winograd", lambda self, x: self.stride == (1, 1))
    for actual, wanted in zip(model(images), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
