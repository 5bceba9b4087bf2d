"""Starts the processes of a script on its devices. Errors that the user can correct end it with a single message."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dataset import DatasetError
from networks import StateDictError

from .checkpoint import CheckpointError
from .commandline import CommandError
from .distributed import ProcessError, World, end_process, joined, spawn, wait_for_failed_process
from .memory import keep_freed_memory
from .nvidia import find_driver, find_gpus


def find_devices(device: str, gpu: str, procs: int | None, max_processes: int | None) -> list[torch.device]:
    """The device of each process, as --device, --gpu and --procs select them.

    Args:
        max_processes: limit for --gpu all; None for none.

    Raises:
        CommandError: a device does not exist, PyTorch cannot use a GPU that does, or the flags contradict each other.
    """
    if device != "cpu" and not torch.cuda.is_available():
        refuse_unused_gpu()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() or gpu not in ("None", "all") else "cpu"
    if device == "cpu":
        if gpu not in ("None", "all"):
            raise CommandError(f"--gpu {gpu}: cannot go with --device cpu")
        return [torch.device("cpu")] * (procs or 1)
    count = torch.cuda.device_count()
    if gpu == "all":
        indices = list(range(min(count, max_processes or count)))[:procs]
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


def refuse_unused_gpu() -> None:
    """Raise a CommandError if this machine has GPUs, CUDA_VISIBLE_DEVICES shows them, and PyTorch cannot use them."""
    gpus = find_gpus() if os.environ.get("CUDA_VISIBLE_DEVICES", "0")[:1].isalnum() else []
    if not gpus:
        return
    try:
        torch.cuda.init()
        reason = "it finds none"
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    raise CommandError(
        f"this machine has {gpus[0]} with {find_driver()}, which PyTorch {torch.__version__} ({build}) cannot use: "
        f"{reason}. Install a PyTorch whose CUDA the driver runs (with .venv removed, run_local.sh does so where it "
        "can), or a newer driver; --device cpu does without the GPU"
    )


def check_architecture(device: torch.device) -> None:
    """Raise a CommandError if PyTorch has no code for that GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    known = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in torch.cuda.get_arch_list()]
    built = [(match[1], int(match[2]), int(match[3])) for match in known if match is not None]
    runs = [(kind == "compute" and (a, b) <= (major, minor)) or (a == major and b <= minor) for kind, a, b in built]
    if built and not any(runs):
        raise CommandError(
            f"{device}, {torch.cuda.get_device_name(device)}, is of architecture {major}.{minor}, and PyTorch "
            f"{torch.__version__} has code for {', '.join(sorted({f'{a}.{b}' for _, a, b in built}, key=float))} only: "
            "install a PyTorch that has code for it, or choose other GPUs with --gpu; --device cpu does without GPUs"
        )


def torchrun_world(args: argparse.Namespace) -> World:
    """The World of a process that torchrun started, from torchrun's environment variables."""
    if args.procs is not None:
        raise CommandError(f"--procs {args.procs}: torchrun starts the processes, with --nproc_per_node")
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    devices = find_devices(args.device, args.gpu, local_size if args.gpu in ("None", "all") else None, None)
    if local_rank >= len(devices):
        raise CommandError(f"--gpu {args.gpu}: expected one for each of torchrun's {local_size} processes")
    return World(devices[local_rank], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


Main = Callable[[argparse.Namespace, World], int]


def launch(
    main: Main, args: argparse.Namespace, max_processes: Callable[[argparse.Namespace], int] | None = None
) -> int:
    """Run main(args, world) in this process, if it is the only one or torchrun started it, or in new processes.

    Errors that the user can correct become a single message and exit status 2, without a traceback.

    Args:
        main: importable by the new processes; returns the exit status.
        max_processes: of the command line: how many processes --gpu all may start; None for no limit.
    """
    try:
        if dist.is_torchelastic_launched():
            end_process(_run(torchrun_world(args), "env://", None, main, args))
        limit = None if max_processes is None else max_processes(args)
        devices = find_devices(args.device, args.gpu, args.procs, limit)
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
    """Run main in this process of the world; an error is written to the file `report`, or printed if it is None."""
    keep_freed_memory()
    try:
        if world.device.type == "cuda":
            check_architecture(world.device)
            torch.cuda.set_device(world.device)
            torch.backends.cudnn.benchmark = True  # crops and tiles all have one size
        with joined(world, store):
            return main(args, world)
    except (CommandError, DatasetError, StateDictError, CheckpointError, OSError) as error:
        _say(str(error), report)
    except torch.OutOfMemoryError as error:
        _say(f"the GPU's memory does not suffice; a smaller --batch-size or --input-size may help: {error}", report)
    except RuntimeError:
        if world.size > 1:
            wait_for_failed_process(world)
        raise
    return 2


def _say(message: str, report: Path | None) -> None:
    if report is None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        report.write_text(message)
