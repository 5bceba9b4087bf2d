"""The native CUDA operators on the CPU, compiled with the emulator (cuda_emulator/)."""

import ctypes
import fcntl
import hashlib
import json
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import cc_attention  # noqa: F401 - declares the operators, whose schemas the emulated ones have
from building import compilers, cuda, pytorch

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "cuda_emulator"
ORDERS = ("forward", "reverse", "random")
COMPILE = "g++ -std=c++17 -Wall -Werror -Wno-unknown-pragmas -Wno-psabi -fno-strict-aliasing -fPIC"
SANITIZERS = {
    "": "-O1",
    # Not optimised, since the compiler is most of the time. Uninitialised variables get a pattern that is noticed,
    # instead of arbitrary numbers.
    "address": "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -ftrivial-auto-var-init=pattern",
    "thread": "-O1 -g1 -fsanitize=thread",
}


@cache
def cuda_headers() -> Path | None:
    """CUDA's headers: those that nvcc includes, or of PyTorch's wheels."""
    found = []
    for nvcc in cuda.nvcc_programs():
        _, dependencies = compilers.run([nvcc, "-M", "-x", "cu", "/dev/null"])
        found += re.findall(r"(\S+)/cuda_runtime\.h", dependencies)
    found += [path for folder in pytorch.site_packages() for path in Path(folder).glob("nvidia/**/include")]
    return next((Path(folder) for folder in found if Path(folder, "cuda_bf16.h").exists()), None)


def compile_with_emulator(name: str, sources: list[Path], sanitizer: str = "", flags: str = "", link: str = "") -> Path:
    """Compile an executable, or what the flags `link` make; cached in build/ until sources or flags change."""
    headers = cuda_headers()
    if headers is None:
        pytest.skip("needs CUDA's headers: a toolkit, or pip install nvidia-cuda-runtime")
    flags = f"{COMPILE} {SANITIZERS[sanitizer]} -I{ROOT} -I{EMULATOR} -isystem {headers} {flags}"
    content = hashlib.sha256(f"{flags} {link} {[str(source) for source in sources]}".encode())
    included = [ROOT / folder for folder in ("libs/csrc", "cc_attention/csrc", "tests/cuda_emulator")]
    for path in [*sources, *(path for folder in included for path in sorted(folder.rglob("*")))]:
        if path.is_file():
            content.update(path.read_bytes())
    folder = ROOT / "build" / "emulator" / f"{name}-{sanitizer or 'plain'}-{content.hexdigest()[:16]}"
    target = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # one test process compiles, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(target, sources, flags, SANITIZERS[sanitizer], link)
    return target


def _compile(target: Path, sources: list[Path], flags: str, sanitizer: str, link: str) -> None:
    def run(command: str) -> None:
        result = subprocess.run(shlex.split(command), text=True, capture_output=True, cwd=ROOT)
        assert result.returncode == 0, f"{command}\n{result.stderr}"

    objects = [target.parent / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as compilers:
        list(compilers.map(lambda x: run(f"{flags} -c -x c++ {x[0]} -o {x[1]}"), zip(sources, objects, strict=True)))
    run(f"g++ {sanitizer} {' '.join(map(str, objects))} {link} -o {target}.part")
    Path(f"{target}.part").rename(target)


CUDA_FOLDERS = (ROOT / "cc_attention" / "csrc" / "cuda", ROOT / "libs" / "csrc" / "cuda")
# Sources of the launchers of kernels, and of the operators that call them
KERNELS = sorted(path for folder in CUDA_FOLDERS for path in folder.glob("*_*.cu") if path.name != "criss_cross.cu")
OPERATOR_SOURCES = [CUDA_FOLDERS[0] / "criss_cross.cu", CUDA_FOLDERS[1] / "abn.cu"]
OPERATORS = [name for path in OPERATOR_SOURCES for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())]


