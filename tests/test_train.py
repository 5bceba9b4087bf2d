"""train.py: what its flags do, what it writes, its errors, and resuming after being killed."""

import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import ROOT, run_script
from tensorboardX.proto import event_pb2

import evaluate
import train
from dataset import CITYSCAPES, scan
from libs import ABN
from networks import BatchDropout2d, NetworkConfig, build_model
from utils.commandline import CommandError, find_items, with_network
from utils.criterion import CriterionDSN, CriterionOhemDSN
from utils.distributed import World
from utils.divergence import check_weights
from utils.launch import launch
from utils.network_file import network_path, read_network
from utils.training import Part, TrainingStep, make_optimizer, poly_learning_rate

SMALL = [
    "--backbone",
    "resnet18",
    "--input-size",
    "24,32",
    "--batch-size",
    "2",
    "--num-workers",
    "0",
    "--device",
    "cpu",
]


def parse(scenes, snapshots, *flags):
    return train.parse_flags(["--data-dir", str(scenes), "--snapshot-dir", str(snapshots), *SMALL, *map(str, flags)])


def run_training(scenes, snapshots, *flags):
    return launch(train.train, parse(scenes, snapshots, *flags))


def weights(snapshots, step):
    return torch.load(Path(snapshots) / f"CS_scenes_{step}.pth", weights_only=True)


def assert_bitwise_equal(a, b):
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing


def events(folder):
    """All events in a folder's TensorBoard files, in order."""
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_schedule():
    assert poly_learning_rate(0.01, 0, 100, 0.9) == 0.01
    assert poly_learning_rate(0.01, 75, 100, 0.9) == pytest.approx(0.01 * 0.25**0.9)


