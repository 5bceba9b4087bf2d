"""Activated batch norm to and from torch's batch norm, and into convolutions: the same outputs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from libs import (
    ABN,
    InPlaceABN,
    InPlaceABNSync,
    absorb_negative_weights,
    fold,
    fold_norms,
    freeze_statistics,
    from_batchnorm,
    to_batchnorm,
    update_statistics,
)
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
    assert plain.state_dict().keys() == {*abn.state_dict(), "num_batches_tracked"}
    torch.testing.assert_close(plain.state_dict()["running_var"], abn.running_var)


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


@pytest.mark.parametrize(("dimensions", "shape"), [(1, (4, 6)), (1, (2, 6, 5)), (3, (2, 6, 2, 3, 4))])
def test_to_batchnorm_of_other_dimensions(dimensions, shape):
    abn = fill(ABN(6)).double()
    assert_same(abn, to_batchnorm(abn, dimensions), torch.randn(shape).double())


def test_to_batchnorm_survives_what_converts_and_folds_batch_norms():
    """The activation stays, and a state dict of the activated norms still loads."""
    convolution, abn = nn.Conv2d(3, 6, 3).double(), fill(ABN(6)).double()
    network = nn.Sequential(convolution, abn).eval()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    expected = network(x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(to_batchnorm(network))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    torch.testing.assert_close(synchronised(x), expected)
    plain = to_batchnorm(network)
    plain[0], plain[1].norm = fuse_conv_bn_eval(plain[0], plain[1].norm), nn.Identity()
    torch.testing.assert_close(plain(x), expected)
    plain = to_batchnorm(nn.Sequential(convolution, fill(ABN(6)).double())).eval()
    assert not plain.load_state_dict(to_batchnorm(network).state_dict()).missing_keys
    torch.testing.assert_close(plain(x), expected)
    residual = torch.randn_like(expected)
    torch.testing.assert_close(plain[1](x := convolution(x), residual), abn(x, residual))


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


# ---- state dicts of torch's batch norm ----


@pytest.mark.parametrize("kind", [ABN, InPlaceABN, InPlaceABNSync])
def test_a_state_dict_of_torchs_batch_norm_is_loaded(kind):
    """To the same outputs, also of weights below eps; in a container too."""
    network = nn.Sequential(nn.Conv2d(3, 6, 1), fill(nn.BatchNorm2d(6)), nn.ReLU()).double().eval()
    with torch.no_grad():
        network[1].weight.abs_()
        network[1].weight[:3] = torch.tensor([0.0, 1e-7, 1e-5])
    ours = nn.Sequential(nn.Conv2d(3, 6, 1), kind(6, activation="identity"), nn.ReLU()).double().eval()
    ours.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), network(x), rtol=1e-10, atol=1e-10)
    alone = kind(6, activation="identity").double().eval()
    alone.load_state_dict(network[1].state_dict())
    assert_same(alone, network[1], network[0](x))
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "other"'):
        alone.load_state_dict({**network[1].state_dict(), "other": torch.zeros(1)})


def test_negative_weights_of_torchs_batch_norm():
    """They are refused by key, or the convolution before takes their sign; activated batch norm's own stay."""
    network = nn.Sequential(nn.Conv2d(3, 6, 1), fill(nn.BatchNorm2d(6))).double().eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([-1.0, 2, -3, 4, -1e-7, 0]))
    ours = nn.Sequential(nn.Conv2d(3, 6, 1), ABN(6, activation="identity")).double().eval()
    state = network.state_dict()
    before = copy.deepcopy(state)
    with pytest.raises(RuntimeError, match=r"1\.weight: expected none below 0 in the state dict of torch's .*found 3"):
        ours.load_state_dict(state)
    ours.load_state_dict(absorb_negative_weights(ours, state))
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), network(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    own = {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}
    assert all(absorb_negative_weights(ours, own)[name] is tensor for name, tensor in own.items())
    ours.load_state_dict(own)
    assert torch.equal(ours[1].weight, network[1].weight)


# ---- what looks for batch norms ----


def three_norms():
    return nn.Sequential(nn.Conv2d(3, 6, 1), ABN(6), InPlaceABN(6), nn.BatchNorm2d(6), nn.Dropout())


def test_torchs_idioms_find_activated_batch_norm():
    """isinstance(module, _BatchNorm), what Lightning sets, and update_bn; convert_sync_batchnorm is an error."""
    for kind in (ABN, InPlaceABN, InPlaceABNSync):
        assert isinstance(kind(3), _BatchNorm)
        with pytest.raises(NotImplementedError, match=f"{kind.__name__} .* is not converted to nn.SyncBatchNorm"):
            nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(kind(3)))
    x = torch.randn(4, 3, 5, 6)
    frozen = ABN(3)
    frozen.track_running_stats = False
    frozen(x)
    assert torch.equal(frozen.running_mean, torch.zeros(3))


@pytest.mark.parametrize("update", [update_statistics, torch.optim.swa_utils.update_bn])
def test_update_statistics(update):
    network = three_norms().eval()
    network[2].train()
    batches = [torch.randn(4, 3, 5, 6), torch.randn(2, 3, 5, 6) + 3]
    update([(x, "label") for x in batches], network)
    expected = torch.stack([network[0](x).mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(network[1].running_mean, expected)
    assert [norm.momentum for norm in network[1:4]] == [0.1, 0.1, 0.1]
    if update is update_statistics:
        assert [module.training for module in network] == [False, False, True, False, False]


def test_update_statistics_without_batches_or_norms():
    network = three_norms()
    network[1].running_mean.fill_(5)
    with pytest.raises(ValueError, match="batches: expected at least one, found none"):
        update_statistics([], network)
    assert (network[1].running_mean == 5).all()
    with pytest.raises(ValueError, match="model: expected a batch norm that keeps running statistics, found none"):
        update_statistics([torch.zeros(1)], nn.Linear(1, 1))


def test_freeze_statistics():
    network = three_norms()
    freeze_statistics(network)
    assert [module.training for module in network] == [True, False, False, False, True]


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
