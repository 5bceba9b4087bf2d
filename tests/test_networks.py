"""The networks' names, shapes and sizes, and loading of the original's three generations of state dicts."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from libs import ABN, to_batchnorm
from networks import BACKBONES, PredictionNetwork, StateDictError, build_model, load_state


def randomise(model):
    """Give a network of activated batch norm weights of either sign, and statistics that keep its numbers small."""
    with torch.no_grad():
        model.head.cca.gamma.fill_(0.5)
        for module in model.modules():
            if isinstance(module, ABN):
                module.weight.uniform_(-0.8, 0.8)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(1, 3)


@pytest.fixture(scope="module")
def resnet101():
    with torch.device("meta"):
        return build_model()


def test_parameters_of_the_papers_network(resnet101):
    assert sum(parameter.numel() for parameter in resnet101.parameters()) == 71_287_911


def test_names_and_shapes_of_the_papers_network(resnet101):
    shapes = {name: list(tensor.shape) for name, tensor in resnet101.state_dict().items()}
    expected = {
        "conv1.weight": [64, 3, 3, 3],
        "conv2.weight": [64, 64, 3, 3],
        "conv3.weight": [128, 64, 3, 3],
        "bn3.running_var": [128],
        "layer1.0.downsample.0.weight": [256, 128, 1, 1],
        "layer1.0.downsample.1.bias": [256],
        "layer2.3.conv2.weight": [128, 128, 3, 3],
        "layer3.22.conv3.weight": [1024, 256, 1, 1],
        "layer4.2.bn3.weight": [2048],
        "head.conva.0.weight": [512, 2048, 3, 3],
        "head.conva.1.running_mean": [512],
        "head.cca.query_conv.weight": [64, 512, 1, 1],
        "head.cca.gamma": [1],
        "head.convb.0.weight": [512, 512, 3, 3],
        "head.bottleneck.0.weight": [512, 2560, 3, 3],
        "head.bottleneck.3.weight": [19, 512, 1, 1],
        "dsn.0.bias": [512],
        "dsn.3.bias": [19],
    }
    assert {name: shapes.get(name) for name in expected} == expected
    tops = {name.split(".")[0] for name in shapes}
    assert tops == {
        "conv1",
        "bn1",
        "conv2",
        "bn2",
        "conv3",
        "bn3",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
        "head",
        "dsn",
    }
    assert not any(name.endswith("num_batches_tracked") for name in shapes)
    assert "conva.0.bias" not in shapes


def test_layers_of_the_papers_network(resnet101):
    assert [len(getattr(resnet101, f"layer{n}")) for n in (1, 2, 3, 4)] == [3, 4, 23, 3]
    assert {block.conv2.dilation for block in resnet101.layer3} == {(2, 2)}
    assert {block.conv2.dilation for block in resnet101.layer4} == {(4, 4)}
    assert resnet101.layer2[0].conv2.stride == (2, 2)
    activations = {
        name: module.activation for name, module in resnet101.named_modules() if hasattr(module, "activation")
    }
    heads = {name for name in activations if name.startswith(("head.", "dsn."))}
    assert {activations[name] for name in heads} == {"leaky_relu"}
    assert {activations[name] for name in activations.keys() - heads} == {"relu", "identity"}
    identity = {name for name, activation in activations.items() if activation == "identity"}
    assert identity == {f"layer{n}.0.downsample.1" for n in (1, 2, 3, 4)}


def test_the_backbones_activation():
    """leaky_relu in every norm but those of the shortcuts, also of the sums."""
    with torch.device("meta"):
        model = build_model("resnet50", backbone_activation="leaky_relu")
    assert model.state_dict().keys() == build_model("resnet50").state_dict().keys()
    activations = {name: module.activation for name, module in model.named_modules() if isinstance(module, ABN)}
    identity = {name for name, activation in activations.items() if activation == "identity"}
    assert identity == {f"layer{n}.0.downsample.1" for n in (1, 2, 3, 4)}
    assert set(activations.values()) == {"identity", "leaky_relu"}
    with pytest.raises(ValueError, match="backbone_activation: expected one of identity, leaky_relu, got 'elu'"):
        build_model("resnet18", backbone_activation="elu")


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("activation", "slope"), [("identity", 0), ("leaky_relu", 0.01)])
def test_the_activation_of_a_sum_is_behind_the_sum(backbone, activation, slope):
    model = build_model(backbone, backbone_activation=activation)
    block = model.layer1[-1]
    x = torch.randn(2, block.conv1.in_channels, 5, 6)
    out = x
    norms = [block.bn1, block.bn2, *([block.bn3] if hasattr(block, "bn3") else [])]
    for number, norm in enumerate(norms, start=1):
        out = F.batch_norm(getattr(block, f"conv{number}")(out), None, None, norm.weight, norm.bias, training=True)
        out = F.leaky_relu(out + x if norm is norms[-1] else out, slope)
    torch.testing.assert_close(block(x), out, rtol=1e-3, atol=1e-4)


def test_weights_are_contiguous_and_the_copy_for_prediction_is_channels_last():
    model = build_model("resnet18")
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    weights = [tensor for tensor in PredictionNetwork(model).state_dict().values() if tensor.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_output_is_at_an_eighth(resnet101):
    main, auxiliary = resnet101(torch.zeros(1, 3, 769, 769, device="meta"))
    assert main.shape == auxiliary.shape == (1, 19, 97, 97)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("recurrence", [0, 1, 2, 3])
def test_every_backbone_and_recurrence(backbone, recurrence):
    with torch.device("meta"):
        model = build_model(backbone, num_classes=21, recurrence=recurrence)
        main, auxiliary = model(torch.zeros(2, 3, 65, 97))
    assert main.shape == auxiliary.shape == (2, 21, 9, 13)


def test_recurrence_applies_the_one_attention_again():
    model = build_model("resnet18", recurrence=3).eval()
    model.head.cca.gamma.data.fill_(0.5)
    x = torch.randn(1, 512, 4, 5)
    with torch.no_grad():
        out = model.head.conva(x)
        for _ in range(3):
            out = model.head.cca(out)
        expected = model.head.bottleneck(torch.cat([x, model.head.convb(out)], 1))
        torch.testing.assert_close(model.head(x), expected)
        model.head.recurrence = 0
        assert not torch.allclose(model.head(x), expected)


@pytest.mark.parametrize(("backbone", "activation"), [("resnet18", "identity"), ("resnet50", "leaky_relu")])
def test_the_copy_for_prediction_gives_the_main_logits(backbone, activation):
    """And has no batch norm and no auxiliary head; the network itself is left as it is."""
    model = build_model(backbone, backbone_activation=activation).double()
    randomise(model)
    images = torch.randn(1, 3, 17, 25, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    network = PredictionNetwork(model)
    assert model.training
    assert not any(isinstance(module, ABN) for module in network.modules())
    assert not any(name.startswith("network.dsn") for name in network.state_dict())
    model.eval()
    (logits,) = network(images)
    with torch.no_grad():
        expected = model.main_logits(images)
        # It is the first of the results, which depend on the images.
        torch.testing.assert_close(model(images)[0], expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(model.main_logits(images.flip(3)), expected)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert not logits.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_copy_for_prediction_stays_in_evaluation_mode():
    network = PredictionNetwork(build_model("resnet18"))
    assert not any(module.training for module in network.modules())
    nn.Sequential(network).train()
    assert network.train() is network
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "vgg16"}, "backbone: expected one of resnet18"),
        ({"recurrence": -1, "backbone": "resnet18"}, "recurrence: expected 0 or more, got -1"),
        ({"num_classes": 0}, "num_classes: expected 1 or more, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(**arguments)


@pytest.fixture(scope="module")
def model():
    return build_model("resnet18")


def state_of(model):
    """A copy of the model's state dict with other values, so that what is loaded can be told."""
    return {name: torch.rand_like(tensor) for name, tensor in model.state_dict().items()}


