"""The network and the operators in other programs: ONNX, torch.export, TorchScript, safetensors."""

import io
import sys
from dataclasses import asdict

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from cc_attention import CrissCrossAttention, CrissCrossAttention3d, ca_map, ca_weight, native
from dataset import CITYSCAPES
from libs import ABN, InPlaceABN, InPlaceABNSync
from networks import HEADS, NetworkConfig, PredictionNetwork, build_model, export, load_model
from utils import checkpoint
from utils.checkpoint import CheckpointError, described, description_of, read_state_dict
from utils.network_file import describe, find_network


def network(head="rcca"):
    torch.manual_seed(0)
    model = build_model("resnet18", head=head).eval()
    with torch.no_grad():
        if model.head.gamma is not None:
            model.head.gamma.fill_(0.5)
        for norm in (module for module in model.modules() if isinstance(module, ABN)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(1, 3)
    return model


def snapshot(folder, head="rcca"):
    path, config = folder / "x.pth", NetworkConfig("resnet18", head=head)
    torch.save(described(network(head).state_dict(), describe(config, CITYSCAPES)), path)
    return path


def exported(*arguments):
    return export.main([str(argument) for argument in arguments])


def onnx_session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


# ---- files of the whole network ----


@pytest.mark.slow
def test_a_snapshot_as_onnx(tmp_path, capsys):
    path = tmp_path / "x.onnx"
    assert exported(snapshot(tmp_path), path) == 0
    assert f"{path}: largest difference " in capsys.readouterr().out
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}  # standard operators
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [
        "batch", 3, "height", "width",
    ]  # fmt: skip
    session, model = onnx_session(path), PredictionNetwork(network())
    for shape in ((1, 3, 8, 8), (2, 3, 71, 40)):
        images = 50 * torch.randn(shape)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_snapshot_as_a_program_of_torch_export(tmp_path, capsys):
    path = tmp_path / "x.pt2"
    assert exported(snapshot(tmp_path), path, "--recurrence", 1) == 0
    assert "x.pt2: largest difference 0.0e+00, of logits up to " in capsys.readouterr().out
    model, program = network(), torch.export.load(path).module()
    model.head.recurrence = 1
    images = 50 * torch.randn(3, 3, 71, 40)
    torch.testing.assert_close(program(images)[0], PredictionNetwork(model)(images)[0])


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_exported_with_named_sizes(head):
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("height", min=15), 3: torch.export.Dim("width", min=15)}
    model = PredictionNetwork(network(head))
    program = torch.export.export(model, (torch.zeros(2, 3, 33, 41),), dynamic_shapes=(sizes,)).module()
    for shape in ((1, 3, 34, 47), (3, 3, 60, 15)):
        images = torch.randn(shape)
        assert torch.equal(program(images)[0], model(images)[0])


@pytest.mark.parametrize("described_by", ["itself", "shapes"])
def test_a_snapshot_as_safetensors(tmp_path, capsys, described_by):
    path, copy = snapshot(tmp_path), tmp_path / "copy" / "x.safetensors"
    if described_by == "shapes":
        torch.save(network().state_dict(), path)
    assert exported(path, copy) == 0
    assert f"{copy}: 147 tensors" in capsys.readouterr().out
    state, expected = read_state_dict(copy), read_state_dict(path)
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    config = NetworkConfig("resnet18")
    if described_by == "itself":
        assert find_network(copy, state)[:2] == (config, CITYSCAPES)
    else:
        assert description_of(state) is None
    assert asdict(find_network(copy, state).config) == asdict(config)
    image = torch.randint(256, (33, 41, 3), dtype=torch.uint8).numpy()
    assert (load_model(copy).predict(image) == load_model(path).predict(image)).all()


# ---- errors ----


