"""The processes of a run: starting them, what they tell each other, and ending them all when one fails.

A run is of one process per GPU, or of several on CPUs. They are started by torchrun, or by `spawn` here.
"""

import atexit
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

# How long a process waits for the others: rank 0 writes snapshots and the last one may have images left to evaluate.
# One that has died is noticed at once.
_TIMEOUT = timedelta(hours=1)
# Seconds that the others get to end by themselves when one has failed, before SIGTERM and again before SIGKILL.
_GRACE = 2
# No signal has this number.
_NO_SIGNAL = 1000


class ProcessError(RuntimeError):
    """A process of the run has failed; the message says which and why.

    Attributes:
        status: exit status of the run.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them. Its methods are called by all of them, in the same order.

    Attributes:
        device: of this process.
        rank: its number, from 0.
        size: how many there are.
        received: signals that asked this process to stop; see `stop_requests`.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    received: list[int] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        """Whether it is this process that prints and writes what is of the whole run."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """The main process's value, which can be pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors, on the device, with the main process's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, which can be pickled, in order of their ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, of one shape, dtype and type of device."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def stop_signal(self) -> int | None:
        """A signal that any of the processes has received, or None: the same in all of them. No GPU is waited for."""
        number = min(self.received, default=_NO_SIGNAL)  # of Ctrl-C and the SIGTERM that follows it, the first cause
        if self.size > 1:
            lowest = torch.tensor(number)
            dist.all_reduce(lowest, dist.ReduceOp.MIN)
            number = int(lowest)
        return None if number == _NO_SIGNAL else number

    def wait(self) -> None:
        """Barrier: a process that exits early closes connections that others still use."""
        self.sum(torch.zeros(1))


@contextmanager
def joined(world: World, store: str) -> Iterator[None]:
    """The process group of the run, for as long as the context lasts.

    Args:
        store: where the processes meet, an `init_method` of torch.distributed.
    """
    if world.size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store, rank=world.rank, world_size=world.size, timeout=_TIMEOUT)
    yield  # after an error the others are not there for a farewell
    world.wait()
    dist.destroy_process_group()


def wait_for_the_one_that_failed(world: World) -> None:
    """After an error that may only tell that another process has failed: leave it to that one to be reported.

    Whoever started the processes, torchrun or `spawn`, ends this one meanwhile if it is so.

    Raises:
        SystemExit: it has done so already.
    """
    if world.received:
        sys.exit(128 + world.received[0])
    time.sleep(5 * _GRACE)


def spawn(main: Callable[..., int], devices: list[torch.device], *arguments: Any) -> int:
    """Run main(world, store, report, *arguments) in a process for each device, and return the exit status.

    main has to be importable. Its processes meet at `store` and exit with what it returns. One that fails writes why
    to the file `report`, or raises. SIGINT and SIGTERM are passed on, as SIGTERM.

    Raises:
        ProcessError: one of them has failed. The others have been ended.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // len(devices), 1)))
    processes: list[Any] = []
    received: list[int] = []

    def pass_on(number: int) -> None:
        for process in processes:
            process.terminate()

    with tempfile.TemporaryDirectory(prefix="ccnet-") as folder, stop_requests(received, pass_on):
        context = mp.start_processes(_run_one, (main, devices, folder, arguments), len(devices), join=False)
        processes += context.processes
        if received:  # while they were started
            pass_on(received[0])
        try:
            while not context.join(grace_period=_GRACE):
                pass
        except mp.ProcessRaisedException as error:
            raise ProcessError(f"{_name(error.error_index, devices)} failed:{error.msg}", 1) from None
        except mp.ProcessExitedException as error:
            return _exit_status(error, devices, folder, received)
    return 0


def _run_one(rank: int, main: Callable[..., int], devices: list[torch.device], folder: str, arguments: tuple) -> None:
    world = World(devices[rank], rank, len(devices))
    end_process(main(world, f"file://{folder}/store", _report(folder, rank), *arguments))


def end_process(status: int) -> NoReturn:
    """Exit, without taking the interpreter apart.

    Threads of the process group may be about to let go of Python objects just then, and would abort the process.
    """
    atexit._run_exitfuncs()  # as any exit begins
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _report(folder: str, rank: int) -> Path:
    return Path(folder) / f"error-{rank}"


def _name(rank: int, devices: list[torch.device]) -> str:
    return f"process {rank} of {len(devices)}, on {devices[rank]},"


def _exit_status(
    error: mp.ProcessExitedException, devices: list[torch.device], folder: str, received: list[int]
) -> int:
    """The run's, after its first process has ended with another one than 0.

    Raises:
        ProcessError: that process has failed.
    """
    name, status = _name(error.error_index, devices), error.exit_code
    if status < 0:
        if received and -status in (signal.SIGINT, signal.SIGTERM):  # it was not yet ready to be asked
            return 128 - status
        hint = ": the machine's memory may not suffice" if -status == signal.SIGKILL else ""
        raise ProcessError(f"{name} was killed by {error.signal_name}{hint}", 128 - status)
    report = _report(folder, error.error_index)
    if report.exists():
        raise ProcessError(f"{name} failed: {report.read_text()}", status)
    return status  # it was asked to stop, and has


@contextmanager
def stop_requests(received: list[int], on_signal: Callable[[int], None] = lambda number: None) -> Iterator[None]:
    """Collect SIGINT and SIGTERM in `received` instead of dying of them; a second SIGINT (Ctrl-C) is as ever."""

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
        on_signal(number)

    before: dict[int, Any] = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
