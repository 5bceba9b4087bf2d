"""The start of training: from scratch, from a file of weights, or resuming from the newest snapshot of a folder."""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dataset import Item, class_weights
from networks import NetworkConfig, load_state
from networks.pretrained import torchvision_weights

from .checkpoint import (
    CheckpointError,
    Snapshot,
    lone_weights,
    newest_snapshot,
    read_state_dict,
    restore_generators,
    snapshot_path,
    training_steps,
)
from .commandline import CommandError, plain_flags, with_network
from .distributed import World
from .network_file import SavedNetwork, find_network, read_network
from .training import poly_learning_rate

# Flags that may differ on --resume: they affect devices, speed and logging, not what is learnt.
_FREE_FLAGS = {
    "accumulate", "amp", "classes", "compile", "data_dir", "device", "gpu", "keep", "num_workers", "print_frequency",
    "procs", "restore_from", "resume", "save_num_images", "save_pred_every", "skip_nonfinite", "snapshot_dir",
}  # fmt: skip


def run_flags(args: argparse.Namespace) -> dict:
    """The flags that must be the same on --resume."""
    return {name: value for name, value in plain_flags(args).items() if name not in _FREE_FLAGS}


class Weights(NamedTuple):
    """What --restore-from holds, and what is known of its network."""

    state: dict[str, Tensor]
    found: SavedNetwork | None


def run_network(args: argparse.Namespace, world: World) -> tuple[argparse.Namespace, Weights | None]:
    """The command line with all network flags set: by default those of the run to resume, or else of --restore-from.

    `--restore-from torchvision` is replaced by the path of the file. Only the main process reads and downloads, and
    returns the weights, if training begins with them.

    Raises:
        CommandError: a flag contradicts the weights, or torchvision's cannot be downloaded.
        CheckpointError: the weights or network.json cannot be read.
    """
    if not world.is_main:
        return world.broadcast(None), None
    may_differ, found, weights = ["recurrence", "ccl"], None, None
    resuming = bool(training_steps(args.snapshot_dir))
    if resuming:
        found = read_network(args.snapshot_dir)
    elif args.restore_from is not None:
        args = argparse.Namespace(**vars(args) | {"restore_from": weights_path(args)})
        state = read_state_dict(args.restore_from)
        found = find_network(args.restore_from, state)
        weights = Weights(state, found)
    if not resuming and (not args.ft or args.not_restore_last):  # what differs begins anew
        may_differ += ["num_classes", "head"]
    args = with_network(args, found, may_differ)
    if resuming:
        check_same_classes(args)
    return world.broadcast(args), weights


def weights_path(args: argparse.Namespace) -> Path:
    """The file of --restore-from; raise a CommandError if it is torchvision's and cannot be downloaded."""
    if str(args.restore_from) != "torchvision":
        return args.restore_from
    backbone = args.backbone or NetworkConfig.backbone
    try:
        return torchvision_weights(backbone)
    except (OSError, RuntimeError) as error:
        raise CommandError(
            f"--restore-from torchvision: expected to download its weights of {backbone}, found: {error}; give a file "
            "of them"
        ) from error


def run_class_weights(args: argparse.Namespace, items: list[Item], world: World) -> dict[str, float] | None:
    """The weights of --class-weights by class name, which must be the same on --resume; None without that flag.

    Only the main process reads the file or counts the labels, and prints them.

    Raises:
        DatasetError: as `class_weights`.
    """
    if args.class_weights is None:
        return None
    weights = class_weights(args.class_weights, items, args.classes, args.num_workers) if world.is_main else {}
    if world.is_main:
        print(f"class weights: {', '.join(f'{name} {weight:.4g}' for name, weight in weights.items())}")
    return world.broadcast(weights)


def check_same_classes(args: argparse.Namespace) -> None:
    """Raise a CommandError if the run in --snapshot-dir learns from other label values than the class table has."""
    found = read_network(args.snapshot_dir)
    if found is None or found.classes is None or found.classes == args.classes:
        return
    pairs = zip((*found.classes.classes, found.classes.void), (*args.classes.classes, args.classes.void), strict=True)
    changed = "".join(f"\n    was {was}\n    is  {now}" for was, now in pairs if was != now)
    raise CommandError(
        f"--resume: the run in {args.snapshot_dir} was started with another class table; resume with the same, or give "
        f"another --snapshot-dir:{changed}"
    )


