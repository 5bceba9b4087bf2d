"""The heads that the paper compares: against their definitions, and through both scripts."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_own_data import evaluated, trained
from torch import nn

from libs import ABN
from networks import HEADS, NetworkConfig, PredictionNetwork, StateDictError, build_model, load_state
from networks.aspp import ASPPModule
from networks.heads import build_head
from networks.non_local import NonLocalBlock, NonLocalModule
from networks.psp import PSPModule
from utils.checkpoint import read_state_dict
from utils.network_file import find_network

CHANNELS = 32


def norm(x: torch.Tensor, abn: ABN) -> torch.Tensor:
    """Activated batch norm in evaluation, by its definition: with leaky ReLU."""
    mean, var, weight, bias = (
        tensor.view(1, -1, 1, 1) for tensor in (abn.running_mean, abn.running_var, abn.weight, abn.bias)
    )
    z = (x - mean) / (var + abn.eps).sqrt() * (weight.abs() + abn.eps) + bias
    return torch.where(z > 0, z, 0.01 * z)


def conv(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding, dilation=layer.dilation)


def classified(head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return conv(norm(conv(x, head.bottleneck[0]), head.bottleneck[1]), head.bottleneck[3])


def resized(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear, with corners aligned: each axis is a matrix."""

    def matrix(before: int, after: int) -> torch.Tensor:
        out = x.new_zeros(after, before)
        for i in range(after):
            position = i * (before - 1) / (after - 1)
            low = min(int(position), before - 1)
            high = min(low + 1, before - 1)
            out[i, low] += 1 - (position - low)
            out[i, high] += position - low
        return out

    return torch.einsum("ih,jw,nchw->ncij", matrix(x.shape[2], height), matrix(x.shape[3], width), x)


