"""Activated batch norm to and from torch's batch norm, and into convolutions: the same outputs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from libs import ABN, InPlaceABN, InPlaceABNSync, fold, fold_norms, from_batchnorm, to_batchnorm
from networks import BACKBONE_ACTIVATIONS, build_model

ACTIVATIONS = {"leaky_relu": nn.LeakyReLU(0.2), "elu": nn.ELU(), "identity": nn.Identity()}


def fill(norm):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def assert_same(actual, expected, x):
    torch.testing.assert_close(actual(x.clone()), expected(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [ABN, InPlaceABN, InPlaceABNSync])
@pytest.mark.parametrize("training", [True, False])
def test_to_batchnorm(activation, kind, training):
    """Also with negative weights and a weight of 0."""
    abn = fill(kind(6, eps=1e-3, momentum=0.3, activation=activation, slope=0.2)).double().train(training)
    with torch.no_grad():
        abn.weight[2] = 0
        plain = to_batchnorm(abn)
        assert_same(abn, plain, torch.randn(3, 6, 4, 5).double())
    assert not any(isinstance(module, ABN) for module in plain.modules())
    torch.testing.assert_close(plain.running_var, abn.running_var)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [ABN, InPlaceABN, InPlaceABNSync])
@pytest.mark.parametrize("bias", [True, False])
def test_from_batchnorm(activation, kind, bias):
    """In evaluation exactly, also with weights that are negative, 0 and less than eps."""
    convolution = nn.Conv2d(3, 6, 3, bias=bias).double()
    norm = fill(nn.BatchNorm2d(6, eps=1e-3)).double().eval()
    with torch.no_grad():
        norm.weight[:5] = torch.tensor([-0.7, 0.0, 1e-5, -1e-4, 1e-3])
        x = torch.randn(2, 3, 8, 9).double()
        expected = ACTIVATIONS[activation](norm(convolution(x)))
        abn = from_batchnorm(norm, activation, 0.2, kind, convolution)
        torch.testing.assert_close(abn(convolution(x)), expected, rtol=1e-10, atol=1e-10)
    assert type(abn) is kind
    assert abn.momentum == norm.momentum


def test_from_batchnorm_goes_on_training_alike():
    """With weights above eps: the gradient and the running statistics are those of the plain form."""
    norm = fill(nn.BatchNorm2d(6)).double()
    with torch.no_grad():
        norm.weight.abs_().add_(0.1)
    x = torch.randn(2, 6, 8, 9, dtype=torch.float64, requires_grad=True)
    abn = from_batchnorm(norm, "leaky_relu")
    y = abn(x.clone())
    expected = F.leaky_relu(norm(x), 0.01)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected)))
    torch.testing.assert_close(abn.running_var, norm.running_var)


def test_without_weights():
    norm = fill(nn.BatchNorm2d(4, affine=False)).double().eval()
    x = torch.randn(2, 4, 3, 3).double()
    assert_same(from_batchnorm(norm), norm, x)
    assert_same(to_batchnorm(from_batchnorm(norm)), norm, x)


def test_what_cannot_be_converted_is_an_error():
    with pytest.raises(ValueError, match="norm: expected running statistics, got track_running_stats=False"):
        from_batchnorm(nn.BatchNorm2d(3, track_running_stats=False))
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight[1] = -1
    with pytest.raises(ValueError, match=r"norm: 1 weights are negative, .*expected the convolution before it"):
        from_batchnorm(norm)
    with pytest.raises(ValueError, match="convolution: expected 3 output channels, got 4"):
        from_batchnorm(norm, convolution=nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="convolution: expected Conv1d, Conv2d or Conv3d, got ConvTranspose2d"):
        fold(nn.ConvTranspose2d(3, 3, 1), ABN(3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "convolution",
    [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3)],
    ids=str,
)
def test_fold(activation, affine, convolution):
    convolution = convolution.double()
    abn = fill(InPlaceABN(6, affine=affine, activation=activation, slope=0.2)).double().eval()
    x = torch.randn([2, 4, 5, 6][: convolution.weight.dim()], dtype=torch.float64)
    with torch.no_grad():
        expected = abn(convolution(x))
        folded = fold(convolution, abn)
        torch.testing.assert_close(folded(x), expected, rtol=1e-10, atol=1e-10)
    assert {type(module) for module in folded.modules()}.isdisjoint({ABN, InPlaceABN})


def test_fold_norms():
    """Those directly behind a convolution, at any depth; with a residual too. The network is left as it is."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(4, 4, 1), fill(ABN(4))
            self.other = fill(ABN(4, activation="elu"))

        def forward(self, x):
            return self.other(self.norm(self.first(x), x))

    network = nn.Sequential(nn.Conv2d(3, 4, 3), fill(InPlaceABN(4)), Block(), nn.ReLU()).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    folded = fold_norms(network)
    assert network.training
    assert not folded.training
    assert [type(module) for module in folded.modules() if isinstance(module, ABN)] == [ABN]
    assert sum(isinstance(module, ABN) for module in network.modules()) == 3
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(x), network(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", BACKBONE_ACTIVATIONS)
def test_a_whole_network(activation):
    """Of torch's own batch norm only, under the same names; the network itself is left as it is."""
    model = build_model("resnet18", backbone_activation=activation).eval()
    for module in model.modules():
        if isinstance(module, ABN):
            fill(module)
    before = copy.deepcopy(model.state_dict())
    plain = to_batchnorm(model)
    assert not any(isinstance(module, ABN) for module in plain.modules())
    assert any(isinstance(module, ABN) for module in model.modules())
    assert {name for name in plain.state_dict() if not name.endswith("num_batches_tracked")} == before.keys()
    images = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        for actual, expected in zip(plain(images), model(images), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        for parameter in plain.parameters():
            parameter.zero_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
