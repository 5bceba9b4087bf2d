"""Processes that fork from one that has loaded PyTorch, and runs of train.py and evaluate.py in such processes.

Loading PyTorch takes 3 seconds, most of what a small run takes.
"""

import atexit
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]


def forked_processes(worker: Callable, arguments: tuple, size: int) -> None:
    """Run worker(rank, *arguments) in that many processes."""
    _preload()
    mp.start_processes(worker, arguments, size, start_method="forkserver")


def distributed_processes(worker: Callable, folder: Path, size: int) -> None:
    """Run worker(rank) in that many processes of a group over gloo, which meet at a file in the folder."""
    forked_processes(_in_a_group, (worker, folder, size), size)


def _in_a_group(rank: int, worker: Callable, folder: Path, size: int) -> None:
    store, timeout = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", store, rank=rank, world_size=size, timeout=timeout)
    worker(rank)
    dist.barrier()
    dist.destroy_process_group()


def forked_program(
    program: Callable, *arguments: object, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    """Run program(*arguments) in a process group of its own, and return its exit status and what it printed."""
    _preload()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, "stdout"), Path(folder, "stderr")]
        settings = (outputs, cwd, {**os.environ, **environment})
        process = multiprocessing.get_context("forkserver").Process(target=_run, args=(*settings, program, arguments))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"it still runs after 300 s and has printed {[path.read_text() for path in outputs]}")
        return subprocess.CompletedProcess(program, process.exitcode, *(path.read_text() for path in outputs))


def _preload() -> None:
    multiprocessing.set_forkserver_preload(["torch._dynamo", "train", "evaluate"])  # those that are installed


def _run(outputs: list[Path], cwd: Path, environment: dict[str, str], program: Callable, arguments: tuple) -> None:
    os.setsid()
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # as in a new process
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    program(*arguments)


# ---- train.py and evaluate.py ----


def run_script(script: str, *runs: list, code: str = "") -> subprocess.CompletedProcess:
    """Run train.py or evaluate.py with `code` run before it.

    Processes of a run of several are forks of its first one, so `code` holds for them as well.

    Args:
        runs: flags of one run after the other, until one fails; a run of one process has to be the last.
    """
    return forked_program(_run_script, script_program(script, runs, code))


def script_program(script: str, runs: tuple[list, ...], code: str) -> str:
    """The source of such a program."""
    parse = "train.parse_flags(flags)" if script == "train" else "evaluate.get_parser().parse_args(flags)"
    return f"""
import os, signal, sys, time
import torch
import torch.distributed as dist
import train, evaluate
from utils.launch import launch
{code}
if __name__ == "__main__":
    for flags in {[list(map(str, flags)) for flags in runs]}:
        status = launch({script}.{script}, {parse})
        if status != 0:
            sys.exit(status)
"""


def _run_script(source: str) -> None:
    os.register_at_fork(after_in_child=_forget_the_first_process)
    mp.start_processes = functools.partial(mp.start_processes, start_method="fork")
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})


def _forget_the_first_process() -> None:
    """In a process that it has forked: what it does at its end, and upon signals."""
    atexit._clear()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
