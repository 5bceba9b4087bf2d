"""Snapshots: for each saved step a plain state dict and, beside it, the state that training resumes from.

    CS_scenes_<step>.pth            the network's state dict, what evaluate.py and other people's code read
    CS_scenes_<step>.training.pth   optimiser, step, random generators, flags, and the state dict file's SHA-256

Both files are written under temporary names, synced to the disk, and then renamed, the state dict first. So a file
under its final name is complete, a .training.pth always has its state dict, and between the two renames a temporary
file shows that the snapshot is unfinished. Later damage, by the disk or an incomplete copy, is found when a file is
read.
"""

import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections import OrderedDict
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
_TRAINING_TYPES: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "flags": dict,
    "optimizer": dict,
    "scaler": (dict, NoneType),
    "cpu_generator": Tensor,
    "cuda_generator": (Tensor, NoneType),
    "state_dict_sha256": str,
}
# The bit that marks a directory in the attributes of a zip entry (MS-DOS's).
_DIRECTORY = 0x10
# Prefix of the temporary files.
_WRITING = ".writing-"
_SAFETENSORS = ".safetensors"
_NO_SAFETENSORS = "expected the package safetensors for such files, found none: pip install safetensors"
# Key of the network's description in the metadata of a state dict, and of a .safetensors file.
_DESCRIPTION = "ccnet"
# How many .training.pth files are kept if all state dicts are: the newest, and one to fall back on.
_TRAINING_KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file."""


class Snapshot(NamedTuple):
    """What a run resumes from: the network's state dict and the training state saved with it."""

    step: int
    state_dict: dict[str, Tensor]
    training: dict[str, Any]


def snapshot_path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step}{_SUFFIX}"


def training_path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step}{_TRAINING_SUFFIX}"


def _steps(folder: Path, suffix: str) -> list[int]:
    """Steps that have a file with this suffix, ascending."""
    pattern = re.compile(re.escape(_PREFIX) + "(0|[1-9][0-9]*)" + re.escape(suffix))
    matches = (pattern.fullmatch(path.name) for path in folder.glob("*.pth"))
    return sorted(int(match[1]) for match in matches if match)


def training_steps(folder: Path) -> list[int]:
    """Steps that have a training state, ascending."""
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
    """Write a temporary file beside `path` and sync it to the disk. Yields its path and SHA-256; `put` renames it.

    Raises:
        CheckpointError: it, or a file within the context, cannot be written. The temporary file is removed.
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
    """Rename a file of `written_aside` to its final name, atomically, and sync the folder."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_zip(file: IO[bytes]) -> None:
    """Verify a zip against its checksums, which torch.load ignores.

    Raises:
        zipfile.BadZipFile: it is truncated or damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            entries = archive.infolist()
    except Exception as error:  # on arbitrary bytes zipfile raises arbitrary errors
        raise zipfile.BadZipFile(f"it is truncated or damaged: {error}") from error
    if damaged is not None:
        raise zipfile.BadZipFile(f"it is damaged: wrong checksum of {damaged}")
    for entry in entries:
        # PyTorch skips an entry that is marked as a directory, and leaves the tensor uninitialised.
        if entry.external_attr & _DIRECTORY and entry.file_size > 0:
            raise zipfile.BadZipFile(f"it is damaged: {entry.filename} is marked as a directory")


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            # Files of PyTorch before 1.6 are not zips and have no checksums.
            if file.read(2) == b"PK":
                _check_zip(file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: expected a checkpoint, there is no such file") from error
    except Exception as error:  # on arbitrary bytes the unpickler raises arbitrary errors
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
    description: dict[str, Any] | None = None,
) -> Path:
    """Write both files of the step, then remove older snapshots. Returns the path of the state dict.

    At every moment one snapshot is complete, except while the only one is replaced by another of the same step.

    Args:
        flags: flags that must be the same on resuming; numbers, strings, booleans, lists or None.
        keep: how many snapshots to keep, this one included, 1 or more; None keeps all state dicts and the newest two
            training states.
        scaler: gradient scaler, if training uses one.
        description: what the network is, to travel with the state dict; see `described`.

    Raises:
        CheckpointError: a file cannot be written, for instance because the disk is full. Earlier snapshots remain.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep: expected 1 or more, got {keep}")
    path = snapshot_path(folder, step)
    # On the CPU, so that the file loads on a machine without this GPU.
    state_dict = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    state_dict = described(state_dict, description)
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


def described(state: dict[str, Tensor], description: dict[str, Any] | None) -> dict[str, Tensor]:
    """The state dict with a description of its network in its metadata.

    That is where `Module.state_dict` notes the versions of modules, and it is saved and loaded with the state dict,
    which is the same names and tensors as before for `load_state_dict`.

    Args:
        description: of numbers, text, lists, tuples, dictionaries and None.
    """
    state = OrderedDict(state)
    state._metadata = OrderedDict({"": {_DESCRIPTION: description}})  # type: ignore[attr-defined]
    return state


def description_of(state: dict[str, Tensor]) -> dict[str, Any] | None:
    """The description that `described` has added; None if there is none."""
    return getattr(state, "_metadata", {}).get("", {}).get(_DESCRIPTION)


