"""Snapshots: a plain state dict a step, and beside it the state that training goes on from.

    CS_scenes_<step>.pth            the network's state dict, what evaluate.py and other people's code read
    CS_scenes_<step>.training.pth   optimiser, step, random generators, flags, and the state dict file's SHA-256

Both files are written to temporary ones, synced to the disk, and then renamed, the state dict first. So a file that is
there was written whole, a .training.pth that is there has its state dict, and a state dict whose .training.pth is not
yet renamed has a temporary file beside it. Damage since then, by the disk or by a copy that was cut short, is found
when a file is read.
"""

import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import NoneType
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

_PREFIX = "CS_scenes_"
_SUFFIX = ".pth"
_TRAINING_SUFFIX = ".training.pth"
_TRAINING_VERSION = 2
# What a training state of version 1 lacks.
_SINCE_VERSION_1 = {"state_dict_sha256": None, "scaler": None}
_TRAINING_TYPES: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "flags": dict,
    "optimizer": dict,
    "scaler": (dict, NoneType),
    "cpu_generator": Tensor,
    "cuda_generator": (Tensor, NoneType),
    "state_dict_sha256": (str, NoneType),
}
# The attribute of a directory in a zip, MS-DOS's.
_DIRECTORY = 0x10
# Prefix of the temporary files.
_WRITING = ".writing-"
# How many .training.pth files are kept where every state dict is: the newest, and one to fall back on.
_TRAINING_KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file."""


class Snapshot(NamedTuple):
    """What a run goes on from: the network's state dict and the training state that belongs to it."""

    step: int
    state_dict: dict[str, Tensor]
    training: dict[str, Any]


def snapshot_path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step}{_SUFFIX}"


def training_path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step}{_TRAINING_SUFFIX}"


def _steps(folder: Path, suffix: str) -> list[int]:
    """Steps of which there is a file with this suffix, ascending."""
    pattern = re.compile(re.escape(_PREFIX) + "(0|[1-9][0-9]*)" + re.escape(suffix))
    matches = (pattern.fullmatch(path.name) for path in folder.glob("*.pth"))
    return sorted(int(match[1]) for match in matches if match)


def training_steps(folder: Path) -> list[int]:
    """Steps of which there is a training state, ascending."""
    return _steps(folder, _TRAINING_SUFFIX)


def _sha256(file: IO[bytes]) -> str:
    """The SHA-256 of the whole file, in hexadecimal digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


@contextmanager
def written_aside(path: Path, write: Callable[[IO[bytes]], object]) -> Iterator[tuple[Path, str]]:
    """Write a file to a temporary one beside it, synced to the disk; yields it and its SHA-256. `put` renames it.

    Raises:
        CheckpointError: it cannot be written, or something within the context cannot. Nothing is left of it then.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_WRITING, delete=False) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
            digest = _sha256(file)
        os.chmod(temporary, 0o644)
        yield temporary, digest
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be written, earlier snapshots are as they were: {error}") from error


