"""Snapshots: a plain state dict a step, and beside it the state that training goes on from.

    CS_scenes_<step>.pth            the network's state dict, what evaluate.py and other people's code read
    CS_scenes_<step>.training.pth   optimiser, step, random generators and flags

Every file is written to a temporary one, synced to the disk and renamed, the state dict first: a file that is there is
whole, and a .training.pth that is there has its state dict.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PREFIX = "CS_scenes_"
_TRAINING_SUFFIX = ".training.pth"
_TRAINING_VERSION = 1
# How many .training.pth files are kept: the newest, and one to fall back on.
_TRAINING_KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file."""


def snapshot_path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step}.pth"


def training_path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step}{_TRAINING_SUFFIX}"


def training_steps(folder: Path) -> list[int]:
    """Steps that training can go on from, ascending."""
    pattern = re.compile(re.escape(_PREFIX) + r"(\d+)" + re.escape(_TRAINING_SUFFIX))
    matches = (pattern.fullmatch(path.name) for path in folder.glob("*.pth"))
    return sorted(int(match[1]) for match in matches if match)


def _save(content: dict[str, Any], path: Path) -> None:
    """Write a file so that at any moment either the old one, or none, or the whole new one is there."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
            temporary = Path(file.name)
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written, earlier snapshots are as they were: {error}") from error


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: expected a checkpoint, there is no such file") from error
    except Exception as error:  # the unpickler meets arbitrary bytes with arbitrary errors
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: expected a checkpoint, cannot read it as one: {first_line}") from error


def save_snapshot(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int, flags: dict
) -> Path:
    """Write both files for the step; returns the path of the state dict.

    Args:
        flags: what has to be the same when training goes on; numbers, strings, booleans, lists or None.

    Raises:
        CheckpointError: the disk is full, say. Earlier snapshots are as they were.
    """
    remove_interrupted(folder)
    path = snapshot_path(folder, step)
    # On the CPU, so that the file loads where there is no such GPU.
    _save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, path)
    device = next(model.parameters()).device
    training = {
        "version": _TRAINING_VERSION,
        "step": step,
        "flags": flags,
        "optimizer": optimizer.state_dict(),
        "cpu_generator": torch.get_rng_state(),
        "cuda_generator": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    _save(training, training_path(folder, step))
    for old in training_steps(folder)[:-_TRAINING_KEPT]:
        training_path(folder, old).unlink()
    return path


def remove_interrupted(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left."""
    for path in folder.glob(".writing-*"):
        path.unlink(missing_ok=True)


def read_training(folder: Path, step: int) -> dict[str, Any]:
    """The content of CS_scenes_<step>.training.pth.

    Raises:
        CheckpointError: it is missing, unreadable, or of another kind or version.
    """
    path = training_path(folder, step)
    training = _load(path)
    if not isinstance(training, dict) or training.get("version") != _TRAINING_VERSION:
        found = training.get("version", "none") if isinstance(training, dict) else type(training).__name__
        raise CheckpointError(f"{path}: expected a training state of version {_TRAINING_VERSION}, found {found}")
    return training


def restore_generators(training: dict[str, Any], device: torch.device) -> None:
    """Put torch's random generators, the CPU's and the device's, back to where they were at the snapshot."""
    torch.set_rng_state(training["cpu_generator"])
    if device.type == "cuda" and training["cuda_generator"] is not None:
        torch.cuda.set_rng_state(training["cuda_generator"], device)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict: a mapping of names to tensors, and nothing else, without running any code in it.

    Raises:
        CheckpointError: the file is missing, no checkpoint, or holds something else.
    """
    state = _load(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a state dict (names to tensors), found {type(state).__name__}")
    others = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others or not state:
        found = f"other entries: {', '.join(others[:8])}" if others else "nothing in it"
        raise CheckpointError(f"{path}: expected a state dict (names to tensors), found {found}")
    return state