def test_what_computes_something_else_is_not_written(tmp_path):
    model, out = PredictionNetwork(network()), tmp_path / "x.onnx"

    def read(path):
        return lambda images: model(images)[0] * 1.01

    with pytest.raises(CheckpointError, match=r"x.onnx: largest difference .*: expected at most 0.001 of the latter"):
        export._write_checked(out, lambda file: file.write(b"x"), read, model, (16, 16))
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line(tmp_path, capsys, monkeypatch):
    path = snapshot(tmp_path, "psp")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else sys)
    for arguments, message in [
        ((path, "x.trt"), "x.trt: expected a name that ends in .onnx, .pt2, .safetensors"),
        ((path, "x.onnx"), "x.onnx: expected the packages onnxscript: pip install onnxscript"),
        ((path, "x.safetensors", "--size", "33,33"), "x.safetensors: expected no --size"),
        ((tmp_path / "other.pth", "x.pt2"), "other.pth: expected the weights of CCNet, found fc.weight"),
        ((tmp_path / "none.safetensors", "x.pt2"), "none.safetensors: expected a checkpoint, there is no such file"),
        ((tmp_path / "bad.safetensors", "x.pt2"), "bad.safetensors: expected a safetensors file, cannot read it as"),
    ]:
        assert exported(*arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    monkeypatch.undo()
    assert exported(path, "x.onnx") == 1
    assert "x.onnx: expected --size HEIGHT,WIDTH, since in ONNX the head psp" in capsys.readouterr().err


def test_safetensors_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    message = r"x.safetensors: expected the package safetensors for such files, found none: pip install safetensors"
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.write_safetensors({}, tmp_path / "x.safetensors", None)


# ---- the operators in other networks ----


class Explicit(nn.Module):
    def forward(self, x):
        return ca_map(ca_weight(x, x).softmax(1), x)


def activated(*kinds):
    layers = [kind(8, activation=activation) for kind, activation in zip(kinds, ("elu", "identity"), strict=False)]
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), ABN(8), *layers)


OF_ONNX = {
    "attention": lambda: CrissCrossAttention(8),
    "three dimensions": lambda: CrissCrossAttention3d(8),
    "explicit form": Explicit,
    "norms": lambda: activated(InPlaceABN, InPlaceABNSync),
}


def random_module(make):
    torch.manual_seed(0)
    module = make().eval()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.uniform_(0.2, 1)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_ONNX)
def test_operators_in_onnx(kind, tmp_path):
    """Of any sizes, and with nothing asked of who exports."""
    module, path = random_module(OF_ONNX[kind]), tmp_path / "x.onnx"
    depth = [3] if kind == "three dimensions" else []
    x = torch.randn(2, 8, *depth, 6, 7)
    sizes = dict.fromkeys([0, *range(2, x.dim())], torch.export.Dim.DYNAMIC)
    torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    session = onnx_session(path)
    for shape in ((2, 8, *depth, 6, 7), (1, 8, *depth, 9, 5), (3, 8, *depth, 1, 4)):
        x = torch.randn(shape)
        (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), module(x).detach(), rtol=1e-4, atol=1e-4)


def test_norms_in_onnx_are_its_batch_norm():
    """Which the exporter can fold into a convolution before it."""
    program = torch.onnx.export(activated(InPlaceABN).eval(), (torch.randn(2, 8, 6, 7),), dynamo=True, verbose=False)
    nodes = [node.op_type for node in program.model.graph]
    assert nodes == ["Conv", "LeakyRelu", "BatchNormalization", "Elu"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.skipif(not native.runs_on(torch.device("cpu")), reason="a trace of the reference is for one size")
@pytest.mark.parametrize("folded", [True, False])
def test_traced_by_torchscript(folded):
    """Without a warning, and for other sizes; saved and loaded."""
    model = PredictionNetwork(network()) if folded else network()
    traced = torch.jit.trace(model, torch.randn(1, 3, 17, 25), strict=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for module in (traced, torch.jit.load(file)):
        images = torch.randn(2, 3, 33, 25)
        for actual, expected in zip(module(images), model(images), strict=True):
            torch.testing.assert_close(actual, expected)