class Counters(ctypes.Structure):
    """As in cuda_emulator/counters.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "launches",
            "blocks",
            "mma",
            "ldmatrix",
            "copies",
            "barriers",
            "shuffles",
            "loads",
            "stores",
            "load_addresses",
            "store_addresses",
            "load_bytes",
            "load_sectors",
            "store_bytes",
            "store_sectors",
            "shared_passes",
            "shared_conflicts",
            "ldmatrix_passes",
            "ldmatrix_conflicts",
            "memory_loads",
            "memory_stores",
        )
    ]

    def __add__(self, other: "Counters") -> "Counters":
        names = [name for name, _ in self._fields_]
        return Counters(*(getattr(self, name) + getattr(other, name) for name in names))


class AlikeBlocks(NamedTuple):
    """Blocks of a launch that have as many of all counted instructions."""

    count: int
    first: int  # number of one of them
    counters: Counters  # of that one


class CountedLaunch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    parameters: bytes  # as they lie in a GPU's constant bank
    counters: Counters
    alike: list[AlikeBlocks]


@cache
def emulated_library() -> ctypes.CDLL:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = " ".join(f"-isystem {path}" for path in include_paths())
    path = compile_with_emulator(
        "emulated.so",
        [EMULATOR / "emulated.cpp", *OPERATOR_SOURCES, *KERNELS],
        flags=f"{includes} {pytorch.STABLE_ABI} -DCCNET_CUDA_LIBRARY=ccnet_emulated -DCCNET_CUDA_KEY=CPU",
        link=f"-shared -L{library_paths()[0]} -ltorch -ltorch_cpu -lc10",
    )
    definitions = torch.library.Library("ccnet_emulated", "DEF")
    for operator in OPERATORS:
        schema = str(getattr(torch.ops.ccnet, operator).default._schema)
        definitions.define(schema.removeprefix("ccnet::"))
    library = ctypes.CDLL(str(path))
    library.emulator_launches.restype = library.emulator_take_launches.restype = ctypes.c_char_p
    library.definitions = definitions  # keeps them alive
    return library


ALL_BLOCKS = 2**63 - 1


@contextmanager
def emulated_gpu(
    order="forward",
    seed=1,
    shared_bytes=163 * 1024,
    cache_bytes=40 * 2**20,
    multiprocessors=108,
    architecture=80,
    counting=False,
    last_blocks=ALL_BLOCKS,
):
    """A context in which operators on CPU tensors run on an emulated GPU with these properties.

    Threads and blocks run in the given order. Yields a function that returns the launches counted since its last call.
    From one such call to the next there is an L2 cache, which begins empty, and of which at the call all that has
    changed is written.
    """
    library = emulated_library()

    def take_launches() -> list[CountedLaunch]:
        def read(launch: dict) -> CountedLaunch:
            alike = [AlikeBlocks(count, first, Counters(*counters)) for count, first, counters in launch.pop("alike")]
            parameters, counters = bytes(launch.pop("parameters")), Counters(*launch.pop("counters"))
            return CountedLaunch(**launch, parameters=parameters, counters=counters, alike=alike)

        return [read(launch) for launch in json.loads(library.emulator_take_launches())]

    library.emulator_set(
        ORDERS.index(order),
        ctypes.c_uint64(seed),
        shared_bytes,
        cache_bytes,
        multiprocessors,
        architecture,
        int(counting),
        ctypes.c_int64(last_blocks),
    )
    take_launches()
    instead = torch.library.Library("ccnet", "IMPL")
    for operator in OPERATORS:
        instead.impl(operator, getattr(torch.ops.ccnet_emulated, operator), "CPU", allow_override=True)
    try:
        yield take_launches
    finally:
        instead._destroy()
        library.emulator_reset()


def take_launched_kernels() -> dict[str, tuple[int, int]]:
    """Threads per block and bytes of shared memory of every kernel launched since the last call, by name."""
    lines = emulated_library().emulator_launches().decode().splitlines()
    return {name: (int(threads), int(shared)) for name, threads, shared in (line.split("|") for line in lines)}
