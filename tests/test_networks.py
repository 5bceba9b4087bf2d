"""The networks' names, shapes and sizes, and loading of the original's three generations of state dicts."""

import copy

import pytest
import torch
from torch.nn import functional as F

from libs import ABN
from networks import BACKBONE_ACTIVATIONS, BACKBONES, PredictionNetwork, StateDictError, build_model, load_state


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
    assert {activations[name] for name in activations.keys() - heads} == {"identity"}


def test_the_backbones_activation():
    """leaky_relu in every norm but those of the shortcuts, also of the sums; and no ReLU is left."""
    with torch.device("meta"):
        model = build_model("resnet50", backbone_activation="leaky_relu")
    assert model.state_dict().keys() == build_model("resnet50").state_dict().keys()
    identity = {n for n, module in model.named_modules() if getattr(module, "activation", "") == "identity"}
    assert identity == {f"layer{n}.0.downsample.1" for n in (1, 2, 3, 4)}
    assert not any(isinstance(module, torch.nn.ReLU) for module in model.modules())
    with pytest.raises(ValueError, match="backbone_activation: expected one of identity, leaky_relu, got 'elu'"):
        build_model("resnet18", backbone_activation="elu")


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_the_activation_of_a_sum_is_behind_the_sum(backbone):
    model = build_model(backbone, backbone_activation="leaky_relu")
    block = model.layer1[-1]
    x = torch.randn(2, block.conv1.in_channels, 5, 6)
    out = x
    norms = [block.bn1, block.bn2, *([block.bn3] if hasattr(block, "bn3") else [])]
    for number, norm in enumerate(norms, start=1):
        out = F.batch_norm(getattr(block, f"conv{number}")(out), None, None, norm.weight, norm.bias, training=True)
        out = F.leaky_relu(out + x if norm is norms[-1] else out, 0.01)
    torch.testing.assert_close(block(x), out, rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize("activation", BACKBONE_ACTIVATIONS)
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_the_copy_for_prediction_gives_the_main_logits(backbone, activation):
    """And has no batch norm and no auxiliary head; the network itself is left as it is."""
    model = build_model(backbone, backbone_activation=activation).double()
    with torch.no_grad():
        model.head.cca.gamma.fill_(0.5)
        for module in model.modules():
            if isinstance(module, ABN):
                module.weight.uniform_(-0.8, 0.8)
                module.bias.normal_()
    images = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            model(images)
    before = copy.deepcopy(model.state_dict())
    network = PredictionNetwork(model)
    assert model.training
    assert not any(isinstance(module, ABN) for module in network.modules())
    assert not any(name.startswith("network.dsn") for name in network.state_dict())
    model.eval()
    (logits,) = network(images)
    torch.testing.assert_close(logits, model(images)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.main_logits(images), logits, rtol=1e-9, atol=1e-9)
    assert not logits.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


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


@pytest.fixture
def model():
    return build_model("resnet18")


def state_of(model):
    """A copy of the model's state dict with other values, so that what is loaded can be told."""
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


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


def test_loads_an_imagenet_backbone(model):
    backbone = {name: tensor for name, tensor in state_of(model).items() if not name.startswith(("head.", "dsn."))}
    extra = {
        "fc.weight": torch.zeros(1000, 512),
        "fc.bias": torch.zeros(1000),
        "bn1.num_batches_tracked": torch.tensor(7),
    }
    head_before = model.head.conva[0].weight.detach().clone()
    with pytest.raises(StateDictError, match=r"(?s)missing:.*dsn.0.bias.*unexpected:.*fc.bias"):
        load_state(model, {**backbone, **extra}, "imagenet.pth")
    load_state(model, {**backbone, **extra}, "imagenet.pth", allow_backbone=True)
    assert_loaded(model, backbone)
    assert torch.equal(model.head.conva[0].weight, head_before)


@pytest.mark.parametrize("kind", ["whole", "backbone"])
def test_missing_and_unexpected_keys_are_listed_and_nothing_is_loaded(model, kind):
    state = state_of(model)
    if kind == "backbone":
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "dsn."))}
    state["layer1.0.bn1.waight"] = state.pop("layer1.0.bn1.weight")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StateDictError) as error:
        load_state(model, state, "file.pth", allow_backbone=True)
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
    classifier = model.dsn[3].weight.detach().clone()
    load_state(model, state, "21.pth", restore_last=False)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert torch.equal(model.dsn[3].weight, classifier)