def assert_loaded(model, expected):
    for name, tensor in model.state_dict().items():
        if name in expected:
            assert torch.equal(tensor, expected[name]), name


def test_loads_its_own(model):
    state = state_of(model)
    load_state(model, state, "own.pth")
    assert_loaded(model, state)


def test_loads_december_2018_and_data_parallel(model):
    state = state_of(model)
    old = {
        "module." + name.replace("head.conva.", "head.conv1a.").replace("head.convb.", "head.conv1b."): tensor
        for name, tensor in state.items()
    }
    assert "module.head.conv1a.0.weight" in old
    load_state(model, old, "old.pth")
    assert_loaded(model, state)
    both = {**old, "head.conva.0.weight": old["module.head.conv1a.0.weight"]}
    with pytest.raises(StateDictError, match=r"old.pth: module.head.conv1a.0.weight and head.conva.0.weight are both"):
        load_state(model, both, "old.pth")


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"module._orig_mod.module.{key}",
        lambda key: key.replace("layer1.0.", "layer1.0._orig_mod."),
        lambda key: f"model.{key}",
        lambda key: f"ema.module.net.{key}",
    ],
)
def test_prefixes_of_wrappers_are_removed(model, wrapped):
    state = state_of(model)
    averaged = {"n_averaged": torch.tensor(3)}
    load_state(model, averaged | {wrapped(name): tensor for name, tensor in state.items()}, "file.pth")
    assert_loaded(model, state)


def test_a_prefix_that_some_keys_have_is_unexpected(model):
    state = {f"model.{name}": tensor for name, tensor in state_of(model).items()} | {"loss.weight": torch.zeros(1)}
    with pytest.raises(StateDictError, match=r"(?s)missing:.*unexpected:.*loss.weight.*model.bn1.bias"):
        load_state(model, state, "file.pth")


