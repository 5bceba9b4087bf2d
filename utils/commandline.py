"""What the command lines of train.py and evaluate.py share."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dataset import IGNORE_LABEL, NUM_CLASSES, DatasetError
from networks import BACKBONE_ACTIVATIONS, BACKBONES, StateDictError

from .checkpoint import CheckpointError
from .distributed import ProcessError, World, end_process, joined, spawn, wait_for_the_one_that_failed
from .precision import AMP_DTYPES


class CommandError(RuntimeError):
    """The command cannot do what it was asked for; the message names the flag and says why."""


def size(text: str) -> tuple[int, int]:
    """Parse "height,width" in pixels."""
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected height,width in pixels (e.g. 769,769), got {text!r}") from None
    if min(height, width) < 8:
        raise argparse.ArgumentTypeError(f"expected at least 8,8, since the network works at 1/8, got {text!r}")
    return height, width


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """A parser of int or float within [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, got {text!r}") from None
        if not low <= value <= high:
            bounds = f"{low} or more" if high == float("inf") else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {bounds}, got {text!r}")
        return value

    return parse


def boolean(text: str) -> bool:
    """Parse 1/0, true/false, yes/no."""
    try:
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected 1 or 0 (true/false, yes/no), got {text!r}") from None


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that mean the same in training and evaluation, with the same defaults."""
    parser.add_argument(
        "--data-dir", type=Path, default=Path("cityscapes"), help="folder with leftImg8bit/ and gtFine/"
    )
    parser.add_argument("--data-list", type=Path, help="list file (image and label path a line) instead of a split")
    parser.add_argument(
        "--ignore-label", type=number(int, NUM_CLASSES, 255), default=IGNORE_LABEL, help="label of void"
    )
    parser.add_argument("--input-size", type=size, default=(769, 769), metavar="H,W", help="size of crops and tiles")
    parser.add_argument("--num-classes", type=number(int, NUM_CLASSES, 255), default=NUM_CLASSES, help="of the network")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet101", help="the paper's is resnet101")
    parser.add_argument(
        "--backbone-activation",
        choices=BACKBONE_ACTIVATIONS,
        default="identity",
        help="of the backbone's batch norms: identity, with ReLU behind, or leaky_relu, which saves memory",
    )
    parser.add_argument("--recurrence", type=number(int, 0), default=2, help="R, passes of criss-cross attention")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    parser.add_argument(
        "--gpu", default="None", help="GPUs, as in 0,1,2,3, with a process for each; all; the first one if not given"
    )
    parser.add_argument("--procs", type=number(int, 1), help="processes; with --device cpu, or the first so many GPUs")
    parser.add_argument("--amp", choices=AMP_DTYPES, default="off", help="mixed precision: the network in bf16 or fp16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument(
        "--num-workers",
        type=number(int, 0),
        default=min(4, os.cpu_count() or 1),
        help="processes that load data, of each process",
    )


def plain_flags(args: argparse.Namespace) -> dict:
    """The flags by name, paths as text: what can be saved."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def check_ignore_label(ignore_label: int, num_classes: int) -> None:
    """The label of void is not that of a class.

    Raises:
        CommandError: it is.
    """
    if ignore_label < num_classes:
        raise CommandError(f"--ignore-label {ignore_label}: expected --num-classes {num_classes} or more")


def find_devices(device: str, gpu: str, procs: int | None, most: int | None) -> list[torch.device]:
    """The device of each process that --device, --gpu and --procs ask for.

    Args:
        most: processes that --gpu all may start.

    Raises:
        CommandError: a device is not there, or the flags contradict each other.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() or gpu not in ("None", "all") else "cpu"
    if device == "cpu":
        if gpu not in ("None", "all"):
            raise CommandError(f"--gpu {gpu}: cannot go with --device cpu")
        return [torch.device("cpu")] * (procs or 1)
    count = torch.cuda.device_count()
    if gpu == "all":
        indices = list(range(min(count, most or count)))[:procs]
    elif gpu == "None":
        indices = list(range(procs or 1))
    elif all(index.isdecimal() for index in gpu.split(",")):
        indices = [int(index) for index in gpu.split(",")]
    else:
        raise CommandError(f"--gpu {gpu}: expected indices of GPUs, as in 0,1,2,3, or all")
    if not indices or max(indices) >= count or len(set(indices)) < len(indices):
        raise CommandError(f"--gpu {gpu}: expected GPUs that are there, each once, found {count} (--device cpu)")
    if procs is not None and procs != len(indices):
        raise CommandError(f"--procs {procs}: expected a process for each of the {len(indices)} GPUs of --gpu {gpu}")
    return [torch.device("cuda", index) for index in indices]


def torchrun_world(args: argparse.Namespace) -> World:
    """This process's place in the run, by what torchrun says in environment variables."""
    if args.procs is not None:
        raise CommandError(f"--procs {args.procs}: torchrun starts the processes, with --nproc_per_node")
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    devices = find_devices(args.device, args.gpu, local_size if args.gpu in ("None", "all") else None, None)
    if local_rank >= len(devices):
        raise CommandError(f"--gpu {args.gpu}: expected one for each of torchrun's {local_size} processes")
    return World(devices[local_rank], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


Main = Callable[[argparse.Namespace, World], int]


def launch(main: Main, args: argparse.Namespace, most: int | None = None) -> int:
    """Run main(args, world) in this process if it is the only one or torchrun started it, or in several new ones.

    What the user can mend becomes one message, and exit status 2, instead of stack traces.

    Args:
        main: importable by the new processes.
        most: processes that --gpu all may start.
    """
    try:
        if dist.is_torchelastic_launched():
            end_process(_run(torchrun_world(args), "env://", None, main, args))
        devices = find_devices(args.device, args.gpu, args.procs, most)
        if len(devices) == 1:
            return _run(World(devices[0]), "", None, main, args)
        return spawn(_run, devices, main, args)
    except CommandError as error:
        _say(str(error), None)
    except ProcessError as error:
        _say(str(error), None)
        return error.status
    return 2


def _run(world: World, store: str, report: Path | None, main: Main, args: argparse.Namespace) -> int:
    """Run main in this process, one of the world's; an error is written to `report`, or else printed."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        torch.backends.cudnn.benchmark = True  # crops and tiles are all of one size
    try:
        with joined(world, store):
            return main(args, world)
    except (CommandError, DatasetError, StateDictError, CheckpointError, OSError) as error:
        _say(str(error), report)
    except torch.OutOfMemoryError as error:
        _say(f"the GPU's memory does not suffice; a smaller --batch-size or --input-size may help: {error}", report)
    except RuntimeError:
        if world.size > 1:
            wait_for_the_one_that_failed(world)
        raise
    return 2


def _say(message: str, report: Path | None) -> None:
    if report is None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        report.write_text(message)