def psp(head: PSPModule, x: torch.Tensor) -> torch.Tensor:
    height, width = x.shape[2:]
    parts = []
    for cells, (_, reduction, abn) in zip((1, 2, 3, 6), head.stages, strict=True):
        rows = [(i * height // cells, -(-(i + 1) * height // cells)) for i in range(cells)]
        columns = [(j * width // cells, -(-(j + 1) * width // cells)) for j in range(cells)]
        mean = torch.stack([torch.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in columns], 2) for a, b in rows], 2)
        parts.append(resized(norm(conv(mean, reduction), abn), height, width))
    return classified(head, torch.cat([*parts, x], 1))


def aspp(head: ASPPModule, x: torch.Tensor) -> torch.Tensor:
    mean = norm(conv(x.mean((2, 3), keepdim=True), head.pooling[1]), head.pooling[2])
    branches = [norm(conv(x, branch[0]), branch[1]) for branch in head.branches]
    assert [branch[0].dilation[0] for branch in head.branches] == [1, 12, 24, 36]
    return classified(head, torch.cat([mean.repeat(1, 1, *x.shape[2:]), *branches], 1))


def attended(block: NonLocalBlock, x: torch.Tensor) -> torch.Tensor:
    query, key, value = (conv(x, each).flatten(2) for each in (block.query_conv, block.key_conv, block.value_conv))
    weights = torch.einsum("nci,ncj->nij", query, key).softmax(2)
    return x + block.gamma * torch.einsum("nij,ncj->nci", weights, value).view(x.shape)


def non_local(head: NonLocalModule, x: torch.Tensor) -> torch.Tensor:
    out = attended(head.non_local, norm(conv(x, head.conva[0]), head.conva[1]))
    return classified(head, torch.cat([x, norm(conv(out, head.convb[0]), head.convb[1])], 1))


DEFINITIONS = {"none": classified, "psp": psp, "aspp": aspp, "nonlocal": non_local}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_heads_are_what_they_are_defined_to_be(name):
    """And all gradients."""
    torch.manual_seed(0)
    head = build_head(name, CHANNELS, 5, 0).double().eval()
    for module in head.modules():
        if isinstance(module, ABN):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    if head.gamma is not None:
        nn.init.constant_(head.gamma, 0.7)
    x = torch.randn(2, CHANNELS, 13, 9, dtype=torch.float64, requires_grad=True)
    variables = {"x": x, **dict(head.named_parameters())}
    actual, expected = head(x), DEFINITIONS[name](head, x)
    assert actual.shape == (2, 5, 13, 9)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(actual)
    gradients = [torch.autograd.grad((out * direction).sum(), list(variables.values())) for out in (actual, expected)]
    for key, a, b in zip(variables, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("head", HEADS)
def test_every_head_in_the_network(head):
    """At the same size, with a classifying layer and a form for prediction; none has more passes than rcca."""
    model = build_model("resnet18", num_classes=3, head=head).double()
    images = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    assert [logits.shape for logits in model(images)] == [(2, 3, 9, 13)] * 2
    assert model.state_dict()["head.bottleneck.3.weight"].shape[0] == 3
    (predicted,) = PredictionNetwork(model)(images)
    with torch.no_grad():
        torch.testing.assert_close(predicted, model.eval()(images)[0], rtol=1e-9, atol=1e-9)
    assert NetworkConfig(head=head).recurrence == (2 if head == "rcca" else 0)


def test_only_criss_cross_attention_recurs():
    with pytest.raises(ValueError, match="recurrence: expected 0, since only the head rcca recurs, got 2"):
        build_model("resnet18", head="psp", recurrence=2)
    with pytest.raises(ValueError, match="head: expected one of rcca, none, psp, aspp, nonlocal, got 'ocr'"):
        build_model("resnet18", head="ocr")


@pytest.mark.parametrize("head", HEADS)
def test_shapes_say_which_head_it_is(tmp_path, head):
    with torch.device("meta"):
        state = build_model("resnet18", head=head).state_dict()
    found = find_network(tmp_path / "x.pth", state)
    assert found.config.head == head
    assert "head" in found.known


def test_a_network_with_another_head_is_a_start_and_nothing_else():
    state = build_model("resnet18", head="psp").state_dict()
    model = build_model("resnet18")
    with pytest.raises(StateDictError, match="unexpected"):
        load_state(model, state, "psp.pth")
    left_out = load_state(model, state, "psp.pth", as_start=True)
    assert left_out == sorted(name for name in model.state_dict() if name.startswith("head."))
    assert torch.equal(model.dsn[0].weight, state["dsn.0.weight"])


def test_the_head_goes_from_training_to_evaluation(scenes, tmp_path, capsys):
    assert trained(scenes, tmp_path, "--head", "psp") == 0
    assert "resnet18, head psp, stem conv3x3" in capsys.readouterr().out
    path = tmp_path / "CS_scenes_1.pth"
    assert find_network(path, read_state_dict(path)).config.head == "psp"
    assert evaluated(scenes, tmp_path) == 0
    out = capsys.readouterr().out
    assert "head psp" in out
    assert "gamma" not in out
    result = json.loads((tmp_path / "outputs/CS_scenes_1/val/result.json").read_text())
    assert (result["gamma"], result["flags"]["recurrence"]) == (None, 0)
    assert trained(scenes, tmp_path, "--resume", "--head", "rcca") == 2
    assert "--head rcca: the weights are of psp, as" in capsys.readouterr().err
    begin = ["--restore-from", path, "--num-steps", 0]
    assert trained(scenes, tmp_path / "next", *begin, "--head", "nonlocal", "--initial-gamma", 0.5) == 0
    assert "loaded without head." in capsys.readouterr().out
    assert torch.load(tmp_path / "next/CS_scenes_0.pth", weights_only=True)["head.non_local.gamma"].item() == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recurrence", 2], "--recurrence 2: expected it with --head rcca, got psp"),
        (["--attention", "3,4"], "--attention: expected --head rcca and --recurrence 1 or more"),
        (["--compare-recurrence", 1], "--compare-recurrence: expected --head rcca, got psp"),
    ],
)
def test_what_belongs_to_criss_cross_attention_is_refused(scenes, tmp_path, capsys, flags, message):
    torch.save(build_model("resnet18", head="psp").state_dict(), tmp_path / "CS_scenes_1.pth")
    assert evaluated(scenes, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err