def test_loads_an_imagenet_backbone(model):
    backbone = {name: tensor for name, tensor in state_of(model).items() if not name.startswith(("head.", "dsn."))}
    extra = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    head_before = model.head.conva[0].weight.detach().clone()
    with pytest.raises(StateDictError, match=r"(?s)missing:.*dsn.0.bias.*unexpected:.*fc.bias"):
        load_state(model, {**backbone, **extra}, "imagenet.pth")
    load_state(model, {**backbone, **extra}, "imagenet.pth", as_start=True)
    assert_loaded(model, backbone)
    assert torch.equal(model.head.conva[0].weight, head_before)


@pytest.mark.parametrize("backbone_only", [True, False])
def test_weights_trained_with_torchs_batch_norm_give_the_same_logits(backbone_only):
    """Also the negative ones, and those nearer to 0 than eps."""
    plain = build_model("resnet18").double()
    randomise(plain)
    plain = to_batchnorm(plain).eval()
    with torch.no_grad():
        for norm in (module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight.mul_(torch.where(torch.rand(len(norm.weight)) < 0.08, -1, 1))
            norm.weight[:2] = torch.tensor([0, -1e-6])
    state = plain.state_dict()
    model = build_model("resnet18").double().eval()
    if backbone_only:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "dsn."))}
        state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    load_state(model, state, "torch.pth", as_start=backbone_only)
    images = torch.randn(1, 3, 17, 25, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = (net.features(images) if backbone_only else net(images) for net in (model, plain))
    for a, b in zip(actual, expected, strict=True):
        assert b.std() > 0.01
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_negative_weight_of_torchs_without_a_convolution_before_it_is_refused():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.norm = nn.ReLU(), ABN(4)

    model = Network()
    state = {f"norm.{name}": tensor for name, tensor in nn.BatchNorm2d(4).state_dict().items()}
    state["norm.weight"] = torch.tensor([1.0, -1, -2, 3])
    with pytest.raises(StateDictError, match=r"no convolution directly before it:\n    norm.weight: 2 of 4"):
        load_state(model, state, "torch.pth")
    del state["norm.num_batches_tracked"]
    load_state(model, state, "abn.pth")
    assert_loaded(model, state)


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda x: x.index_fill(0, torch.tensor([1]), float("nan")), "expected finite numbers, found 1 of 64 that are"),
        (lambda x: x / 0, "expected finite numbers, found 64 of 64 that are NaN or infinite"),
        (lambda x: x.to_sparse(), r"expected a dense tensor, found a torch.sparse_coo one"),
        (lambda x: x.to(torch.complex64), r"expected floating-point numbers, found torch.complex64"),
        (lambda x: x.int(), r"expected floating-point numbers, found torch.int32"),
        (
            lambda x: torch.ops.aten.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            "expected a plain tensor, found a quantised",
        ),
        (lambda x: x.to("meta"), "expected numbers, found a tensor on the meta device"),
    ],
    ids=["nan", "infinite", "sparse", "complex", "integers", "quantised", "meta"],
)
def test_tensors_that_are_no_weights_are_named_and_nothing_is_loaded(model, spoilt, message):
    state = state_of(model)
    state["bn1.bias"] = spoilt(state["bn1.bias"] + 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StateDictError, match=rf"(?s)file.pth.*1 unusable:\n    bn1.bias: {message}"):
        load_state(model, state, "file.pth")
    assert_loaded(model, before)


@pytest.mark.parametrize("kind", ["whole", "backbone"])
def test_missing_and_unexpected_keys_are_listed_and_nothing_is_loaded(model, kind):
    state = state_of(model)
    if kind == "backbone":
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "dsn."))}
    state["layer1.0.bn1.waight"] = state.pop("layer1.0.bn1.weight")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StateDictError) as error:
        load_state(model, state, "file.pth", as_start=True)
    assert "file.pth" in str(error.value)
    assert "1 missing:\n    layer1.0.bn1.weight" in str(error.value)
    assert "1 unexpected:\n    layer1.0.bn1.waight" in str(error.value)
    assert_loaded(model, before)


def test_fc_is_unexpected_in_a_whole_network(model):
    with pytest.raises(StateDictError, match=r"unexpected:\n    fc.weight"):
        load_state(model, {**state_of(model), "fc.weight": torch.zeros(3)}, "file.pth")


def test_another_number_of_classes_names_the_keys_and_restore_last_skips_them(model):
    state = state_of(build_model("resnet18", num_classes=21))
    with pytest.raises(StateDictError) as error:
        load_state(model, state, "21.pth")
    assert "head.bottleneck.3.weight: the file has [21, 128, 1, 1], the network [19, 128, 1, 1]" in str(error.value)
    assert "dsn.3.bias: the file has [21], the network [19]" in str(error.value)
    assert str(error.value).endswith(
        "The file has 21 classes, the network 19: give --classes, or train new classifying layers with "
        "--not-restore-last"
    )
    classifier = model.dsn[3].weight.detach().clone()
    load_state(model, state, "21.pth", restore_last=False)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert torch.equal(model.dsn[3].weight, classifier)
