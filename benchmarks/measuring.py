"""What the benchmarks of operators share: turns, steady conditions, tables."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from libs import native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# Each thread stays on a CPU: otherwise two of them share one at times, for a second on end.
STEADY_THREADS = {"OMP_PROC_BIND": "true"}
# The C library keeps what is freed. Otherwise every large tensor is fresh memory, and what that costs depends on the
# virtual machine's host and on who ran before: up to as long again as the work.
STEADY_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"}


def begin_under_steady_conditions(fresh_memory: bool) -> None:
    """Begin the process anew under these conditions, which are read when it starts, if it is not under them."""
    if not native.LOADED:
        raise SystemExit("the native operators are not built: pip install -e .")
    if "OMP_PROC_BIND" not in os.environ:
        environment = {**os.environ, **STEADY_THREADS, **({} if fresh_memory else STEADY_MEMORY)}
        os.execve(sys.executable, sys.orig_argv, environment)


def take_turns(
    works: dict[str, Callable[[], object]],
    repeats: int,
    seconds: float,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median milliseconds of each, in turns. What would take longer than `seconds` is run as often as that allows.

    `prepare` is called before each, and not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            if turn and sum(times[name]) > seconds:
                continue
            prepare()
            start = time.perf_counter()
            work()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def print_machine(more: str) -> None:
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    machine = f"{platform.machine()}, {model.split(': ')[-1]}, {os.cpu_count()} CPUs"
    print(f"{machine}; PyTorch {torch.__version__}; kernels for {native.cpu_capability()}; {more}")


def print_table(title: str, header: list[str], rows: Iterable[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{':--|' * 2}{'--:|' * (len(header) - 2)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
