"""What PyTorch does with modules and networks: it averages, checkpoints, shards, prunes, traces and quantises them."""

import copy

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from programs import forked_processes
from torch import fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from cc_attention import CrissCrossAttention
from libs import ABN, InPlaceABN
from networks import HEADS, BatchDropout2d, PredictionNetwork, build_model, load_state


def network(head="rcca"):
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=3, head=head)
    if model.head.gamma is not None:
        nn.init.constant_(model.head.gamma, 0.5)
    return model


def loss_of(model, images):
    return sum(logits.square().mean() for logits in model(images))


def test_averaged_weights_are_the_mean():
    model = network()
    averaged = AveragedModel(model)
    first = copy.deepcopy(model.state_dict())
    averaged.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    averaged.update_parameters(model)
    again = network()
    load_state(again, averaged.state_dict(), "averaged.pth")
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter.detach(), first[name] + 0.5, msg=name)


def test_built_without_memory_and_loaded():
    state = network().state_dict()
    with torch.device("meta"):
        empty, assigned = (build_model("resnet18", num_classes=3) for _ in range(2))
    empty.to_empty(device="cpu").load_state_dict(state)
    assigned.load_state_dict(state, assign=True)
    images = torch.randn(1, 3, 17, 25)
    with torch.no_grad():
        expected = network().eval()(images)
        for model in (empty, assigned):
            torch.testing.assert_close(model.eval()(images), expected, rtol=0, atol=0)


def test_weights_are_pruned_optimised_as_one_vector_and_saved(tmp_path):
    model = network()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "x.safetensors")
    prune.l1_unstructured(model.conv2, "weight", 0.5)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=1)
    images = torch.randn(2, 3, 17, 17)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, images)
        loss.backward()
        return loss

    before = optimizer.step(closure)
    assert closure() < before
    assert (model.conv2.weight == 0).float().mean() == 0.5


# ---- activation checkpointing ----


class Around(nn.Module):
    """A part of a network between convolutions, run with or without checkpointing."""

    def __init__(self, part):
        super().__init__()
        self.first, self.part, self.last = nn.Conv2d(8, 8, 3), part, nn.Conv2d(8, 2, 1)

    def forward(self, x, checkpointed):
        x = self.first(x)
        return self.last(checkpoint(self.part, x, use_reentrant=False) if checkpointed else self.part(x))


PARTS = {
    "attention": lambda: CrissCrossAttention(8),
    "norm": lambda: ABN(8),
    "in place": lambda: InPlaceABN(8),
    "in place behind a convolution": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), InPlaceABN(8)),
    "two in place": lambda: nn.Sequential(InPlaceABN(8), nn.Conv2d(8, 8, 1), InPlaceABN(8, activation="identity")),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing_changes_no_gradient(part, training):
    module = Around(PARTS[part]()).double().train(training)
    if part == "attention":
        nn.init.constant_(module.part.gamma, 0.7)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(module(x, checkpointed).sum(), list(module.parameters())) for checkpointed in (False, True)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# ---- several processes ----


def train_in_two_processes(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for kind, spread in {"fsdp": sharded, "ddp": distributed}.items():
        model, images = without_dropout()
        take_steps(spread(model), images[2 * rank : 2 * rank + 2])
        state = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in model.state_dict().items()}
        torch.save(state, folder / f"{kind}{rank}.pth")
    dist.destroy_process_group()


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for part in (model.layer1, model.layer2, model.layer3, model.layer4, model.head, model.dsn, model):
        fully_shard(part, mesh=mesh)
    return model


def distributed(model):
    return DistributedDataParallel(model, static_graph=True)


def without_dropout():
    model = network().double()
    for module in model.modules():
        if isinstance(module, BatchDropout2d):
            module.p = 0
    return model, torch.randn(4, 3, 17, 25, dtype=torch.float64)


def take_steps(model, images):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, images).backward()
        optimizer.step()


@pytest.mark.slow
def test_sharded_and_distributed_training_is_that_of_one_process(tmp_path):
    """By FSDP, and by DDP with a static graph."""
    forked_processes(train_in_two_processes, (tmp_path,), 2)
    model, images = without_dropout()
    take_steps(model, images)
    for name in ("fsdp0", "fsdp1", "ddp0", "ddp1"):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pth"), dict(model.state_dict()))


# ---- torch.fx ----


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("folded", [True, False])
def test_torch_fx_traces_the_network(head, folded):
    model = network(head).eval()
    model = PredictionNetwork(model) if folded else model
    traced = fx.symbolic_trace(model)
    nodes = [node.target.__name__ for node in traced.graph.nodes if callable(node.target)]
    assert nodes.count("criss_cross_attention") == (2 if head == "rcca" else 0)
    images = torch.randn(2, 3, 17, 25)
    for actual, expected in zip(traced(images), model(images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_torch_fx_keeps_the_checks():
    traced = fx.symbolic_trace(nn.Sequential(ABN(8), CrissCrossAttention(8)).eval())
    with pytest.raises(ValueError, match=r"x: expected shape \[N, 8, \.\.\.\], got \[1, 4, 3, 3\]"):
        traced(torch.randn(1, 4, 3, 3))
    with pytest.raises(ValueError, match=r"x: expected shape \[N, in_dim, H, W\], got \[1, 8, 3, 3, 3\]"):
        traced(torch.randn(1, 8, 3, 3, 3))


def test_torchvisions_feature_extractor():
    """In training and in evaluation."""
    model = network()
    extractor = create_feature_extractor(model, {"layer4": "features", "head.cca": "attended"})
    images = torch.randn(2, 3, 17, 25)
    assert {name: list(x.shape) for name, x in extractor(images).items()} == {
        "features": [2, 512, 3, 4],
        "attended": [2, 128, 3, 4],
    }
    with torch.no_grad():
        actual = extractor.eval()(images)["features"]
        torch.testing.assert_close(actual, model.eval().features(images)[1], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_quantised_around_the_attention():
    """By PyTorch's quantisation of traced graphs, as long as there is one: the attention stays in floating point."""
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    attention = CrissCrossAttention(8)
    nn.init.constant_(attention.gamma, 0.5)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), attention, nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(4, 3, 9, 10)
    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping(), (x,))
    prepared(x)
    quantised = quantize_fx.convert_fx(prepared)
    assert quantised.get_submodule("2.query_conv").weight().dtype == torch.qint8
    expected = model(x)
    assert (quantised(x) - expected).norm() < 0.05 * expected.norm()
