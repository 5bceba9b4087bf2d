"""Compiles and links the two libraries: `_C`, the operators and their CPU kernels, and `_C_cuda`.

ninja runs the compilers. PyTorch's own BuildExtension is not used: it wants nvcc of the major version of PyTorch's
CUDA, links a shared cudart, takes CC and CXX for single words, and builds all files or nothing.
"""

import importlib.util
import os
import re
import shlex
import sys
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from types import ModuleType

from .compilers import NotBuilt, find_compiler, first_error, run, warn
from .cuda import advice, architecture_flags, find_nvcc
from .pytorch import STABLE_ABI

OBJECTS = Path("build/native")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")  # Capability of capability.h: each has all before it
# Paths are relative, and PyTorch's folders come by environment variables: nvcc splits flags at commas.
COMMON_FLAGS = ["-std=c++17", "-O2", "-I.", STABLE_ABI]
CXX_FLAGS = [*COMMON_FLAGS, "-fPIC", "-Wall", "-Wno-psabi", "-ffp-contract=fast", "-fvisibility=hidden"]
NVCC_FLAGS = [*COMMON_FLAGS, "-Xcompiler=-fvisibility=hidden", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
NVCC_FLAGS += ["-Xfatbin=-compress-all"]  # a third of the size; nvcc alone compresses only PTX


@dataclass(frozen=True)
class Job:
    """Compiles one source."""

    source: str
    command: list[str]  # without the names of files
    environment: dict[str, str]

    def path(self, suffix: str) -> Path:
        return OBJECTS / Path(self.source).with_suffix(suffix)

    def rule(self) -> str:
        """For ninja, which compiles again where the command or any file that was read has changed."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        command = " ".join([*variables, shlex.join(self.command)]).replace("$", "$$")
        return f"build {self.path('.o')}: compile {self.source}\n  command_without_files = {command}\n"


RULES = """ninja_required_version = 1.5
builddir = {folder}
rule compile
  command = $command_without_files -MMD -MF $out.d -c $in -o $out
  description = $in
  deps = gcc
  depfile = $out.d
"""


def ninja() -> list[str]:
    """That of the environment, if it has one: another version would not read its log, and compile all again."""
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]


def processes() -> int:
    return int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))


def compile_all(jobs: list[Job]) -> dict[str, str]:
    """Compile side by side what is not done. Returns the first error of each source that fails."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    plan = OBJECTS / f"{Path(jobs[0].source).suffix[1:]}.ninja"
    plan.write_text(RULES.format(folder=OBJECTS) + "".join(job.rule() for job in jobs))
    works, output = run([*ninja(), "-f", plan, "-k", "0", "-j", processes()], NINJA_STATUS="[%f/%t] ")
    printed = re.split(r"^\[\d+/\d+\] .*\n|^ninja: .*\n?", output, flags=re.MULTILINE)
    failures = {}
    for text in filter(None, printed):
        failed = re.match(r"FAILED: (?:\[code=(\d+)\] )?(\S+) *\n.*\n", text)
        if failed is None:
            print(text, file=sys.stderr)  # warnings
            continue
        job = next(job for job in jobs if str(job.path(".o")) == failed[2])
        job.path(".log").write_text(text)
        error = first_error(text[failed.end() :]) + ended_by_signal(int(failed[1] or 0))
        failures[job.source] = f"{error}{advice(text)} (all of it: {job.path('.log')})"
    if not works and not failures:
        raise NotBuilt(f"ninja: {first_error(output)}")
    return failures


def ended_by_signal(code: int) -> str:
    """As the shell tells, by which ninja runs a command."""
    return f"; it was ended by signal {code - 128}" if code > 128 else ""


def torch_folders(torch: ModuleType, **environment: str) -> dict[str, str]:
    """Variables by which compilers find PyTorch's headers and libraries."""
    folder = Path(torch.__path__[0])
    own = {"CPLUS_INCLUDE_PATH": str(folder / "include"), "LIBRARY_PATH": str(folder / "lib")}
    before = {name: environment.get(name, os.environ.get(name)) for name in own}
    return {name: f"{path}:{before[name]}" if before[name] else path for name, path in own.items()}


def from_environment(*names: str) -> list[str]:
    return [word for name in names for word in shlex.split(os.environ.get(name, ""))]


def link(command: list[str], jobs: list[Job], libraries: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a process that has loaded it keeps what it has
    objects = [str(job.path(".o")) for job in jobs]
    works, output = run([*command, "-shared", *objects, *libraries, "-o", str(target)], **jobs[0].environment)
    if not works:
        raise NotBuilt(f"{first_error(output)}{advice(output)}")


def needs(library: Path) -> str:
    """Its size, and the newest glibc whose symbols it asks for."""
    versions = [tuple(map(int, found)) for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())]
    glibc = ", needs glibc {}.{}".format(*max(versions)) if versions else ""
    return f"{library.stat().st_size / 1e6:.1f} MB{glibc}"


# ---- the two libraries ----


def instruction_set_of(source: str) -> int:
    """The number of the instruction set that alone the source is for; 0 if it is for all machines."""
    name = re.search(r"_(avx\w+)\.cpp$", source)
    return INSTRUCTION_SETS.index(name[1]) if name else 0


def build_cpu(torch: ModuleType, target: Path) -> str:
    """Build `_C`, without those instruction sets that the compiler fails at. Returns what was built."""
    compiler, environment = find_compiler(), torch_folders(torch)
    sources = sorted(glob("*/csrc/*.cpp") + glob("*/csrc/cpu/*.cpp"))
    command = [*compiler.command, *from_environment("CPPFLAGS", "CXXFLAGS"), *CXX_FLAGS]
    best = len(INSTRUCTION_SETS) - 1
    while True:
        built = [source for source in sources if instruction_set_of(source) <= best]
        limit = [] if best == len(INSTRUCTION_SETS) - 1 else [f"-DCCNET_BEST_CAPABILITY={INSTRUCTION_SETS[best]}"]
        jobs = [Job(x, command if instruction_set_of(x) else [*command, *limit], environment) for x in built]
        failures = compile_all(jobs)
        if not failures:
            break
        source = min(failures, key=instruction_set_of)
        if instruction_set_of(source) == 0:
            raise NotBuilt(failures[source])
        best = instruction_set_of(source) - 1
        left_out = ", ".join(INSTRUCTION_SETS[best + 1 :])
        warn(f"the kernels for {left_out} are left out, which this compiler fails at: {failures[source]}")
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    link([*compiler.command, *from_environment("LDFLAGS"), *undefined], jobs, ["-ltorch_cpu"], target)
    return f"instruction sets up to {INSTRUCTION_SETS[best]}"


def build_cuda(torch: ModuleType, target: Path) -> str:
    """Build `_C_cuda`. nvcc links it, since it knows where its libraries are. Returns what was built."""
    if os.environ.get("FORCE_CUDA") == "0":
        raise NotBuilt("FORCE_CUDA=0")
    if torch.version.cuda is None:
        raise NotBuilt(f"PyTorch {torch.__version__} was built without CUDA")
    nvcc = find_nvcc(torch, find_compiler())
    architectures = architecture_flags(torch, nvcc.architectures())
    environment = torch_folders(torch, **nvcc.environment())
    command = [*nvcc.command(), *NVCC_FLAGS, *architectures]
    jobs = [Job(source, command, environment) for source in sorted(glob("*/csrc/cuda/*.cu"))]
    failures = compile_all(jobs)
    if failures:
        raise NotBuilt(next(iter(failures.values())))
    link([*nvcc.command(), "--no-device-link"], jobs, ["-ltorch_cuda", "-ltorch_cpu"], target)
    names = ", ".join(sorted({name for flag in architectures for name in re.findall(r",code=(\w+)", flag)}))
    release = nvcc.release()
    return f"by CUDA {release[0]}.{release[1]} for {names}; needs a driver of CUDA {release[0]} or newer"
