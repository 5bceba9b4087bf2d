"""Weights of other projects: ImageNet backbones of torchvision, timm and mmsegmentation, and the last's CCNet."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from test_own_data import trained
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional

from dataset.transforms import normalise
from networks import BACKBONES, StateDictError, build_model, load_state, pretrained

# timm's and mmsegmentation's names of the stem of three convolutions and norms
TIMM = {"conv1": "conv1.0", "bn1": "conv1.1", "conv2": "conv1.3", "bn2": "conv1.4", "conv3": "conv1.6", "bn3": "bn1"}
MMSEGMENTATION = {
    name: f"stem.{k}" for name, k in zip(("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"), "013467", strict=True)
}


def randomised(model: nn.Module) -> nn.Module:
    """Statistics and weights, some of them negative, as trained ones may be; numbers stay of the size of 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.4, 1.2, generator=generator)
                module.weight[:2] *= -1
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def torchvisions(backbone: str, dilated: bool = False) -> torchvision.models.ResNet:
    """torchvision's network with random weights; dilated as this project's, which torchvision itself can't do."""
    model = randomised(getattr(torchvision.models, backbone)(num_classes=10))
    for stage, dilation in ((model.layer3, 2), (model.layer4, 4)):
        for module in stage.modules() if dilated else ():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (dilation, dilation)
    return model


def backbone_of(model: nn.Module, *parts: str) -> nn.Sequential:
    return nn.Sequential(*(getattr(model, part) for part in ("conv1", "bn1", "relu", "maxpool", *parts)))


