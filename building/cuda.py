"""Finds nvcc, and tells what it compiles for."""

import itertools
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .compilers import Compiler, NotBuilt, find_compiler, first_error, run, warn
from .pytorch import site_packages

OLDEST_RELEASE = (12, 0)
OLDEST_ARCHITECTURE = (7, 5)  # the first with ldmatrix
CP_ASYNC_FROM = (8, 0)  # what __CUDA_ARCH__ decides over in the kernels
ARCHITECTURES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]  # if there is no GPU
JETSON_ARCHITECTURES = [(8, 7), (11, 0)]  # Orin and Thor (aarch64), which do not run code for others
GENERATIONS = {  # PyTorch's names for them
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0 8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 12.0+PTX",
}
# What the kernels need: headers, a host compiler that nvcc accepts, and the runtime library
PROBE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void kernel() {}
cudaError_t launch() { return kernel<<<1, 1>>>(), cudaGetLastError(); }
"""


def forced() -> bool:
    """Whether the library is made for other machines too, and has to be made."""
    return os.environ.get("FORCE_CUDA") == "1"


def dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


@dataclass(frozen=True)
class Nvcc:
    program: str
    host: tuple[str, ...]  # flags that name the host compiler

    def command(self) -> list[str]:
        return [self.program, *self.host, "-Xcompiler=-fPIC", "--cudart=static"]

    def environment(self) -> dict[str, str]:
        """In the wheels, nvcc does not find its own libraries."""
        folders = [str(Path(self.program).parents[1] / "lib"), os.environ.get("LIBRARY_PATH", "")]
        return {"LIBRARY_PATH": os.pathsep.join(filter(None, folders))}

    def release(self) -> tuple[int, int]:
        _, output = run([self.program, "--version"])
        found = re.search(r"release (\d+)\.(\d+)", output)
        if found is None:
            raise NotBuilt(f"{self.program} --version: {first_error(output)}")
        return int(found[1]), int(found[2])

    def architectures(self) -> list[tuple[int, int]]:
        """Those, as (major, minor), that it compiles for and our kernels run on."""
        _, output = run([self.program, "--list-gpu-code"])
        numbers = (int(number) for number in re.findall(r"^sm_(\d+)$", output, re.MULTILINE))
        known = sorted(divmod(number, 10) for number in numbers if divmod(number, 10) >= OLDEST_ARCHITECTURE)
        if not known:
            raise NotBuilt(f"{self.program} --list-gpu-code names none from 7.5 on: {first_error(output)}")
        return known

    def check(self, torch: ModuleType) -> None:
        """Raise NotBuilt if it cannot build a library that runs here, or when forced, anywhere."""
        release = self.release()
        if release < OLDEST_RELEASE:
            raise NotBuilt(f"{self.program} is of CUDA {dotted(release)}: expected {dotted(OLDEST_RELEASE)} or newer")
        if torch.cuda.is_available() and not forced():
            driver = torch._C._cuda_getDriverVersion()  # 12040 for 12.4
            if driver // 1000 < release[0]:
                raise NotBuilt(
                    f"{self.program} is of CUDA {dotted(release)}, and the GPU's driver runs code of CUDA "
                    f"{driver // 1000} at most"
                )
        self.architectures()
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cu")
            source.write_text(PROBE)
            command = [*self.command(), "-shared", source, "-o", f"{folder}/probe.so"]
            works, output = run(command, **self.environment())
        if not works:
            raise NotBuilt(f"{self.program}: {first_error(output)}{advice(output)}")


def advice(output: str) -> str:
    """What to do about an error of nvcc."""
    if re.search(r"unsupported (GNU|clang|compiler|version)", output, re.IGNORECASE):
        return " Let CUDAHOSTCXX or NVCC_CCBIN name a C++ compiler that this nvcc accepts"
    return ""


def hosts(compiler: Compiler) -> list[tuple[str, ...]]:
    """nvcc's flags for the host compiler that the environment names; otherwise for ours, or else nvcc's own choice.

    That of Debian's nvcc is one that it accepts, where the machine's is too new.
    """
    named = os.environ.get("CUDAHOSTCXX") or os.environ.get("NVCC_CCBIN")
    if named:
        return [("-ccbin", named)]
    if any("-ccbin" in os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")):  # conda's
        return [()]
    return [("-ccbin", compiler.program, *(f"-Xcompiler={flag}" for flag in compiler.flags)), ()]


def nvcc_programs() -> Iterator[str]:
    """nvcc in CUDA_HOME, on the PATH and in the wheels."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            nvcc = Path(os.environ[variable]) / "bin" / "nvcc"
            if nvcc.exists():
                yield str(nvcc)
            else:
                warn(f"{variable}={os.environ[variable]} is ignored: {nvcc} does not exist")
    on_path = shutil.which("nvcc")
    if on_path is not None:
        yield on_path
    for folder in dict.fromkeys([*sys.path, *site_packages()]):  # isolated builds have the wheels on sys.path
        yield from map(str, sorted(Path(folder).glob("nvidia/**/bin/nvcc")))


