"""Snapshots: whole or not there, refused when they are something else, and never run as code."""

import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.checkpoint import (
    CheckpointError,
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


def test_every_state_dict_is_kept_and_two_training_states(tmp_path):
    model, optimizer = trained()
    for step in (5, 10, 100):
        save_snapshot(model, optimizer, tmp_path, step, {})
    assert training_steps(tmp_path) == [10, 100]
    assert all(snapshot_path(tmp_path, step).exists() for step in (5, 10, 100))


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".writing-abc").write_text("half")
    model, optimizer = trained()
    save_snapshot(model, optimizer, tmp_path, 1, {})
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


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_kill_while_writing_leaves_the_previous_snapshot(tmp_path, moment):
    """The process kills itself when it comes to `moment` the second time round."""
    program = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from utils.checkpoint import save_snapshot
from pathlib import Path
model = torch.nn.Linear(50, 50)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
save_snapshot(model, optimizer, Path({str(tmp_path)!r}), 1, {{}})
model.weight.data.zero_()
real = {moment}
def dying(*arguments, **keywords):
    if {moment!r} == "torch.save":
        arguments[1].write(b"half a file")
    os.kill(os.getpid(), signal.SIGKILL)
{moment} = dying
save_snapshot(model, optimizer, Path({str(tmp_path)!r}), 1, {{}})
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
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
    for content, found in (
        (torch.zeros(3), "found Tensor"),
        ({}, "found nothing in it"),
        ({"state_dict": {}, "epoch": 3}, "found other entries: state_dict, epoch"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=found):
            read_state_dict(path)
    torch.save({"weight": torch.zeros(3)}, training_path(tmp_path, 3))
    with pytest.raises(CheckpointError, match="expected a training state of version 1, found none"):
        read_training(tmp_path, 3)
