"""Shared by the benchmarks: measuring in turns, steady conditions, tables."""

import ctypes
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cc_attention import native
from utils.arguments import ArgumentParser
from utils.memory import keep_freed_memory

Work = Callable[[], object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# Keeps the GPU busy for about 20 ms before a measurement, while Python queues the work. Otherwise the GPU would wait
# for Python between small kernels.
CYCLES_AHEAD = 40_000_000


def add_fresh_memory(parser: ArgumentParser) -> None:
    parser.add_argument("--fresh-memory", action="store_true", help="return freed memory, as other programs do")


def begin(device: str, fresh_memory: bool) -> None:
    """Set the conditions of train.py and evaluate.py; on a GPU without TF32.

    Raises:
        SystemExit: there is no such device, or no native code for it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no GPU")
    if not native.runs_on(torch.device(device)):
        raise SystemExit(f"the native operators for {device} are not built: pip install -e .")
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if not fresh_memory:
        keep_freed_memory()


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


class Case:
    """A module in evaluation mode with an input: its passes, as works."""

    def __init__(self, module: nn.Module, x: Tensor):
        self.module, self.x = module.eval(), x.requires_grad_()

    @torch.no_grad()
    def forward(self) -> None:
        self.module(self.x)

    def forward_and_backward(self) -> None:
        out = self.module(self.x)
        out.backward(torch.ones_like(out))

    def gflops(self) -> float:
        """Of the forward pass; on the meta device nothing is computed."""
        with FlopCounterMode(display=False) as counter:
            self.forward()
        return counter.get_total_flops() / 1e9


class Repeated(nn.Module):
    """A module, applied several times."""

    def __init__(self, module: nn.Module, times: int):
        super().__init__()
        self.module, self.times = module, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.module(x)
        return x


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


def peak_bytes(device: str, work: Work) -> int:
    """Peak memory of the work, beyond that before it. On the CPU, call it once per process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    resident = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - resident


def _status_bytes(entry: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024


def bytes_from_a_new_process(module: str, *arguments: object) -> int:
    """The number that `python -m module arguments` prints last."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    return int(result.stdout.splitlines()[-1])


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