def inputs(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same image as this project, and as torchvision's own preprocessing, give it to a network: float64."""
    image = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    image = image.repeat(8, 0).repeat(8, 1)
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    normalised = functional.normalize(torch.from_numpy(image).permute(2, 0, 1) / 255, preset.mean, preset.std)
    return torch.from_numpy(normalise(image))[None].double(), normalised[None].double()


def loaded(state: dict, backbone: str, stem: str) -> nn.Module:
    model = build_model(backbone, stem=stem).double().eval()
    assert load_state(model, state, "weights.pth", as_start=True) == []
    return model


@torch.no_grad()
def stem_and_two_stages(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    return model.features(images)[0]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_are_torchvisions_on_its_own_preprocessing(backbone):
    """Away from the border, where images are padded with the mean colour, which is not the same."""
    theirs = torchvisions(backbone).double()
    ours = loaded(theirs.state_dict(), backbone, "conv7x7")
    image, normalised = inputs(248, 264)
    with torch.no_grad():
        expected = backbone_of(theirs, "layer1", "layer2")(normalised)
    actual = stem_and_two_stages(ours, image)[..., : expected.shape[2], : expected.shape[3]]
    inner = (..., slice(14, -14), slice(14, -14))
    assert expected[inner].std() > 0.1
    assert (actual - expected)[inner].abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_all_stages_are_torchvisions_with_the_papers_dilation(backbone):
    """Up to the border, if their first layer pads with the same colour; the others pad with 0."""
    theirs = torchvisions(backbone, dilated=True).double()
    ours = loaded(theirs.state_dict(), backbone, "conv7x7")
    image, normalised = inputs(56, 72)
    padded = nn.functional.pad(normalised, (3, 3, 3, 3))
    mean = torch.tensor(pretrained._OWN_MEAN[::-1]) / 255 - torch.tensor(pretrained._MEAN)
    padded += (padded == 0).all(1) * (mean / torch.tensor(pretrained._STD)).view(3, 1, 1)
    theirs.conv1.padding = (0, 0)
    theirs.maxpool.ceil_mode = True
    with torch.no_grad():
        expected = backbone_of(theirs, "layer1", "layer2", "layer3")(padded)
        layer3, layer4 = ours.features(image)
        torch.testing.assert_close(layer3, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        expected = theirs.layer4(expected)
        torch.testing.assert_close(layer4, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("names", [TIMM, MMSEGMENTATION], ids=["timm", "mmsegmentation"])
@pytest.mark.parametrize("stem", ["conv3x3", "conv3x3_narrow"])
def test_stems_of_three_convolutions(names, stem):
    """V1s and V1c: the same as torchvision's stages behind another stem."""
    widths = {"conv3x3": (3, 64, 64, 128), "conv3x3_narrow": (3, 32, 32, 64)}[stem]
    theirs = torchvisions("resnet50").double()
    if stem == "conv3x3":
        theirs.layer1[0].conv1 = nn.Conv2d(128, 64, 1, bias=False)
        theirs.layer1[0].downsample[0] = nn.Conv2d(128, 256, 1, bias=False)
    layers = []
    for n in range(3):
        layers += [nn.Conv2d(*widths[n : n + 2], 3, 2 if n == 0 else 1, 1, bias=False)]
        layers += [randomised(nn.BatchNorm2d(widths[n + 1])), nn.ReLU()]
    theirs.double()
    stages = {name: x for name, x in theirs.state_dict().items() if name.startswith(("layer", "fc."))}
    own_names = [name for n in (1, 2, 3) for name in (f"conv{n}", f"bn{n}", None)]
    deep = {
        f"{names[name]}.{key}": tensor
        for name, layer in zip(own_names, layers, strict=True)
        if name
        for key, tensor in layer.double().state_dict().items()
    }
    ours = loaded({f"backbone.{name}": tensor for name, tensor in (deep | stages).items()}, "resnet50", stem)
    image, normalised = inputs(96, 104)
    stem_of_theirs = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        expected = nn.Sequential(stem_of_theirs, theirs.maxpool, theirs.layer1, theirs.layer2)(normalised)
    actual = stem_and_two_stages(ours, image)[..., : expected.shape[2], : expected.shape[3]]
    inner = (..., slice(5, -5), slice(5, -5))
    assert (actual - expected)[inner].abs().max() < 1e-5 * expected.abs().max()


def test_the_weights_keep_their_size_and_old_files_their_signs():
    """Files from before 2018 lack num_batches_tracked, by which torch's norms are known."""
    state = torchvisions("resnet18").state_dict()
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    models = [loaded(each, "resnet18", "conv7x7") for each in (state, old)]
    a, b = (model.state_dict() for model in models)
    assert all(torch.equal(a[name], b[name]) for name in a if not name.startswith(("head.", "dsn.")))
    before, after = state["conv1.weight"].norm(), models[0].conv1.weight.norm()
    assert 0.95 < after / before < 1.05


def test_a_network_trained_with_this_stem_is_not_converted_again():
    model = build_model("resnet18", stem="conv7x7")
    other = build_model("resnet18", stem="conv7x7")
    load_state(other, model.state_dict(), "own.pth", as_start=True)
    assert torch.equal(model.conv1.weight, other.conv1.weight)


def test_what_the_stem_changes():
    """The numbers in docs/data.md, for an image of 769x769: multiplications and additions each count."""
    counts = {}
    for stem in ("conv3x3", "conv3x3_narrow", "conv7x7"):
        with torch.device("meta"):
            model = build_model(stem=stem)
            with FlopCounterMode(display=False) as counter:
                model.conv1(torch.zeros(1, 3, 769, 769))
                for n in (2, 3):
                    if hasattr(model, f"conv{n}"):
                        convolution = getattr(model, f"conv{n}")
                        convolution(torch.zeros(1, convolution.in_channels, 385, 385))
                for convolution in (model.layer1[0].conv1, model.layer1[0].downsample[0]):
                    convolution(torch.zeros(1, convolution.in_channels, 193, 193))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        counts[stem] = (parameters, round(counter.get_total_flops() / 1e9, 1))
    assert counts == {
        "conv3x3": (71_287_911, 36.3),
        "conv3x3_narrow": (71_183_367, 10.0),
        "conv7x7": (71_164_135, 4.3),
    }


# ---- whole networks of mmsegmentation ----


def mmsegmentations(stem="conv3x3_narrow", classes=19) -> dict:
    """The names and shapes of mmsegmentation's CCNet with ResNet-50."""
    state = {}
    own = build_model("resnet50", stem=stem, num_classes=classes).state_dict()
    head = {
        "conva.0": "convs.0.conv", "conva.1": "convs.0.bn", "convb.0": "convs.1.conv", "convb.1": "convs.1.bn",
        "bottleneck.0": "conv_cat.conv", "bottleneck.1": "conv_cat.bn", "bottleneck.3": "conv_seg",
    }  # fmt: skip
    for name, tensor in own.items():
        tensor = torch.rand_like(tensor)
        if name.startswith("dsn."):
            continue
        if not name.startswith("head."):
            layer, _, kind = name.rpartition(".")
            state[f"backbone.{MMSEGMENTATION.get(layer, layer)}.{kind}"] = tensor
        elif name == "head.cca.gamma":
            state["decode_head.cca.gamma.scale"] = tensor[0]
        else:
            layer, _, kind = name.removeprefix("head.").rpartition(".")
            state[f"decode_head.{head.get(layer, layer)}.{kind}"] = tensor
    state |= {f"auxiliary_head.convs.0.conv.{name}": torch.rand(256, 1024, 3, 3) for name in ("weight",)}
    return state


def test_training_begins_with_mmsegmentations_ccnet():
    state = mmsegmentations()
    model = build_model("resnet50", stem="conv3x3_narrow")
    auxiliary = model.dsn[0].weight.clone()
    left_out = load_state(model, {"state_dict": state}["state_dict"], "mm.pth", as_start=True)
    assert left_out == sorted(name for name in model.state_dict() if name.startswith("dsn."))
    assert torch.equal(model.dsn[0].weight, auxiliary)
    assert torch.equal(model.head.bottleneck[0].weight, state["decode_head.conv_cat.conv.weight"])
    assert torch.equal(model.head.cca.key_conv.bias, state["decode_head.cca.key_conv.bias"])
    assert model.head.cca.gamma.item() == state["decode_head.cca.gamma.scale"].item()
    assert torch.equal(model.head.bottleneck[3].bias, state["decode_head.conv_seg.bias"])
    model = build_model("resnet50", stem="conv3x3_narrow", num_classes=3)
    assert "head.bottleneck.3.bias" in load_state(model, state, "mm.pth", as_start=True)


@pytest.mark.parametrize(
    ("state", "as_start", "message"),
    [
        (mmsegmentations, False, "found mmsegmentation's, which is another network: the first blocks of layer3 and"),
        (
            lambda: {"backbone.conv1.weight": torch.zeros(1), "decode_head.conv_seg.bias": torch.zeros(19)},
            True,
            "expected mmsegmentation's CCNet",
        ),
        (
            lambda: torchvisions("resnet50").state_dict() | {"layer2.0.downsample.2.weight": torch.zeros(512)},
            True,
            "expected the shortcuts of ResNet, V1b, V1c or V1s, a convolution with stride 2, found those of V1d",
        ),
        (lambda: torchvisions("resnet50").state_dict(), True, "conv1.weight: the file has .64, 3, 7, 7., the network"),
    ],
    ids=["evaluated", "another head", "V1d", "another stem"],
)
def test_other_networks_are_refused(state, as_start, message):
    with pytest.raises(StateDictError, match=f"(?s)mm.pth: .*{message}"):
        load_state(build_model("resnet50"), state(), "mm.pth", as_start=as_start)


# ---- in training ----


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """The folder in which torch.hub keeps its downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_training_begins_with_torchvisions_weights(scenes, tmp_path, downloads, capsys):
    """Their file says which stem it is."""
    theirs = torchvisions("resnet18").state_dict()
    torch.save(theirs, downloads / "resnet18-f37072fd.pth")
    assert trained(scenes, tmp_path, "--num-steps", 0, "--restore-from", "torchvision") == 0
    assert "resnet18, R=2, stem conv7x7, on cpu" in capsys.readouterr().out
    state = torch.load(tmp_path / "CS_scenes_0.pth", weights_only=True)
    assert torch.equal(state["layer4.1.conv2.weight"][2:], theirs["layer4.1.conv2.weight"][2:])
    assert trained(scenes, tmp_path / "2", "--restore-from", "torchvision", "--stem", "conv3x3") == 2
    assert f"--stem conv3x3: the weights are of conv7x7, as the shapes in {downloads}" in capsys.readouterr().err


def test_weights_that_cannot_be_downloaded(scenes, tmp_path, downloads, monkeypatch, capsys):
    def unreachable(url, *args, **settings):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    assert trained(scenes, tmp_path, "--restore-from", "torchvision") == 2
    message = "--restore-from torchvision: expected to download its weights of resnet18, found: <urlopen error no route"
    assert message in capsys.readouterr().err