def put(temporary: Path, path: Path) -> None:
    """Rename a file that was written aside, so that at any moment the old one, none, or the whole new one is there."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_zip(file: IO[bytes]) -> None:
    """Compare the contents of a zip with its checksums, which torch.load does not look at.

    Raises:
        zipfile.BadZipFile: they differ, it is no whole zip, or it would be read as something else.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            entries = archive.infolist()
    except Exception as error:  # zipfile too meets arbitrary bytes with arbitrary errors
        raise zipfile.BadZipFile(f"it is truncated or damaged: {error}") from error
    if damaged is not None:
        raise zipfile.BadZipFile(f"it is damaged: wrong checksum of {damaged}")
    for entry in entries:
        # PyTorch reads nothing of what is marked as a directory, and leaves the tensor's memory as it finds it.
        if entry.external_attr & _DIRECTORY and entry.file_size > 0:
            raise zipfile.BadZipFile(f"it is damaged: {entry.filename} is marked as a directory")


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            # What PyTorch wrote before 1.6 is no zip and has no checksums.
            if file.read(2) == b"PK":
                _check_zip(file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: expected a checkpoint, there is no such file") from error
    except Exception as error:  # the unpickler meets arbitrary bytes with arbitrary errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if pickled := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            reason = f"it holds a pickled {pickled[1]}, which would run code; save model.state_dict(), not the model"
        raise CheckpointError(f"{path}: expected a checkpoint, cannot read it as one: {reason}") from error


def save_snapshot(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    step: int,
    flags: dict,
    keep: int | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Path:
    """Write both files for the step, then remove older ones; returns the path of the state dict.

    At every moment one snapshot is whole, unless the only one there is of this same step: its files are replaced one
    after the other.

    Args:
        flags: what has to be the same when training goes on; numbers, strings, booleans, lists or None.
        keep: how many snapshots are kept, this one included, 1 or more; if None, every state dict and the training
            states of two.
        scaler: of the gradients, if training uses one.

    Raises:
        CheckpointError: the disk is full, say. Earlier snapshots are as they were.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep: expected 1 or more, got {keep}")
    path = snapshot_path(folder, step)
    # On the CPU, so that the file loads where there is no such GPU.
    state_dict = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    device = next(model.parameters()).device
    training = {
        "version": _TRAINING_VERSION,
        "step": step,
        "flags": flags,
        "optimizer": optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "cpu_generator": torch.get_rng_state(),
        "cuda_generator": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    with written_aside(path, partial(torch.save, state_dict)) as (weights_file, digest):
        training["state_dict_sha256"] = digest
        _remove_interrupted(folder, weights_file)
        with written_aside(training_path(folder, step), partial(torch.save, training)) as (training_file, _):
            put(weights_file, path)
            put(training_file, training_path(folder, step))
    _remove_older(folder, step, keep)
    return path


def _remove_older(folder: Path, step: int, keep: int | None) -> None:
    """Leave the newest snapshots up to the step.

    Later ones are neither counted nor removed: they are of a run that was taken up again from before them, because they
    could not be read, say.
    """
    until_now = [other for other in training_steps(folder) if other <= step]
    kept = until_now[-(keep or _TRAINING_KEPT) :]
    for old in until_now:
        if old not in kept:
            training_path(folder, old).unlink()
    if keep is None:
        return
    # The training state went first: one that is there has its state dict.
    for old in _steps(folder, _SUFFIX):
        if old <= step and old not in kept:
            snapshot_path(folder, old).unlink()


def _remove_interrupted(folder: Path, current: Path) -> None:
    """Remove what a process that was killed while it wrote has left.

    Not before there is a new temporary file: `lone_weights` knows an interrupted run by them.
    """
    for path in folder.glob(f"{_WRITING}*"):
        if path.name != current.name:
            path.unlink(missing_ok=True)


def lone_weights(folder: Path) -> Path | None:
    """The newest state dict of a folder that holds state dicts and no training state, from which no run can resume.

    None where a run was killed while it saved its first snapshot: nothing of it counts yet.
    """
    steps = _steps(folder, _SUFFIX)
    if not steps or training_steps(folder) or any(folder.glob(f"{_WRITING}*")):
        return None
    return snapshot_path(folder, steps[-1])


def newest_snapshot(folder: Path, report: Callable[[str], None]) -> Snapshot | None:
    """The newest snapshot that can be read and whose two files belong together; None if there is no training state.

    Nothing is removed.

    Args:
        report: is called with a line for each newer snapshot that was refused, which says why.

    Raises:
        CheckpointError: there are training states, and none can be gone on from; the message says why for each.
    """
    refused: list[str] = []
    for step in reversed(training_steps(folder)):
        try:
            snapshot = read_snapshot(folder, step)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            report(f"{reason}; going on from step {step}, before it")
        return snapshot
    if refused:
        raise CheckpointError(
            f"{folder}: cannot go on from any of its snapshots:" + "".join(f"\n    {reason}" for reason in refused)
        )
    return None


def read_snapshot(folder: Path, step: int) -> Snapshot:
    """Both files of the step.

    Raises:
        CheckpointError: one of them is missing, unreadable or something else, or they do not belong together.
    """
    training = read_training(folder, step)
    path = snapshot_path(folder, step)
    state_dict = read_state_dict(path)
    expected = training["state_dict_sha256"]
    if expected is not None:
        with path.open("rb") as file:
            if _sha256(file) != expected:
                raise CheckpointError(f"{path}: is not the file that {training_path(folder, step).name} was saved with")
    return Snapshot(step, state_dict, training)


def read_training(folder: Path, step: int) -> dict[str, Any]:
    """The content of CS_scenes_<step>.training.pth, in the form of the present version.

    In one of version 1 there is no SHA-256 of the state dict file and no state of a scaler: these are None.

    Raises:
        CheckpointError: it is missing, unreadable, of another kind, version or step.
    """
    path = training_path(folder, step)
    training = _load(path)
    version = training.get("version", "none") if isinstance(training, dict) else type(training).__name__
    if not isinstance(version, int) or version not in (1, _TRAINING_VERSION):
        raise CheckpointError(f"{path}: expected a training state of version 1 or {_TRAINING_VERSION}, found {version}")
    if version == 1:
        training = {**_SINCE_VERSION_1, **training}
    for name, kind in _TRAINING_TYPES.items():
        if name not in training or not isinstance(training[name], kind):
            found = type(training[name]).__name__ if name in training else "none"
            raise CheckpointError(f"{path}: expected a training state with its {name}, found {found}")
    if training["step"] != step:
        raise CheckpointError(f"{path}: expected the training state of step {step}, found that of {training['step']}")
    return training


def restore_generators(training: dict[str, Any], device: torch.device) -> None:
    """Put torch's random generators, the CPU's and the device's, back to where they were at the snapshot."""
    torch.set_rng_state(training["cpu_generator"])
    if device.type == "cuda" and training["cuda_generator"] is not None:
        torch.cuda.set_rng_state(training["cuda_generator"], device)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict: a mapping of names to tensors, without running any code in the file.

    It may lie among other things, as in {"state_dict": ..., "epoch": ...}, if it is the only one there.

    Raises:
        CheckpointError: the file is missing, no checkpoint, or holds none or several state dicts.
    """
    content = _load(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a state dict (names to tensors), found {type(content).__name__}")
    found = _state_dicts(content)
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: expected one state dict, found {len(found)}: {', '.join(found)}; save one alone"
        )
    if not found:
        entries = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
        what = f"other entries: {', '.join(entries[:8])}" if entries else "nothing in it"
        raise CheckpointError(f"{path}: expected a state dict (names to tensors), found {what}")
    return next(iter(found.values()))


def _state_dicts(content: dict, name: str = "") -> dict[str, dict[str, Tensor]]:
    """The state dicts in a dictionary, itself or in entries of entries, by where they are."""
    if not content or not all(isinstance(key, str) for key in content):  # an optimiser counts its parameters
        return {}
    if all(isinstance(value, Tensor) for value in content.values()):
        return {name: content}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= _state_dicts(value, f"{name}.{key}" if name else key)
    return found