def find_nvcc(torch: ModuleType, compiler: Compiler) -> Nvcc:
    """The first nvcc that is of use."""
    reasons: dict[str, str] = {}  # by program: with the machine's compiler, the one to tell
    for program, host in itertools.product(dict.fromkeys(nvcc_programs()), hosts(compiler)):
        nvcc = Nvcc(program, host)
        try:
            nvcc.check(torch)
        except NotBuilt as reason:
            reasons.setdefault(program, str(reason))
        else:
            for other in reasons.keys() - {program}:
                warn(f"not used: {reasons[other]}")
            return nvcc
    wheels = nvcc_wheels(torch)
    needed = (
        f"pip install {shlex.join(wheels)}" if wheels else "install a toolkit of CUDA 12, and let CUDA_HOME name it"
    )
    found = "; ".join(reasons.values()) or "there is no nvcc, in CUDA_HOME, on the PATH or in wheels"
    raise NotBuilt(f"{found}. This helps: {needed}")


def nvcc_wheels(torch: ModuleType) -> list[str]:
    """The requirement of the nvcc of torch's CUDA version; none before CUDA 13, whose wheels do not contain nvcc."""
    major, minor = map(int, (torch.version.cuda or "0.0").split(".")[:2])
    return [f"cuda-toolkit[nvcc,crt,cccl,cudart,nvvm]=={major}.{minor}.*"] if major >= 13 else []


def missing_nvcc_wheels(torch: ModuleType) -> list[str]:
    """Additional requirements of a build of the CUDA kernels, if they are wanted here and nothing else is of use."""
    wanted = os.environ.get("FORCE_CUDA", "1" if torch.cuda.is_available() else "0") == "1"
    if not (wanted and nvcc_wheels(torch)):
        return []
    try:
        compiler = find_compiler()
    except NotBuilt:  # which the build will report
        return []
    try:
        find_nvcc(torch, compiler)
    except NotBuilt:
        return nvcc_wheels(torch)
    return []


# ---- architectures ----


def default_architectures(torch: ModuleType, known: list[tuple[int, int]]) -> list[str]:
    """The architectures of the GPUs here; if there is none, or when forced, ARCHITECTURES. With PTX for later ones."""
    gpus = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    if gpus and not forced():  # a GPU that is newer than nvcc gets the newest code that nvcc can compile
        found = {gpu if gpu < OLDEST_ARCHITECTURE else max((a for a in known if a <= gpu), default=gpu) for gpu in gpus}
    else:
        common = ARCHITECTURES + (JETSON_ARCHITECTURES if platform.machine() == "aarch64" else [])
        found = set(common) & set(known) or {known[-1]}
    names = [dotted(architecture) for architecture in sorted(found)]
    return [*names[:-1], names[-1] + "+PTX"]


def architectures_of(name: str) -> list[tuple[tuple[int, int], str]]:
    """What a word of TORCH_CUDA_ARCH_LIST stands for: architectures, each with a kind of code, sm or compute (PTX)."""
    words = GENERATIONS.get(name, name).split()
    found = [re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", word) for word in words]  # we use nothing that a and f allow
    matches = [match for match in found if match is not None]
    if len(matches) < len(words):
        raise NotBuilt(f"TORCH_CUDA_ARCH_LIST has {name}: expected 8.0, 8.0+PTX and such, or {', '.join(GENERATIONS)}")
    return [
        ((int(match[1]), int(match[2])), kind)
        for match in matches
        for kind in (("sm", "compute") if match[3] else ("sm",))
    ]


def architecture_flags(torch: ModuleType, known: list[tuple[int, int]]) -> list[str]:
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST, or for default_architectures().

    Kernels differ at 8.0 alone, so PTX for 7.5 and for 8.0 serves all architectures: to make it is most of a build's
    time, and from PTX of their own sm_100 and sm_120 get 6% more instructions.
    """
    names = [name for name in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if name]
    if names in ([], ["native"]):
        names = default_architectures(torch, known)
    wanted = [pair for name in names for pair in architectures_of(name)]
    unknown = sorted({architecture for architecture, _ in wanted} - set(known))
    if unknown and unknown[-1] > known[-1]:  # it runs the newest code that this nvcc can compile
        wanted += architectures_of(f"{dotted(known[-1])}+PTX")
    kept = [pair for pair in wanted if pair[0] in known]
    expected = f"the kernels need architecture 7.5 or newer, and this nvcc knows {', '.join(map(dotted, known))}"
    if not kept:
        raise NotBuilt(f"{expected}: there is nothing to build for {', '.join(map(dotted, unknown))}")
    if unknown:
        warn(f"{expected}: no code for {', '.join(map(dotted, unknown))}")
    flags = []
    for architecture, kind in kept:
        ptx = min(a for a in known if (a >= CP_ASYNC_FROM) == (architecture >= CP_ASYNC_FROM))
        code = architecture if kind == "sm" else ptx
        flags.append("-gencode=arch=compute_{}{},code={}_{}{}".format(*ptx, kind, *code))
    return list(dict.fromkeys(flags))
