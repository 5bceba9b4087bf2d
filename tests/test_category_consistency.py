"""The category consistent loss: against its definition, over processes, and through both scripts."""

import json

import pytest
import torch
import torch.distributed as dist
from gradients import assert_same_gradients
from programs import distributed_processes
from test_own_data import evaluated, trained
from test_train import assert_bitwise_equal, events, weights

from dataset import shard
from networks import BatchShard, NetworkConfig, PredictionNetwork, build_model, load_model, load_state
from utils.category_consistency import category_consistent_loss
from utils.checkpoint import read_state_dict
from utils.criterion import CriterionDSN, CriterionOhemDSN
from utils.network_file import find_network, network_path, read_network

K = 5


def random_case(n=2, size=(6, 9), spread=1.2, void=0.1, seed=0):
    """Features around a mean for each class, at all distances that the loss tells apart, and labels of their size."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(K, (n, *size), generator=generator)
    means = spread * torch.randn(K, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, *size, 3, generator=generator, dtype=torch.float64)
    features = (means[target] + 0.7 * noise).movedim(-1, 1)
    target[torch.rand(n, *size, generator=generator) < void] = 255
    return features.requires_grad_(), target.to(torch.uint8)


def norm(x):
    """With gradient 0 where it is 0."""
    return x.square().sum().sqrt() if x.detach().any() else (x * 0).sum()


def phi_var(d):
    if d > 1.5:
        return d - 1.5 + (1.5 - 0.5) ** 2
    return (d - 0.5) ** 2 if d > 0.5 else 0 * d


def phi_dis(d):
    return (2 * 1.5 - d) ** 2 if d <= 2 * 1.5 else 0 * d


def by_definition(features, target):
    """The paper's equations, with labels of the features' size."""
    pixels = features.movedim(1, -1)
    classes = [pixels[target == c] for c in range(K) if (target == c).any()]
    if not classes:
        return (0 * features).sum()
    means = [h.mean(0) for h in classes]
    var = sum(sum(phi_var(norm(mean - x)) for x in h) / len(h) for mean, h in zip(means, classes, strict=True))
    pairs = [(a, b) for i, a in enumerate(means) for j, b in enumerate(means) if i != j]
    dis = sum(phi_dis(norm(a - b)) for a, b in pairs) / max(len(pairs), 1)
    return var / len(classes) + dis + 0.001 * sum(norm(mean) for mean in means) / len(classes)


def assert_is_the_definition(features, target):
    loss, expected = category_consistent_loss(features, target, K), by_definition(features, target)
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(loss, expected, {"features": features})
    return loss


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_papers(seed):
    features, target = random_case(seed=seed)
    assert_is_the_definition(features, target)
    distances = torch.cat([
        (x := features.detach().movedim(1, -1)[target == c]).sub(x.mean(0)).norm(dim=1) for c in range(K)
    ])  # fmt: skip
    for part in (distances < 0.5, (distances > 0.5) & (distances < 1.5), distances > 1.5):
        assert part.any()


def test_classes_that_are_absent_alone_or_of_one_pixel():
    features, target = random_case()
    target[target == 3] = 255
    assert_is_the_definition(features, target)  # one is absent
    target[target == 2] = 1
    target[0, 0, 0] = 2
    assert_is_the_definition(features, target)  # one has one pixel, at distance 0
    target[target != 255] = 4
    assert_is_the_definition(features, target)  # there is one only
    target[:] = 255
    target[1, 2, 3] = 0
    assert_is_the_definition(features, target)  # of one pixel
    features.data[:] = 0
    target[0, 1] = 1
    loss = assert_is_the_definition(features, target)  # all distances are 0
    assert loss.item() == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_void_alone_gives_zero_and_16_bits_are_computed_in_float32(dtype):
    features, target = random_case()
    features = features.detach().to(dtype).requires_grad_()
    loss = category_consistent_loss(features, target, K)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), by_definition(features.double(), target))
    loss = category_consistent_loss(features, torch.full_like(target, 255), K)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize(("length", "shrunk"), [(41, 6), (57, 8), (769, 97), (24, 3), (9, 1), (4, 4)])
def test_labels_are_those_nearest_to_the_features(length, shrunk):
    step = (length - 1) / max(shrunk - 1, 1)
    rows = [int(i * step + 0.5) for i in range(shrunk)]
    target = torch.randint(K, (1, length, 2), dtype=torch.uint8)
    features = torch.randn(1, 3, shrunk, 2, dtype=torch.float64)
    expected = category_consistent_loss(features, target[:, rows], K)
    assert torch.equal(category_consistent_loss(features, target, K), expected)


def preds_of(features):
    n, _, h, w = features.shape
    return [*torch.randn(2, n, K, h, w, dtype=torch.float64), features]


@pytest.mark.parametrize("criterion", [CriterionDSN(), CriterionOhemDSN(0.7, 64)])
def test_it_is_added_to_the_other_losses(criterion, no_host_copies):
    features, target = random_case()
    preds = preds_of(features)
    losses = criterion.losses(preds, target)
    torch.testing.assert_close(losses.ccl, category_consistent_loss(features, target, K))
    torch.testing.assert_close(losses.total, criterion(preds[:2], target) + losses.ccl)
    assert criterion.losses(preds[:2], target).stacked().shape == (3,)
    with no_host_copies:
        criterion(preds, target).backward()
    criterion.to("meta")([pred.detach().to("meta") for pred in preds], target.to("meta"))


def sharded_worker(rank):
    """Its part of a batch of 3 images, against the whole batch in one process."""
    part = BatchShard(shard(3, rank, 2), 3)
    for void in (0.1, 1.1):
        features, target = random_case(n=3, void=void)
        target[0][target[0] == 3] = 255  # absent from the first process
        images = slice(part.images.start, part.images.stop)
        mine = features.detach()[images].requires_grad_()
        loss = category_consistent_loss(mine, target[images], K, shard=part)
        expected = category_consistent_loss(features, target, K)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, expected.detach())
        (gradient,), (whole,) = torch.autograd.grad(loss, mine), torch.autograd.grad(expected, features)
        torch.testing.assert_close(gradient / 2, whole[images])


@pytest.mark.slow
def test_2_processes_have_the_loss_of_one(tmp_path):
    distributed_processes(sharded_worker, tmp_path, 2)  # an error if one of them fails


# ---- the network ----


@pytest.mark.parametrize("head", ["rcca", "nonlocal"])
def test_features_are_of_the_attentions_result_and_of_training_alone(head):
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=3, head=head, ccl=True)
    torch.manual_seed(0)
    without = build_model("resnet18", num_classes=3, head=head)
    state = model.state_dict()
    assert state.keys() - without.state_dict().keys() == {"ccl.weight", "ccl.bias"}
    assert all(torch.equal(state[name], tensor) for name, tensor in without.state_dict().items())
    images, kept = torch.randn(2, 3, 33, 41), []
    model.head.convb.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    main, auxiliary, features = model.eval()(images)
    assert torch.equal(features, torch.nn.functional.conv2d(kept[0], state["ccl.weight"], state["ccl.bias"]))
    assert features.shape == (2, 16, 5, 6)
    for actual, expected in zip((main, auxiliary), without.eval()(images), strict=True):
        assert torch.equal(actual, expected)
    prediction = PredictionNetwork(model)
    assert len(prediction(images)) == 1
    assert not any("ccl" in name for name in prediction.state_dict())


def test_only_heads_that_attend_have_them():
    with pytest.raises(ValueError, match="ccl: expected a head that attends, rcca or nonlocal, got psp"):
        build_model("resnet18", head="psp", ccl=True)
    with pytest.raises(ValueError, match="ccl: expected True or False, got 1"):
        NetworkConfig(ccl=1)


def test_a_state_dict_loads_with_and_without(tmp_path):
    states = {ccl: build_model("resnet18", ccl=ccl).state_dict() for ccl in (True, False)}
    for as_start in (False, True):
        assert load_state(build_model("resnet18"), states[True], "x.pth", as_start=as_start) == []
        left_out = load_state(build_model("resnet18", ccl=True), states[False], "x.pth", as_start=as_start)
        assert left_out == ["ccl.bias", "ccl.weight"]
    model = build_model("resnet18", ccl=True)
    assert load_state(model, states[True], "x.pth") == []
    assert_bitwise_equal(model.state_dict(), states[True])
    for ccl, state in states.items():
        assert find_network(tmp_path / "x.pth", state).config.ccl is ccl


# ---- the scripts ----


def losses(folder):
    return {v.tag: v.simple_value for event in events(folder) for v in event.summary.value if v.tag.startswith("loss/")}


def test_it_trains_resumes_and_evaluates(scenes, tmp_path, capsys):
    flags = ["--ccl", "--print-frequency", 1, "--amp", "bf16", "--accumulate", 2, "--batch-size", 4, "--num-steps"]
    assert trained(scenes, tmp_path, *flags, 1) == 0
    assert "stem conv3x3, category consistent loss, on cpu" in capsys.readouterr().out
    logged = losses(tmp_path)
    assert logged["loss/ccl"] > 0
    assert logged["loss/total"] == pytest.approx(
        logged["loss/main"] + 0.4 * logged["loss/auxiliary"] + logged["loss/ccl"], rel=1e-5
    )
    assert json.loads(network_path(tmp_path).read_text())["ccl"] is True
    path = tmp_path / "CS_scenes_1.pth"
    before = weights(tmp_path, 1)
    assert find_network(path, read_state_dict(path)).config.ccl
    assert trained(scenes, tmp_path, *flags[1:], 2, "--resume") == 0  # network.json says it
    assert not torch.equal(weights(tmp_path, 2)["ccl.weight"], before["ccl.weight"])
    assert evaluated(scenes, tmp_path) == 0
    assert load_model(path).network.ccl is not None
    capsys.readouterr()
    assert trained(scenes, tmp_path, *flags[1:], 2, "--resume", "--no-ccl") == 2
    assert "--ccl: was True, is False" in capsys.readouterr().err


def test_it_begins_and_ends_with_a_training(scenes, tmp_path, capsys):
    assert trained(scenes, tmp_path / "off", "--num-steps", 0) == 0
    start = ["--num-steps", 0, "--restore-from"]
    assert trained(scenes, tmp_path / "on", *start, tmp_path / "off/CS_scenes_0.pth", "--ccl", "--ft") == 0
    assert "loaded without ccl.bias, ccl.weight, which begin anew" in capsys.readouterr().out
    on = tmp_path / "on/CS_scenes_0.pth"
    for name, flags, ccl in (
        ("kept", [], True), ("no", ["--no-ccl"], False), ("psp", ["--head", "psp"], False),
    ):  # fmt: skip
        assert trained(scenes, tmp_path / name, *start, on, *flags) == 0
        assert read_network(tmp_path / name).config.ccl is ccl
        assert ("ccl.weight" in weights(tmp_path / name, 0)) is ccl
    capsys.readouterr()
    assert trained(scenes, tmp_path / "none", *start, on, "--head", "psp", "--ccl") == 2
    assert "--ccl: expected it with --head rcca or nonlocal, got psp" in capsys.readouterr().err


def test_a_network_json_from_before_has_none(scenes, tmp_path):
    assert trained(scenes, tmp_path) == 0
    path = network_path(tmp_path)
    description = json.loads(path.read_text())
    del description["ccl"]
    path.write_text(json.dumps(description))
    assert read_network(tmp_path).config.ccl is False