def test_defaults_are_the_originals():
    args = with_network(train.get_parser().parse_args(["--classes", "cityscapes"]), None)
    expected = {
        "batch_size": 8, "ignore_label": 255, "input_size": (769, 769), "learning_rate": 1e-2, "momentum": 0.9,
        "not_restore_last": False, "num_classes": 19, "start_iters": 0, "num_steps": 40000, "power": 0.9,
        "random_mirror": False, "random_scale": False, "snapshot_dir": Path("snapshots"), "weight_decay": 5e-4,
        "ohem": False, "ohem_thres": 0.6, "ohem_keep": 200000, "ft": False, "backbone": "resnet101", "recurrence": 2,
        "data_dir": Path("cityscapes"),
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(("text", "value"), [([], True), (["1"], True), (["0"], False), (["false"], False)])
def test_ohem_can_be_turned_on_and_off(text, value):
    assert train.get_parser().parse_args(["--ohem", *text]).ohem is value


@pytest.mark.parametrize(("text", "value"), [([], True), (["0.5,2.0"], (0.5, 2.0)), (["0.7,2.1"], True)])
def test_scales_are_those_of_the_recipe_or_given(text, value):
    assert train.get_parser().parse_args(["--random-scale", *text]).random_scale == value


def test_it_trains_and_logs(scenes, tmp_path, capsys):
    flags = ["--num-steps", 4, "--print-frequency", 2, "--save-pred-every", 3, "--random-mirror", "--random-scale"]
    assert run_training(scenes, tmp_path, *flags) == 0
    assert {path.name for path in tmp_path.glob("*.pth")} == {
        f"CS_scenes_{step}{suffix}.pth" for step in (3, 4) for suffix in ("", ".training")
    }
    model = build_model("resnet18")
    before = model.conv1.weight.detach().clone()
    model.load_state_dict(weights(tmp_path, 4))
    assert not torch.equal(before, model.conv1.weight)
    output = capsys.readouterr()
    assert "4/4" in output.err
    assert re.search(r"loss \d+\.\d+, lr \d\.\d+e-\d+, \d+\.\d+ images/s", output.err)
    scalars, pictures = {}, {}
    for event in events(tmp_path):
        for value in event.summary.value:
            if value.WhichOneof("value") == "image":
                pictures.setdefault(event.step, []).append((value.tag, value.image.height, value.image.width))
            else:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    assert set(scalars) == {"learning_rate", "loss/total", "loss/main", "loss/auxiliary", "images_per_second"}
    assert set(scalars["loss/total"]) == {2, 3, 4}
    assert scalars["learning_rate"][2] == pytest.approx(poly_learning_rate(1e-2, 1, 4, 0.9))
    for step, total in scalars["loss/total"].items():
        assert total == pytest.approx(scalars["loss/main"][step] + 0.4 * scalars["loss/auxiliary"][step], rel=1e-5)
    assert set(pictures) == {3, 4}
    assert [(height, width) for _, height, width in pictures[3]] == [(24, 3 * 32)] * 2


def test_the_same_seed_gives_the_same_weights_and_another_others(scenes, tmp_path):
    flags = ["--num-steps", 2, "--random-mirror", "--random-scale"]
    for folder, extra in (("a", []), ("b", ["--num-workers", 2]), ("c", ["--random-seed", 9])):
        assert run_training(scenes, tmp_path / folder, *flags, *extra) == 0
    assert_bitwise_equal(weights(tmp_path / "a", 2), weights(tmp_path / "b", 2))
    assert not torch.equal(weights(tmp_path / "a", 2)["conv1.weight"], weights(tmp_path / "c", 2)["conv1.weight"])


def test_a_resumed_run_equals_an_uninterrupted_one(scenes, tmp_path, monkeypatch):
    """A run that is stopped by SIGTERM after its third step, against one that is not."""
    flags = ["--num-steps", 6, "--random-mirror", "--random-scale", "--ohem", "--ohem-keep", "640"]
    flags += ["--random-rotate", 10, "--color-jitter", "0.4,0.4,0.4,0.1", "--ccl"]
    assert run_training(scenes, tmp_path / "through", *flags) == 0

    real = train.poly_learning_rate

    def stopping(base, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(base, step, *rest)

    monkeypatch.setattr(train, "poly_learning_rate", stopping)
    assert run_training(scenes, tmp_path / "stopped", *flags) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert run_training(scenes, tmp_path / "stopped", *flags, "--resume") == 0
    assert (tmp_path / "stopped" / "CS_scenes_3.pth").exists()
    assert_bitwise_equal(weights(tmp_path / "through", 6), weights(tmp_path / "stopped", 6))
    before = (tmp_path / "stopped" / "CS_scenes_6.pth").stat().st_mtime_ns
    assert run_training(scenes, tmp_path / "stopped", *flags, "--resume") == 0  # done already
    assert (tmp_path / "stopped" / "CS_scenes_6.pth").stat().st_mtime_ns == before


def at_step(step, action):
    """Code that does `action` when training computes the given step's learning rate."""
    return f"""
real = train.poly_learning_rate
def acting(base, step, *rest):
    if step == {step}:
        {action}
    return real(base, step, *rest)
train.poly_learning_rate = acting
"""


@pytest.mark.slow
def test_killed_at_a_random_step_and_started_again_gives_the_same_bits(scenes, tmp_path):
    flags = ["--num-steps", 10, "--save-pred-every", 3, "--random-mirror", "--random-scale", "--num-workers", 2]
    assert run_training(scenes, tmp_path / "through", *flags) == 0
    step = random.Random().randrange(3, 10)
    print(f"killed at step {step}")
    kill = at_step(step, "os.killpg(0, signal.SIGKILL)")
    run = ["--data-dir", scenes, "--snapshot-dir", tmp_path / "killed", *SMALL, *flags]
    assert run_script("train", run, code=kill).returncode == -signal.SIGKILL
    again = run_script("train", [*run, "--resume"])
    assert again.returncode == 0, again.stderr
    assert f"steps {step // 3 * 3} to 10" in again.stdout
    assert_bitwise_equal(weights(tmp_path / "through", 10), weights(tmp_path / "killed", 10))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_process_group_saves_before_it_ends(scenes, tmp_path, name):
    """As Ctrl-C, timeout and cluster schedulers send it: the data-loading workers get it as well."""
    signal_group = at_step(2, f"os.killpg(0, signal.{name})")
    flags = ["--data-dir", scenes, "--snapshot-dir", tmp_path, *SMALL, "--num-steps", 50, "--num-workers", 2]
    done = run_script("train", flags, code=signal_group)
    assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert f"stopped by {name} at step 3" in done.stdout
    assert "Traceback" not in done.stderr
    assert (tmp_path / "CS_scenes_3.training.pth").exists()


def test_a_folder_with_a_run_is_not_written_over_and_other_flags_are_refused(scenes, tmp_path, capsys):
    assert run_training(scenes, tmp_path, "--num-steps", 1) == 0
    assert run_training(scenes, tmp_path, "--num-steps", 1) == 2
    assert f"--snapshot-dir {tmp_path}: holds a run at step 1; add --resume" in capsys.readouterr().err
    assert run_training(scenes, tmp_path, "--num-steps", 0, "--weight-decay", 0.1, "--resume") == 2
    message = capsys.readouterr().err
    assert "--num-steps: was 1, is 0" in message
    assert "--weight-decay: was 0.0005, is 0.1" in message


def test_a_run_from_before_a_flag_existed_has_its_default(scenes, tmp_path, capsys):
    assert run_training(scenes, tmp_path, "--num-steps", 1) == 0
    path = tmp_path / "CS_scenes_1.training.pth"
    training = torch.load(path, weights_only=True)
    del training["flags"]["backbone_activation"]
    torch.save(training, path)
    assert run_training(scenes, tmp_path, "--num-steps", 1, "--resume") == 0
    network_path(tmp_path).unlink()  # which did not exist yet either
    assert run_training(scenes, tmp_path, "--num-steps", 1, "--resume", "--backbone-activation", "leaky_relu") == 2
    assert "--backbone-activation: was identity, is leaky_relu" in capsys.readouterr().err


def test_scales_stay_as_they_were(scenes, tmp_path, capsys):
    """Snapshots hold True for the recipe's, as they did when there were no others."""
    run = [scenes, tmp_path, "--num-steps", 0]
    assert run_training(*run, "--random-scale") == 0
    training = torch.load(tmp_path / "CS_scenes_0.training.pth", weights_only=True)
    assert training["flags"]["random_scale"] is True
    assert run_training(*run, "--random-scale", "--resume") == 0
    message = failing(*run[:2], capsys, *run[2:], "--random-scale", "0.5,2.0", "--resume")
    assert "--random-scale: was True, is (0.5, 2.0)" in message


def test_network_json_is_beside_the_snapshots_and_goes_with_the_run(scenes, tmp_path, capsys):
    run = [scenes, tmp_path, "--num-steps", 0, "--input-size", "16,16"]
    assert run_training(*run, "--backbone-activation", "leaky_relu", "--recurrence", 1) == 0
    assert read_network(tmp_path)[:2] == (NetworkConfig("resnet18", "leaky_relu", 1), CITYSCAPES)
    assert run_training(*run, "--resume") == 0  # what is not given is as it says
    message = failing(*run[:2], capsys, *run[2:], "--resume", "--backbone-activation", "identity")
    assert (
        f"error: --backbone-activation identity: the weights are of leaky_relu, as {network_path(tmp_path)} says"
        in message
    )
    assert "--recurrence: was 1, is 2" in failing(*run[:2], capsys, *run[2:], "--resume", "--recurrence", 2)
    begin = ["--restore-from", tmp_path / "CS_scenes_0.pth"]
    assert run_training(scenes, tmp_path / "next", *run[2:], *begin, "--recurrence", 2) == 0
    assert read_network(tmp_path / "next")[:2] == (NetworkConfig("resnet18", "leaky_relu", 2), CITYSCAPES)
    network_path(tmp_path).write_text("{}")
    assert f"{network_path(tmp_path)}: expected the keys" in failing(*run[:2], capsys, *run[2:], "--resume")


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_weights_without_a_training_state_are_not_trained_over(scenes, tmp_path, capsys, resume):
    weights_file = tmp_path / "CS_scenes_5.pth"
    weights_file.write_bytes(b"weights")
    message = failing(scenes, tmp_path, capsys, *resume)
    assert f"--snapshot-dir {tmp_path}: holds CS_scenes_5.pth but no CS_scenes_5.training.pth" in message
    assert f"give --restore-from {weights_file} and another --snapshot-dir" in message
    assert [path.name for path in tmp_path.iterdir()] == ["CS_scenes_5.pth"]
    (tmp_path / ".writing-x").write_text("")  # as a process leaves it that was killed between its first two files
    assert run_training(scenes, tmp_path, "--num-steps", 0, *resume) == 0
    assert not (tmp_path / ".writing-x").exists()


def test_a_finished_run_is_extended(scenes, tmp_path, capsys):
    size = ["--input-size", "16,16"]
    assert run_training(scenes, tmp_path, *size, "--num-steps", 2) == 0
    assert run_training(scenes, tmp_path, *size, "--num-steps", 4, "--resume") == 0
    output = capsys.readouterr().out
    rate = poly_learning_rate(1e-2, 2, 4, 0.9)
    assert "--num-steps 4: was 2; the schedule is stretched over all of them" in output
    assert f"at step 2 is {rate:.3g} and not 0;" in output
    rates = {event.step: value.simple_value for event in events(tmp_path) for value in event.summary.value
             if value.tag == "learning_rate"}  # fmt: skip
    assert rates[4] == pytest.approx(poly_learning_rate(1e-2, 3, 4, 0.9))
    assert "--num-steps: was 4, is 3" in failing(scenes, tmp_path, capsys, *size, "--num-steps", 3, "--resume")


def test_numbers_have_bounds():
    """Of every flag that takes one, in both scripts."""
    for parser in (train.get_parser(), evaluate.get_parser()):
        for action in parser._actions:
            if getattr(action.type, "__name__", "") == "parse":
                for text in ("1e40", "9" * 40, "nan", "inf", "-1"):
                    with pytest.raises(ArgumentTypeError):
                        action.type(text)
            assert action.type not in (int, float), action.dest


def test_a_batch_that_no_memory_holds_is_refused(scenes, tmp_path, capsys):
    message = failing(scenes, tmp_path, capsys, "--batch-size", 65536, "--input-size", "32768,32768")
    assert (
        "--batch-size 65536: 65536 images of 32768x32768 are 851968 GiB, expected less than this machine's" in message
    )


def test_no_steps_save_the_network_as_it_is(scenes, tmp_path):
    assert run_training(scenes, tmp_path, "--num-steps", 0) == 0
    torch.manual_seed(12345)
    assert_bitwise_equal(weights(tmp_path, 0), build_model("resnet18").state_dict())


def statistics(state):
    return {name: tensor for name, tensor in state.items() if "running" in name}


def test_is_training_and_ft_decide_over_the_statistics(scenes, tmp_path):
    assert run_training(scenes, tmp_path / "0", "--num-steps", 0) == 0
    start = weights(tmp_path / "0", 0)
    for name, flags, frozen in (("a", [], False), ("b", ["--no-is-training"], True), ("c", ["--ft"], True)):
        flags += ["--restore-from", tmp_path / "0" / "CS_scenes_0.pth", "--num-steps", 1]
        assert run_training(scenes, tmp_path / name, *flags) == 0
        after = weights(tmp_path / name, 1)
        assert all(torch.equal(start[key], after[key]) for key in statistics(start)) is frozen
        assert not torch.equal(start["layer1.0.bn1.weight"], after["layer1.0.bn1.weight"])


def test_ft_trains_on_trainval(scenes, tmp_path):
    for flags, count in (([], 6), (["--ft"], 9), (["--ft", "--split", "val"], 3)):
        args = parse(scenes, tmp_path, *flags)
        assert len(find_items(args, train.training_split(args), need_labels=True)) == count


def test_restore_from_not_restore_last_and_start_iters(scenes, tmp_path):
    torch.manual_seed(4)
    source = build_model("resnet18", num_classes=25)
    torch.save(source.state_dict(), tmp_path / "25.pth")
    flags = ["--restore-from", tmp_path / "25.pth", "--not-restore-last", "--start-iters", 3, "--num-steps", 3]
    assert run_training(scenes, tmp_path / "out", *flags) == 0
    after = weights(tmp_path / "out", 3)
    assert torch.equal(after["head.conva.0.weight"], source.state_dict()["head.conva.0.weight"])
    assert after["dsn.3.bias"].shape == (19,)


def one_step(scenes, folder, *flags):
    assert run_training(scenes, folder, "--num-steps", 1, *flags) == 0
    return weights(folder, 1)


@pytest.fixture(scope="module")
def plain_step(scenes, tmp_path_factory):
    """The weights after a step with no other flags."""
    return one_step(scenes, tmp_path_factory.mktemp("plain"))


def test_no_step_waits_for_the_device_unless_it_is_logged(scenes, tmp_path, monkeypatch, no_host_copies):
    seen, step_done, read_losses = [], train.TrainingStep.__call__, train.PendingLosses.drain

    def guarded(self, parts):
        with no_host_copies:
            return step_done(self, parts)

    def reading(self):
        records = read_losses(self)
        seen.append([record.step for record in records])
        return records

    monkeypatch.setattr(train.TrainingStep, "__call__", guarded)
    monkeypatch.setattr(train.PendingLosses, "drain", reading)
    assert run_training(scenes, tmp_path, "--num-steps", 5, "--print-frequency", 3, "--ohem") == 0
    assert seen == [[1, 2, 3], [4, 5]]


def test_importing_the_scripts_parses_nothing(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somebody-elses-program", "--their-flag"])
    for name in ("train", "evaluate"):
        importlib.reload(importlib.import_module(name))


def test_files_are_always_loaded_without_running_code():
    for path in ROOT.rglob("*.py"):
        if ".venv" not in path.parts and path.parent != Path(__file__).parent:
            for call in re.findall(r"torch\.load\([^\n]*", path.read_text()):
                assert "weights_only=True" in call, path


@pytest.mark.parametrize(
    "flags",
    [
        ["--learning-rate", 0.1], ["--weight-decay", 0.3], ["--ohem", "1", "--ohem-keep", 64, "--ohem-thres", 0.01],
        ["--random-mirror"], ["--random-scale"], ["--batch-size", 3], ["--input-size", "40,40"], ["--recurrence", 0],
        ["--split", "val"], ["--random-seed", 1], ["--initial-gamma", 0.5], ["--random-rotate", 20],
        ["--color-jitter", "0.4,0.4,0.4,0.1"], ["--class-weights", "balanced"],
    ],
)  # fmt: skip
def test_flags_change_what_is_learnt(scenes, tmp_path, plain_step, flags):
    # Of R only gamma's gradient depends in the first step, since gamma starts at 0.
    key = "head.cca.gamma" if flags[0] == "--recurrence" else "conv1.weight"
    assert not torch.equal(plain_step[key], one_step(scenes, tmp_path, *flags)[key])


def test_every_flag_is_read():
    source = "".join(
        (ROOT / name).read_text()
        for name in ("train.py", "utils/commandline.py", "utils/launch.py", "utils/resuming.py")
    )
    for action in train.get_parser()._actions:
        if action.dest not in ("help", *asdict(NetworkConfig())):  # those, by network_config
            assert re.search(rf"args\.{action.dest}\b", source), action.dest


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(scenes, tmp_path, amp):
    """The weights stay float32, and the state of the gradient scaler is saved and restored."""
    flags = ["--input-size", "16,16", "--num-steps", 2, "--amp", amp, "--save-pred-every", 1, "--keep", 1]
    assert run_training(scenes, tmp_path, *flags, "--clip-grad-norm", 10) == 0
    assert [path.name for path in sorted(tmp_path.glob("*.pth"))] == ["CS_scenes_2.pth", "CS_scenes_2.training.pth"]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights(tmp_path, 2).values())
    scaler = torch.load(tmp_path / "CS_scenes_2.training.pth", weights_only=True)["scaler"]
    assert (0 < scaler["scale"] <= 65536) if amp == "fp16" else not scaler
    assert run_training(scenes, tmp_path, *flags, "--clip-grad-norm", 10, "--resume") == 0


def test_a_gradient_too_large_for_float16_is_left_out(scenes):
    """By the scaler, which lowers its scale; weights and momentum stay as they are."""
    model, world = build_model("resnet18"), World(torch.device("cpu"))
    optimizer = make_optimizer(model, 0.1, 0.9, 0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e30)
    step = TrainingStep(model, CriterionDSN(), optimizer, scaler, world, "fp16", skip_nonfinite=True)
    part = Part(torch.randn(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.uint8), ["a", "b"])
    before = model.conv1.weight.detach().clone()
    assert not step([part]).skipped
    assert torch.equal(model.conv1.weight, before)
    assert all((state["momentum_buffer"] == 0).all() for state in optimizer.state.values())
    assert scaler.get_scale() < 1e30


@pytest.mark.parametrize(
    "criterion", [CriterionDSN(), CriterionOhemDSN(0.1, 640, weight=torch.linspace(0.1, 2, 19).double())]
)
def test_accumulated_gradients_are_the_mean_of_the_parts(criterion):
    model, world = build_model("resnet18").double().eval(), World(torch.device("cpu"))
    model.train().apply(lambda module: module.eval() if isinstance(module, (ABN, BatchDropout2d)) else None)
    images, labels = torch.randn(4, 3, 24, 24).double(), torch.randint(0, 19, (4, 24, 24))
    expected = sum(criterion(model(images[i : i + 2]), labels[i : i + 2]) for i in (0, 2)) / 2
    names = [name for name, parameter in model.named_parameters() if "cca." not in name or "gamma" in name]
    gradients = torch.autograd.grad(expected, [model.get_parameter(name) for name in names])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = TrainingStep(model, criterion, optimizer, torch.amp.GradScaler("cpu", enabled=False), world)
    outcome = step([Part(images[i : i + 2], labels[i : i + 2], []) for i in (0, 2)])
    torch.testing.assert_close(outcome.losses[0].double(), expected.detach(), rtol=1e-6, atol=0)
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=lambda text, name=name: name + text)


def test_the_optimizer_is_sgd():
    """On channels_last weights too, whose momentum has to have their layout."""
    networks = [build_model("resnet18").to(memory_format=torch.channels_last) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    plain = torch.optim.SGD(networks[0].parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for model, optimizer in zip(networks, (plain, make_optimizer(networks[1], 0.1, 0.9, 0.1)), strict=True):
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = parameter.detach().sin()
            optimizer.step()
    for (name, one), other in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: name + text)
        for tensor in (other, other.grad, optimizer.state[other]["momentum_buffer"]):
            assert tensor.shape == one.shape
            assert tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last), name


def nan_in_step(monkeypatch, number):
    """Makes a pixel of the last image of that step's batch NaN; the batch is one part."""
    made = []

    def part(images, labels, names):
        made.append(names)
        if len(made) == number:
            images[-1, 0, 0, 0] = torch.nan
        return Part(images, labels, names)

    monkeypatch.setattr(train, "Part", part)
    return made


@pytest.mark.parametrize("frequency", [1, 100])
def test_a_loss_that_is_not_finite_is_blamed_on_its_step(scenes, tmp_path, capsys, monkeypatch, frequency):
    made = nan_in_step(monkeypatch, 3)
    flags = ["--num-steps", 8, "--save-pred-every", 2, "--print-frequency", frequency]
    message = failing(scenes, tmp_path, capsys, *flags)
    assert f"the loss is nan at step 3, of the images {', '.join(made[2])}; the last good snapshot: " in message
    assert f"{tmp_path / 'CS_scenes_2.pth'}; training has diverged" in message


def test_a_skipped_step_leaves_the_network_as_it_was(scenes, tmp_path, capsys, monkeypatch):
    """Statistics included: as if the step's image had not been there."""
    made = nan_in_step(monkeypatch, 3)
    flags = ["--num-steps", 3, "--save-pred-every", 1, "--skip-nonfinite"]
    assert run_training(scenes, tmp_path, *flags) == 0
    assert f"of the images {', '.join(made[2])} (1 skipped)" in "".join(capsys.readouterr())
    assert_bitwise_equal(weights(tmp_path, 2), weights(tmp_path, 3))


def test_a_damaged_snapshot_is_refused_and_the_one_before_it_used(scenes, tmp_path, capsys):
    flags = ["--num-steps", 3, "--save-pred-every", 1]
    assert run_training(scenes, tmp_path, *flags) == 0
    expected = weights(tmp_path, 3)
    path = tmp_path / "CS_scenes_3.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run_training(scenes, tmp_path, *flags, "--resume") == 0
    output = capsys.readouterr()
    assert re.search(r"warning: \S+CS_scenes_3.pth: .*damaged.*; resuming from step 2 instead", output.err)
    assert "steps 2 to 3" in output.out
    assert_bitwise_equal(weights(tmp_path, 3), expected)


def test_fine_tuning_begins_with_a_trained_network_and_a_low_rate(scenes, tmp_path, capsys):
    assert train.parse_flags(["--ft"]).learning_rate == 1e-3
    assert train.parse_flags(["--ft", "--learning-rate", "1e-4"]).learning_rate == 1e-4
    assert "--ft: expected --restore-from" in failing(scenes, tmp_path, capsys, "--ft")
    backbone = {name: tensor for name, tensor in build_model("resnet18").state_dict().items() if "head" not in name}
    torch.save({name: tensor for name, tensor in backbone.items() if "dsn" not in name}, tmp_path / "imagenet.pth")
    message = failing(scenes, tmp_path, capsys, "--ft", "--restore-from", tmp_path / "imagenet.pth")
    assert "read as a whole network, it does not fit" in message


# ---- errors: one message, no stack trace


def failing(scenes, snapshots, capsys, *flags):
    assert run_training(scenes, snapshots, *flags) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_no_data(tmp_path, capsys):
    message = failing(tmp_path / "nowhere", tmp_path, capsys)
    assert message.startswith(f"error: {tmp_path / 'nowhere'}: expected a data set in one of these layouts")
    assert "leftImg8bit/<split>/<city>/" in message
    assert "nowhere does not exist" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_in_the_middle_of_training(scenes, tmp_path, capsys, workers):
    shutil.copytree(scenes, tmp_path / "data")
    for item in scan(tmp_path / "data", "train")[1:]:  # the first one is looked at before training
        Image.fromarray(np.full((48, 64), 77, np.uint8)).save(item.label)
    message = failing(tmp_path / "data", tmp_path / "out", capsys, "--num-workers", workers)
    assert re.search(
        r"error: \S+_gtFine_labelIds.png: expected label ids 0..33 and -1 \(255\) of cityscapes, found 77", message
    )


def test_checkpoints_that_do_not_do(scenes, tmp_path, capsys):
    path = tmp_path / "x.pth"
    out = tmp_path / "out"
    assert "x.pth: expected a checkpoint, there is no such file" in failing(scenes, out, capsys, "--restore-from", path)
    path.write_text("no checkpoint")
    assert "x.pth: expected a checkpoint, cannot read it" in failing(scenes, out, capsys, "--restore-from", path)
    torch.save(build_model("resnet18", num_classes=20).state_dict(), path)
    message = failing(scenes, out, capsys, "--restore-from", path, "--ft")  # otherwise these layers begin anew
    assert "--classes cityscapes: has 19 classes, and the weights 20, as the shapes in" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input-size", "769"], "argument --input-size: expected height,width in pixels"),
        (["--input-size", "a,b"], "argument --input-size: expected height,width in pixels"),
        (["--input-size", "0,100"], "argument --input-size: expected at least 8,8"),
        (["--batch-size", "0"], "argument --batch-size: expected 1 to 65536, got '0'"),
        (["--learning-rate", "fast"], "argument --learning-rate: expected float, got 'fast'"),
        (["--ohem", "maybe"], "argument --ohem: expected 1 or 0"),
        (["--random-scale", "0.5"], "argument --random-scale: expected LOW,HIGH (e.g. 0.5,2.0), got '0.5'"),
        (["--random-scale", "0.55,2"], "argument --random-scale: expected LOW,HIGH, multiples of 0.1 with 0.1 <= LOW"),
        (["--num-classes", "0"], "argument --num-classes: expected 1 to 65535"),
        (["--ignore-label", "0"], "argument --ignore-label: expected 1 to 65535"),
        (["--classes", "cityscape"], "argument --classes: cityscape: expected a class table: ade20k, camvid, citys"),
        (["--backbone", "vgg"], "argument --backbone: invalid choice"),
        (["--color-jitter", "0.4,0.4"], "argument --color-jitter: expected the numbers BRIGHTNESS,CONTRAST,"),
        (["--color-jitter", "0,0,0,0.6"], "argument --color-jitter: expected HUE from 0 to 0.5, got 0.6 in '0,0"),
        (["--recurence", "2"], "unrecognized arguments: --recurence"),
    ],
)
def test_wrong_flags(capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        train.get_parser().parse_args(flags)
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.endswith(" --help lists all flags)\n")


def test_the_label_of_void_is_no_class(scenes, tmp_path, capsys):
    message = failing(scenes, tmp_path, capsys, "--ignore-label", 18)
    assert "--ignore-label 18: expected 19 to 255, no label of the 19 classes" in message
    message = failing(scenes, tmp_path, capsys, "--num-classes", 25)
    assert "--num-classes 25: the class table cityscapes has 19 classes" in message


def test_wrong_devices(scenes, tmp_path, capsys):
    assert "--gpu 0: cannot go with --device cpu" in failing(scenes, tmp_path, capsys, "--gpu", 0)
    count = torch.cuda.device_count()
    message = failing(scenes, tmp_path, capsys, "--device", "cuda", "--gpu", count)
    assert f"expected GPUs that are there, each once, found {count}" in message
    assert "--gpu 0,x: expected indices of GPUs" in failing(
        scenes, tmp_path, capsys, "--device", "cuda", "--gpu", "0,x"
    )


def test_a_network_that_diverges_is_not_saved(scenes, tmp_path, capsys):
    flags = ["--learning-rate", 1e6, "--num-steps", 5, "--save-pred-every", 1]
    assert "training has diverged" in failing(scenes, tmp_path, capsys, *flags)
    for path in tmp_path.glob("CS_scenes_?.pth"):
        assert all(tensor.isfinite().all() for tensor in torch.load(path, weights_only=True).values())
    assert "is not finite after step 3; training has diverged" in _error(lambda: check_weights(_with_nan(), 3))


def _with_nan():
    model = torch.nn.Linear(2, 2)
    model.bias.data[1] = torch.nan
    return model


def _error(function):
    with pytest.raises(CommandError) as error:
        function()
    return str(error.value)


def test_a_file_in_the_way_of_the_snapshots_is_named(scenes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in failing(scenes, tmp_path / "file", capsys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(scenes, tmp_path):
    """It trains, and its snapshots load where there is no GPU."""
    flags = ["--device", "cuda", "--num-workers", 1, "--ohem", "--ohem-keep", 640]
    assert run_training(scenes, tmp_path, *flags, "--num-steps", 3) == 0
    assert {tensor.device.type for tensor in weights(tmp_path, 3).values()} == {"cpu"}


@pytest.mark.slow
def test_errors_of_the_real_process_are_one_message(tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", "--data-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: expected a data set in one of these layouts")
    assert "Traceback" not in done.stderr
