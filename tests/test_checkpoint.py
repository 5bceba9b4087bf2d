"""Snapshots: whole or not there, refused when they are something else, and never run as code."""

import os
import pickle
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.checkpoint import (
    CheckpointError,
    newest_snapshot,
    read_snapshot,
    read_state_dict,
    read_training,
    restore_generators,
    save_snapshot,
    snapshot_path,
    training_path,
    training_steps,
)

ROOT = Path(__file__).parent.parent


def trained(seed=0, size=4):
    torch.manual_seed(seed)
    model = nn.Linear(size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, size)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_snapshot_is_a_plain_state_dict_and_what_training_needs(tmp_path):
    model, optimizer = trained()
    path = save_snapshot(model, optimizer, tmp_path, 7, {"batch_size": 2})
    drawn = torch.rand(3)
    assert path == tmp_path / "CS_scenes_7.pth"
    plain = torch.load(path, weights_only=True)
    assert all(torch.equal(plain[name], tensor) for name, tensor in model.state_dict().items())
    training = read_training(tmp_path, 7)
    assert (training["step"], training["flags"]) == (7, {"batch_size": 2})
    momentum = training["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state_dict()["state"][0]["momentum_buffer"])
    restore_generators(training, torch.device("cpu"))
    assert torch.equal(torch.rand(3), drawn)


def test_tensors_of_a_state_dict_are_contiguous(tmp_path):
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    path = save_snapshot(model, torch.optim.SGD(model.parameters()), tmp_path, 1, {})
    saved = torch.load(path, weights_only=True)["weight"]
    assert saved.is_contiguous()
    assert torch.equal(saved, model.weight)


def test_every_state_dict_is_kept_and_two_training_states(tmp_path):
    model, optimizer = trained()
    for step in (5, 10, 100):
        save_snapshot(model, optimizer, tmp_path, step, {})
    assert training_steps(tmp_path) == [10, 100]
    assert all(snapshot_path(tmp_path, step).exists() for step in (5, 10, 100))


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept(tmp_path, keep):
    model, optimizer = trained()
    for step in (5, 10, 15, 100):
        save_snapshot(model, optimizer, tmp_path, step, {}, keep)
    names = {name(tmp_path, step) for step in (15, 100)[-keep:] for name in (snapshot_path, training_path)}
    assert set(tmp_path.iterdir()) == names


def test_at_least_one_is_kept(tmp_path):
    with pytest.raises(ValueError, match="keep: expected 1 or more, got 0"):
        save_snapshot(*trained(), tmp_path, 1, {}, keep=0)
    assert not list(tmp_path.iterdir())


def test_state_dicts_that_were_kept_go_when_fewer_are_wanted(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 3):
        save_snapshot(model, optimizer, tmp_path, step, {})
    (tmp_path / "CS_scenes_best.pth").write_text("not of this run")
    save_snapshot(model, optimizer, tmp_path, 4, {}, keep=2)
    assert sorted(path.name for path in tmp_path.glob("*")) == [
        "CS_scenes_3.pth",
        "CS_scenes_3.training.pth",
        "CS_scenes_4.pth",
        "CS_scenes_4.training.pth",
        "CS_scenes_best.pth",
    ]


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_later_snapshots_push_out_none_and_stay(tmp_path, keep):
    """A run that resumed from before snapshots that are refused."""
    model, optimizer = trained()
    save_snapshot(model, optimizer, tmp_path, 10, {}, keep)
    for step in (20, 30):
        snapshot_path(tmp_path, step).write_bytes(b"refused")
        training_path(tmp_path, step).write_bytes(b"refused")
    save_snapshot(model, optimizer, tmp_path, 12, {}, keep)
    assert training_steps(tmp_path) == ([12, 20, 30] if keep == 1 else [10, 12, 20, 30])
    assert snapshot_path(tmp_path, 30).exists()
    assert newest_snapshot(tmp_path, lambda line: None).step == 12


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_at_every_moment_one_snapshot_is_whole(tmp_path, monkeypatch, keep):
    """Also where the process dies before or after any change of the folder."""
    seen = []

    def looking(change):
        def changed(path, *arguments, **keywords):
            seen.append(newest_snapshot(tmp_path, pytest.fail).step)
            change(path, *arguments, **keywords)
            seen.append(newest_snapshot(tmp_path, pytest.fail).step)

        return changed

    model, optimizer = trained()
    save_snapshot(model, optimizer, tmp_path, 1, {}, keep)
    for method in ("replace", "unlink"):
        monkeypatch.setattr(Path, method, looking(getattr(Path, method)))
    for step in (2, 3):
        save_snapshot(model, optimizer, tmp_path, step, {}, keep)
    assert seen == sorted(seen)
    assert seen[-1] == 3


def test_the_state_of_a_gradient_scaler_is_kept(tmp_path):
    model, optimizer = trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    scaler.scale(torch.ones(1, requires_grad=True)).sum().backward()
    for _ in range(3):
        scaler.update(128.0)
    save_snapshot(model, optimizer, tmp_path, 1, {}, scaler=scaler)
    restored = torch.amp.GradScaler("cpu")
    restored.load_state_dict(read_training(tmp_path, 1)["scaler"])
    assert restored.state_dict() == scaler.state_dict()
    assert restored.get_scale() == 128.0
    save_snapshot(model, optimizer, tmp_path, 2, {})
    assert read_training(tmp_path, 2)["scaler"] is None


def test_what_a_killed_process_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".writing-abc").write_text("half")
    model, optimizer = trained()
    save_snapshot(model, optimizer, Path("."), 1, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CS_scenes_1.pth", "CS_scenes_1.training.pth"]


def test_a_full_disk_leaves_the_previous_snapshot(tmp_path):
    model, optimizer = trained(size=200)
    save_snapshot(model, optimizer, tmp_path, 1, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing beyond the limit fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        for step in (1, 2):  # the same files, and new ones
            with pytest.raises(CheckpointError, match=rf"CS_scenes_{step}.pth: cannot be written"):
                save_snapshot(model, optimizer, tmp_path, step, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_kill_while_writing_leaves_the_previous_snapshot(tmp_path, moment):
    """A process kills itself when it comes to `moment`."""
    model, optimizer = trained()
    save_snapshot(model, optimizer, tmp_path, 1, {})
    model.weight.data.zero_()

    def dying(*arguments, **keywords):
        if moment == "torch.save":
            arguments[1].write(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            module, name = moment.rsplit(".", 1)
            setattr(Path if name == "replace" else sys.modules[module], name, dying)
            save_snapshot(model, optimizer, tmp_path, 1, {})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert training_steps(tmp_path) == [1]
    assert read_state_dict(snapshot_path(tmp_path, 1))["weight"].abs().sum() > 0
    read_training(tmp_path, 1)


class _Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def test_files_that_are_no_checkpoint_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    with pytest.raises(CheckpointError, match=r"x.pth: expected a checkpoint, there is no such file"):
        read_state_dict(path)
    noise = [np.random.default_rng(seed).bytes(500) for seed in range(50)]
    for content in (b"", b"text", *noise, pickle.dumps(_Evil())):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x.pth: expected a checkpoint, cannot read it as one"):
            read_state_dict(path)
    torch.save({"weight": torch.zeros(300)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"x.pth: expected a checkpoint, cannot read it as one"):
        read_state_dict(path)
    torch.save(_Evil(), path)
    with pytest.raises(CheckpointError, match=r"x.pth: expected a checkpoint, cannot read it as one"):
        read_state_dict(path)
    with pytest.raises(CheckpointError, match="cannot read it as one"):
        read_state_dict(tmp_path)
    assert not (tmp_path / "evil-was-here").exists()


def test_other_contents_are_named(tmp_path):
    path = tmp_path / "x.pth"
    state = trained()[0].state_dict()
    for content, found in (
        (torch.zeros(3), "found Tensor"),
        ({}, "found nothing in it"),
        ({"state_dict": {}, "epoch": 3}, "found other entries: state_dict, epoch"),
        ({"model": state, "ema": {"module": state}}, "expected one state dict, found 2: model, ema.module; save one"),
        (
            trained()[0],
            r"cannot read it as one: it holds a pickled torch.nn.modules.linear.Linear, which would run code",
        ),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=found):
            read_state_dict(path)
    torch.save({"weight": torch.zeros(3)}, training_path(tmp_path, 3))
    with pytest.raises(CheckpointError, match="expected a training state of version 2, found none"):
        read_training(tmp_path, 3)


@pytest.mark.parametrize("name", ["state_dict", "model", "checkpoint.model"])
def test_the_only_state_dict_of_a_file_is_found(tmp_path, name):
    model, optimizer = trained()
    content = model.state_dict()
    for part in reversed(name.split(".")):
        content = {part: content}
    torch.save({**content, "epoch": 3, "optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()},
               tmp_path / "x.pth")  # fmt: skip
    assert equal(dict(read_state_dict(tmp_path / "x.pth")), dict(model.state_dict()))


def test_files_of_old_pytorch_are_read(tmp_path):
    path = tmp_path / "x.pth"
    state = trained()[0].state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:2] != b"PK"
    assert equal(dict(read_state_dict(path)), dict(state))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="cannot read it as one"):
        read_state_dict(path)


# ---- damaged files


def equal(a, b):
    """The same names, kinds and values, down to the bits of every tensor."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


READERS = {
    snapshot_path: lambda folder: dict(read_state_dict(snapshot_path(folder, 1))),
    training_path: lambda folder: read_training(folder, 1),
}


@pytest.fixture
def saved(tmp_path):
    """A folder with the snapshot of step 1."""
    save_snapshot(*trained(), tmp_path, 1, {"batch_size": 2, "split": None})
    return tmp_path


@pytest.mark.parametrize("name", READERS, ids=lambda name: name.__name__)
def test_a_flipped_byte_is_refused_or_makes_no_difference(saved, name):
    path, read = name(saved, 1), READERS[name]
    whole, expected = path.read_bytes(), read(saved)
    generator = np.random.default_rng(3)
    refused = 0
    for place in generator.choice(len(whole), 1000, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= generator.integers(1, 256)
        path.write_bytes(damaged)
        try:
            assert equal(read(saved), expected), f"byte {place}"
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith(str(path))  # noqa: PT017 (what is not refused is right too)
    assert refused > 200


@pytest.mark.parametrize("name", READERS, ids=lambda name: name.__name__)
def test_every_bit_of_the_tensors_counts(saved, name):
    """PyTorch itself does not look at the checksums."""
    path = name(saved, 1)
    whole = path.read_bytes()
    tensor = trained()[0].weight.detach() if name is snapshot_path else read_training(saved, 1)["cpu_generator"]
    place = whole.index(tensor.numpy().tobytes())
    for bit in range(8):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        torch.load(path, weights_only=True)
        with pytest.raises(CheckpointError, match=rf"{path.name}: .* it is damaged: wrong checksum of "):
            READERS[name](saved)


def test_a_tensor_marked_as_a_directory_is_refused(saved):
    """PyTorch reads nothing of it and returns whatever is in the memory."""
    path = snapshot_path(saved, 1)
    whole = path.read_bytes()
    entry = whole.rindex(b"PK\1\2", 0, whole.rindex(b"archive/data/0"))
    attributes = entry + 38
    path.write_bytes(whole[:attributes] + b"\x10" + whole[attributes + 1 :])
    torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match=r"damaged: archive/data/0 is marked as a directory"):
        read_state_dict(path)


@pytest.mark.parametrize("name", READERS, ids=lambda name: name.__name__)
def test_a_truncated_file_is_refused(saved, name):
    path = name(saved, 1)
    whole = path.read_bytes()
    for length in (0, 1, 2, 3, 4, 30, 100, *range(101, len(whole), 97), len(whole) - 22, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"{path.name}: expected a checkpoint, cannot read it as one: "):
            READERS[name](saved)


def test_another_state_dict_is_refused(saved):
    torch.save(trained(seed=1)[0].state_dict(), snapshot_path(saved, 1))
    read_state_dict(snapshot_path(saved, 1))
    with pytest.raises(
        CheckpointError, match=r"CS_scenes_1.pth: is not the file that CS_scenes_1.training.pth was saved with"
    ):
        read_snapshot(saved, 1)


def test_the_training_state_of_another_step_is_refused(saved):
    for name in (snapshot_path, training_path):
        name(saved, 1).rename(name(saved, 2))
    with pytest.raises(
        CheckpointError, match=r"CS_scenes_2.training.pth: expected the training state of step 2, found that of 1"
    ):
        read_snapshot(saved, 2)


def test_incomplete_training_states_are_refused(saved):
    path = training_path(saved, 1)
    whole = torch.load(path, weights_only=True)
    for name in whole:
        torch.save({key: value for key, value in whole.items() if key != name}, path)
        with pytest.raises(CheckpointError, match=rf"1.training.pth: expected .*{name}.*, found none"):
            read_training(saved, 1)
        torch.save(whole | {name: [1.5]}, path)
        with pytest.raises(CheckpointError, match=rf"1.training.pth: expected .*{name}.*, found (list|\[1.5\])"):
            read_training(saved, 1)
    for version in (1, 3):
        torch.save(whole | {"version": version}, path)
        with pytest.raises(CheckpointError, match=f"expected a training state of version 2, found {version}"):
            read_training(saved, 1)


def test_the_newest_is_found_with_nothing_to_report(tmp_path):
    lines = []
    assert newest_snapshot(tmp_path, lines.append) is None
    assert newest_snapshot(tmp_path / "nowhere", lines.append) is None
    for step in (5, 100, 20):
        model, optimizer = trained(seed=step)
        save_snapshot(model, optimizer, tmp_path, step, {"step": step})
    step, state_dict, training = newest_snapshot(tmp_path, lines.append)
    assert (step, training["flags"], lines) == (100, {"step": 100}, [])
    assert equal(dict(state_dict), dict(trained(seed=100)[0].state_dict()))


def test_a_refused_snapshot_is_reported_and_the_one_before_it_is_resumed_from(tmp_path):
    for step in (1, 2, 3, 4):
        save_snapshot(*trained(seed=step), tmp_path, step, {}, keep=4)
    files = set(tmp_path.iterdir())
    training_path(tmp_path, 4).write_bytes(training_path(tmp_path, 4).read_bytes()[:-1])
    shutil.copy(snapshot_path(tmp_path, 4), snapshot_path(tmp_path, 3))
    lines = []
    assert newest_snapshot(tmp_path, lines.append).step == 2
    assert [Path(line.split(":")[0]).name for line in lines] == ["CS_scenes_4.training.pth", "CS_scenes_3.pth"]
    assert all(line.endswith("; resuming from step 2 instead") for line in lines)
    assert "truncated or damaged" in lines[0]
    assert set(tmp_path.iterdir()) == files
    snapshot_path(tmp_path, 2).unlink()
    lines.clear()
    assert newest_snapshot(tmp_path, lines.append).step == 1
    assert "CS_scenes_2.pth: expected a checkpoint, there is no such file" in lines[2]


def test_none_that_can_be_resumed_from(tmp_path):
    for step in (1, 2):
        save_snapshot(*trained(), tmp_path, step, {})
    training_path(tmp_path, 2).write_bytes(b"PK")
    snapshot_path(tmp_path, 1).unlink()
    files = set(tmp_path.iterdir())
    lines = []
    with pytest.raises(CheckpointError) as error:
        newest_snapshot(tmp_path, lines.append)
    first, second, third = str(error.value).splitlines()
    assert first == f"{tmp_path}: cannot resume from any of its snapshots:"
    assert second.startswith(f"    {training_path(tmp_path, 2)}: ")
    assert third == f"    {snapshot_path(tmp_path, 1)}: expected a checkpoint, there is no such file"
    assert lines == []
    assert set(tmp_path.iterdir()) == files
