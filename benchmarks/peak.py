"""The peak rate of multiply-adds of this CPU, measured with a loop (peak.cpp) whose operands all stay in registers.

The loop uses the instructions of the native kernels: those of their instruction set and, with AVX512-BF16, products of
pairs of bfloat16. Other 16-bit numbers count as float32, to which the kernels convert them. Units that the kernels do
not use, such as AMX, are not measured. The loop is compiled on first use, with the compiler that CXX names or c++, and
runs in PyTorch's threads.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from cc_attention import native

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = "-std=c++17 -O2 -ffp-contract=fast -Wall -Wno-psabi -Wno-unused-function -fPIC -shared"
ITERATIONS = 4_000_000  # of one run: about 10 ms; sums in float32 are exact up to 2^23


class NoCompiler(Exception):
    """There is no C++ compiler."""


class _Run(ctypes.Structure):
    _fields_ = (("iterations", ctypes.c_int64), ("multiply_adds", ctypes.c_int64))


@cache
def library() -> ctypes.CDLL:
    """The compiled loops for all instruction sets. Raises NoCompiler if there is no compiler."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        raise NoCompiler(f"the limit is left out: it needs a C++ compiler, and there is no program {command[0]} (CXX)")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "peak.so"
        command += [*FLAGS.split(), f"-I{SOURCE.parents[1]}", str(SOURCE), "-o", str(built)]
        result = subprocess.run(command, text=True, capture_output=True)
        if result.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}:\n{result.stderr}")
        return ctypes.CDLL(str(built))


def loop_name(dtype: torch.dtype) -> str:
    """The name of the loop for a dtype. Raises RuntimeError if CCNET_CPU_CAPABILITY is beyond this CPU."""
    capability = native.cpu_capability()
    if capability == "avx512_bf16" and dtype != torch.bfloat16:
        capability = "avx512"
    if capability == "avx512_bf16":
        return f"peak_{capability}_bfloat16"
    return f"peak_{capability}_{'float64' if dtype == torch.float64 else 'float32'}"


class Peak:
    """Runs the loop once on each of PyTorch's threads when called.

    `multiply_adds` is the number of the last call, over all threads; `rate` is that of the fastest call, per second.
    """

    def __init__(self, dtype: torch.dtype, iterations: int = ITERATIONS):
        self.loop = getattr(library(), loop_name(dtype))
        self.iterations = iterations
        self.multiply_adds = 0
        self.rate = 0.0
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self.parallel_for = torch_library.torch_parallel_for
        self.parallel_for.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2

    def __call__(self) -> None:
        run = _Run(self.iterations, 0)
        loop = ctypes.cast(self.loop, ctypes.c_void_p)
        begin = time.perf_counter()
        if self.parallel_for(0, torch.get_num_threads(), 1, loop, ctypes.addressof(run)) != 0:
            raise RuntimeError("torch_parallel_for failed")
        seconds = time.perf_counter() - begin
        self.multiply_adds = run.multiply_adds
        self.rate = max(self.rate, self.multiply_adds / seconds)
