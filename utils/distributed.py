"""The processes of a run: starting them, communication between them, and ending all of them when one fails.

A run has one process per GPU, or one or several on the CPU. torchrun starts them, or `spawn` here does.
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

# How long a collective waits for the other processes: rank 0 may write a snapshot, others may have more images to
# evaluate. A process that has died is noticed at once.
_TIMEOUT = timedelta(hours=1)
# Seconds that the others get to end by themselves when a process has failed, before SIGTERM and again before SIGKILL.
_GRACE = 2
# Larger than the number of every signal.
_NO_SIGNAL = 1000


class ProcessError(RuntimeError):
    """A process of the run has failed; the message says which one and why.

    Attributes:
        status: exit status for the run.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class World:
    """This process and its place among those of the run. All processes must call its methods in the same order.

    Attributes:
        device: device of this process.
        rank: number of this process, from 0.
        size: number of processes.
        received: signals that asked this process to stop; see `stop_requests`.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    received: list[int] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        """Whether this process, of rank 0, prints and writes files for the run."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """The main process's value; it must be picklable."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors on the device with those of the main process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank; they must be picklable."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes, which must have the same shape, dtype and device type."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def stop_signal(self) -> int | None:
        """A signal that some process has received, the same in all processes, or None. Does not wait for a GPU."""
        number = min(self.received, default=_NO_SIGNAL)  # Ctrl-C (SIGINT, 2) rather than the SIGTERM (15) that follows
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
    """Initialise the process group of the run, and destroy it at the end of the context.

    Args:
        store: the rendezvous of the processes, an `init_method` of torch.distributed.
    """
    if world.size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store, rank=world.rank, world_size=world.size, timeout=_TIMEOUT)
    yield  # not in try/finally: after an error the others would not reach the barrier
    world.wait()
    dist.destroy_process_group()


def wait_for_failed_process(world: World) -> None:
    """After an error of a collective, which may only mean that another process failed: let that one be reported first.

    In that case torchrun or `spawn`, whichever started the processes, ends this one while it waits.

    Raises:
        SystemExit: it has already asked this process to end.
    """
    if world.received:
        sys.exit(128 + world.received[0])
    time.sleep(5 * _GRACE)


def spawn(main: Callable[..., int], devices: list[torch.device], *arguments: Any) -> int:
    """Run main(world, store, report, *arguments) in a new process for each device, and return the exit status.

    main must be importable. It gets the rendezvous `store` (see `joined`) and returns the exit status of its process.
    If it fails, it writes the reason to the file `report`, or raises. SIGINT and SIGTERM are passed on as SIGTERM.

    Raises:
        ProcessError: a process has failed. The others have been ended.
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
        if received:  # a signal that arrived while the processes were being started
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
    """Exit without finalising the interpreter.

    Threads of the process group may release Python objects during finalisation, which aborts the process.
    """
    atexit._run_exitfuncs()  # as a regular exit does first
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
    """The exit status of the run, after a process has ended with a status other than 0.

    Raises:
        ProcessError: that process has failed.
    """
    name, status = _name(error.error_index, devices), error.exit_code
    if status < 0:
        if received and -status in (signal.SIGINT, signal.SIGTERM):  # it had not yet installed its handlers
            return 128 - status
        hint = ": the machine's memory may not suffice" if -status == signal.SIGKILL else ""
        raise ProcessError(f"{name} was killed by {error.signal_name}{hint}", 128 - status)
    report = _report(folder, error.error_index)
    if report.exists():
        raise ProcessError(f"{name} failed: {report.read_text()}", status)
    return status  # it was asked to stop, and did


@contextmanager
def stop_requests(received: list[int], on_signal: Callable[[int], None] = lambda number: None) -> Iterator[None]:
    """Append SIGINT and SIGTERM to `received` instead of ending; a second SIGINT (Ctrl-C) has its usual effect."""

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