def _remove_older(folder: Path, step: int, keep: int | None) -> None:
    """Keep the newest snapshots up to the step.

    Later ones are neither counted nor removed. They exist if the run resumed from an earlier snapshot, for instance
    because they are damaged.
    """
    until_now = [other for other in training_steps(folder) if other <= step]
    kept = until_now[-(keep or _TRAINING_KEPT) :]
    for old in until_now:
        if old not in kept:
            training_path(folder, old).unlink()
    if keep is None:
        return
    # Training states are removed first, so that each one left has its state dict.
    for old in _steps(folder, _SUFFIX):
        if old <= step and old not in kept:
            snapshot_path(folder, old).unlink()


def _remove_interrupted(folder: Path, current: Path) -> None:
    """Remove temporary files of a process that was killed while writing, all but the current one.

    Call it after writing a new temporary file: `lone_weights` recognises an interrupted run by them.
    """
    for path in folder.glob(f"{_WRITING}*"):
        if path.name != current.name:
            path.unlink(missing_ok=True)


def lone_weights(folder: Path) -> Path | None:
    """The newest state dict of a folder that has state dicts but no training state, so that no run can resume.

    None for other folders, and where a run was killed while it saved its first snapshot.
    """
    steps = _steps(folder, _SUFFIX)
    if not steps or training_steps(folder) or any(folder.glob(f"{_WRITING}*")):
        return None
    return snapshot_path(folder, steps[-1])


def newest_snapshot(folder: Path, report: Callable[[str], None]) -> Snapshot | None:
    """The newest snapshot that is readable and whose two files belong together; None if there is no training state.

    Removes nothing.

    Args:
        report: called with one line for each newer snapshot that was refused, with the reason.

    Raises:
        CheckpointError: there are training states, but a run can resume from none; the message has the reasons.
    """
    refused: list[str] = []
    for step in reversed(training_steps(folder)):
        try:
            snapshot = read_snapshot(folder, step)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            report(f"{reason}; resuming from step {step} instead")
        return snapshot
    if refused:
        raise CheckpointError(
            f"{folder}: cannot resume from any of its snapshots:" + "".join(f"\n    {reason}" for reason in refused)
        )
    return None


def read_snapshot(folder: Path, step: int) -> Snapshot:
    """Read both files of the step.

    Raises:
        CheckpointError: one of them is missing, unreadable or of another kind, or they do not belong together.
    """
    training = read_training(folder, step)
    path = snapshot_path(folder, step)
    state_dict = read_state_dict(path)
    with path.open("rb") as file:
        if _sha256(file) != training["state_dict_sha256"]:
            raise CheckpointError(f"{path}: is not the file that {training_path(folder, step).name} was saved with")
    return Snapshot(step, state_dict, training)


def read_training(folder: Path, step: int) -> dict[str, Any]:
    """Read CS_scenes_<step>.training.pth.

    Raises:
        CheckpointError: it is missing, unreadable, or of another kind, version or step.
    """
    path = training_path(folder, step)
    training = _load(path)
    version = training.get("version", "none") if isinstance(training, dict) else type(training).__name__
    if not isinstance(version, int) or version != _TRAINING_VERSION:
        raise CheckpointError(f"{path}: expected a training state of version {_TRAINING_VERSION}, found {version}")
    for name, kind in _TRAINING_TYPES.items():
        if name not in training or not isinstance(training[name], kind):
            found = type(training[name]).__name__ if name in training else "none"
            raise CheckpointError(f"{path}: expected a training state with its {name}, found {found}")
    if training["step"] != step:
        raise CheckpointError(f"{path}: expected the training state of step {step}, found that of {training['step']}")
    return training


def restore_generators(training: dict[str, Any], device: torch.device) -> None:
    """Restore the states of torch's random generators, the CPU's and the device's, from a snapshot."""
    torch.set_rng_state(training["cpu_generator"])
    if device.type == "cuda" and training["cuda_generator"] is not None:
        torch.cuda.set_rng_state(training["cuda_generator"], device)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict, a mapping of names to tensors, without running any code in the file.

    It may be nested, as in {"state_dict": ..., "epoch": ...}, if it is the only one in the file. A file whose name ends
    in .safetensors is read by the package safetensors.

    Raises:
        CheckpointError: the file is missing, no checkpoint, or holds none or several state dicts, or the package is
            missing.
    """
    content = _load_safetensors(path) if path.suffix == _SAFETENSORS else _load(path)
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


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the file, `described` by its metadata."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(f"{path}: {_NO_SAFETENSORS}") from error
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
            text = (file.metadata() or {}).get(_DESCRIPTION, "null")
        return described(state, json.loads(text))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: expected a checkpoint, there is no such file") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, cannot read it as one: {error}") from error


def write_safetensors(state: dict[str, Tensor], path: Path, description: dict[str, Any] | None) -> None:
    """Write a state dict, with a description of its network in the file's metadata, in JSON.

    Raises:
        CheckpointError: it cannot be written, or the package safetensors is missing.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise CheckpointError(f"{path}: {_NO_SAFETENSORS}") from error
    metadata = {"format": "pt"} | ({} if description is None else {_DESCRIPTION: json.dumps(description)})
    content = save({name: tensor.contiguous() for name, tensor in state.items()}, metadata)
    with written_aside(path, lambda file: file.write(content)) as (temporary, _):
        put(temporary, path)


def _state_dicts(content: dict, name: str = "") -> dict[str, dict[str, Tensor]]:
    """All state dicts nested in a dictionary, by their dotted path; "" is the dictionary itself."""
    if not content or not all(isinstance(key, str) for key in content):  # an optimiser state has integer keys
        return {}
    if all(isinstance(value, Tensor) for value in content.values()):
        return {name: content}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= _state_dicts(value, f"{name}.{key}" if name else key)
    return found