def start_or_resume(
    args: argparse.Namespace,
    defaults: argparse.Namespace,
    weights: Weights | None,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[int, bool]:
    """Load the weights and, on resuming, the training state. The main process reads them and broadcasts them to all.

    Args:
        defaults: all flags at their defaults, for flags that did not exist yet when a run was started.
        weights: from `run_network`.

    Returns the step, and whether the run is resumed.
    """
    step, training = restore(args, defaults, weights, model, optimizer) if world.is_main else (0, None)
    step, training = world.broadcast((step, training))
    world.broadcast_(list(model.state_dict().values()))
    if training is not None:
        broadcast_momentum(world, optimizer)
        if training["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(training["scaler"])
        restore_generators(training, world.device)
    return step, training is not None


def restore(
    args: argparse.Namespace,
    defaults: argparse.Namespace,
    weights: Weights | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, dict | None]:
    """Load weights and momentum. Returns the step, and the rest of the training state if the run is resumed."""
    steps = training_steps(args.snapshot_dir)
    if steps and not args.resume:
        raise CommandError(
            f"--snapshot-dir {args.snapshot_dir}: holds a run at step {steps[-1]}; add --resume to resume it, "
            "or give another folder"
        )
    lone = lone_weights(args.snapshot_dir)
    if lone is not None:
        missing = lone.with_suffix(".training.pth").name
        raise CommandError(
            f"--snapshot-dir {args.snapshot_dir}: holds {lone.name} but no {missing} (step, optimiser, random "
            "generators), without which no run can be resumed, and a new one would overwrite the weights; to start a "
            f"new run from them, give --restore-from {lone} and another --snapshot-dir"
        )
    snapshot = newest_snapshot(args.snapshot_dir, lambda reason: print(f"warning: {reason}", file=sys.stderr))
    if snapshot is not None:
        return snapshot.step, resume(args, defaults, model, optimizer, snapshot)
    if weights is not None:
        state, found = weights
        other_classes = found is not None and found.classes is not None and found.classes.names != args.classes.names
        restore_last = not args.not_restore_last and not other_classes
        left_out = load_state(model, state, str(args.restore_from), restore_last, as_start=not args.ft)
        if left_out:
            print(f"{args.restore_from}: loaded without {', '.join(left_out)}, which begin anew")
    elif args.ft:
        raise CommandError("--ft: expected --restore-from, the trained network that is to be fine-tuned")
    return args.start_iters, None


def resume(
    args: argparse.Namespace,
    defaults: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    snapshot: Snapshot,
) -> dict:
    """Load a snapshot of the run in --snapshot-dir. Returns its training state without the optimiser's state."""
    training = dict(snapshot.training)
    # A flag that did not exist yet when the run was started has its default.
    before, now = run_flags(defaults) | training["flags"], run_flags(args)
    changed = [name for name in sorted(now) if before.get(name) != now.get(name)]
    if "num_steps" in changed and before["num_steps"] < now["num_steps"]:
        changed.remove("num_steps")
        print(_extension(args, snapshot.step, before["num_steps"]))
    if changed:
        lines = [line for name in changed for line in _changes(name, before.get(name), now.get(name))]
        raise CommandError(
            f"--resume: the run in {args.snapshot_dir} was started with other flags; resume with the same, or give "
            "another --snapshot-dir:\n" + "\n".join(lines)
        )
    path = snapshot_path(args.snapshot_dir, snapshot.step)
    load_state(model, snapshot.state_dict, str(path))
    try:
        optimizer.load_state_dict(training.pop("optimizer"))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: the optimiser's state beside it does not fit: {error}") from error
    return training


def _changes(name: str, before: object, now: object) -> list[str]:
    """What has changed of a flag, a line for each class if it has a value for each."""
    flag = f"    --{name.replace('_', '-')}"
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in before | now if before.get(key) != now.get(key)]
        return [f"{flag}: {key}: was {before.get(key)}, is {now.get(key)}" for key in keys]
    return [f"{flag}: was {before}, is {now}"]


def _extension(args: argparse.Namespace, step: int, num_steps: int) -> str:
    """A message on how a larger --num-steps changes the learning rate."""
    old, new = (
        poly_learning_rate(args.learning_rate, step, steps, args.power) for steps in (num_steps, args.num_steps)
    )
    return (
        f"--num-steps {args.num_steps}: was {num_steps}; the schedule is stretched over all of them, so that the "
        f"learning rate at step {step} is {new:.3g} and not {old:.3g}; the result differs from that of a run with "
        f"{args.num_steps} steps from the start"
    )


def broadcast_momentum(world: World, optimizer: torch.optim.Optimizer) -> None:
    """Broadcast the main process's momentum; each buffer gets the memory layout of its parameter, as SGD needs it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    has_momentum = [optimizer.state[parameter].get("momentum_buffer") is not None for parameter in parameters]
    for parameter, has in zip(parameters, world.broadcast(has_momentum), strict=True):
        if has:
            buffer = torch.zeros_like(parameter)
            if world.is_main:
                buffer.copy_(optimizer.state[parameter]["momentum_buffer"])
            world.broadcast_([buffer])
            optimizer.state[parameter]["momentum_buffer"] = buffer
