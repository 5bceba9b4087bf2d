"""Shared by the benchmarks: measuring in turns, steady conditions, tables."""

import os
import platform
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from cc_attention import native

Work = Callable[[], object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# Pins each thread to a CPU. Otherwise two of them sometimes share one, for a second at a time.
STEADY_THREADS = {"OMP_PROC_BIND": "true"}
# Makes the C library keep freed memory. Otherwise every large tensor is new memory, whose cost depends on the host of a
# virtual machine and on what ran before, and can double the time.
STEADY_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"}
# Keeps the GPU busy for about 20 ms before a measurement, while Python queues the work. Otherwise the GPU would wait
# for Python between small kernels.
CYCLES_AHEAD = 40_000_000


def begin_under_steady_conditions(device: str, fresh_memory: bool) -> None:
    """Restart the process with the environment variables for steady conditions, unless it already has them.

    On a GPU, turn off TF32 instead.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no GPU")
    if not native.runs_on(torch.device(device)):
        raise SystemExit(f"the native operators for {device} are not built: pip install -e .")
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    elif "OMP_PROC_BIND" not in os.environ:
        environment = {**os.environ, **STEADY_THREADS, **({} if fresh_memory else STEADY_MEMORY)}
        os.execve(sys.executable, sys.orig_argv, environment)


def milliseconds(work: Work, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """The time of one call, by a clock in seconds; on a GPU the time between CUDA events around queued work."""
    if device == "cpu":
        begin = clock()
        work()
        return 1e3 * (clock() - begin)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(CYCLES_AHEAD)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def take_turns(
    works: dict[str, Work],
    repeats: int,
    seconds: float,
    device: str = "cpu",
    prepare: Work = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each work, measured in turns.

    The order rotates, so that no work always, or never, finds its inputs in the cache.

    Args:
        repeats: number of turns.
        seconds: a work that has taken longer than this in total is left out of further turns.
        prepare: called before each work, and not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    order = deque(works.items())
    for turn in range(repeats + 1):
        order.rotate(-1)
        for name, work in order:
            if turn and sum(times[name]) > 1e3 * seconds:
                continue
            prepare()
            ms = milliseconds(work, device, clock)
            if turn:  # the first warms up
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


def print_machine(device: str, more: str) -> None:
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()}; PyTorch {torch.__version__}; {more}")
        return
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    machine = f"{platform.machine()}, {model.split(': ')[-1]}, {os.cpu_count()} CPUs"
    print(f"{machine}; PyTorch {torch.__version__}; kernels for {native.cpu_capability()}; {more}")


def print_table(title: str, header: list[str], rows: Iterable[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{':--|' * 2}{'--:|' * (len(header) - 2)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
