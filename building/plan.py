"""What this machine has, and what run_local.sh will therefore use and install; told before anything is installed.

    python -m building.plan [--device cpu]

prints the plan. With --shell, it goes to stderr, and stdout has variables for utils/environment.sh: TORCH, the
requirement of PyTorch, and REUSE, the folder of the environment that has it already. Needs only Python itself.
"""

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from utils.nvidia import Driver, Gpu, find_driver, find_gpus

from .compilers import NotBuilt, find_compiler
from .cuda import Nvcc, dotted, nvcc_programs
from .pytorch import MINIMUM, REQUIREMENT, release

# The last PyTorch whose build on PyPI is of CUDA 12 (12.8, x86-64 only). Later ones are of CUDA 13.
LAST_OF_CUDA_12 = "torch>=2.10,<2.11"
OLDEST_BY_CUDA = {12: (7, 0), 13: (7, 5)}  # architecture that these builds have code for
GIGABYTES = {True: 9, False: 2}  # that PyTorch and the rest take, with CUDA and without
PROBE = """
import json, os, torch
seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
folder = os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))
print(json.dumps([torch.__version__, torch.version.cuda, seen, folder]))
"""


@dataclass(frozen=True)
class Torch:
    """A PyTorch that is installed."""

    version: str
    cuda: str | None
    gpus: int  # that it can use
    folder: str  # where it and what it needs are installed
    python: str

    def __str__(self) -> str:
        return f"{self.version} ({f'CUDA {self.cuda}' if self.cuda else 'no CUDA'}) of {self.python}"


@dataclass(frozen=True)
class Facts:
    gpus: list[Gpu]
    driver: Driver
    torch: Torch | None
    nvcc: str | None  # the first one's path and version
    compiler: str | None
    free_gigabytes: float
    machine: str = "x86_64"


@dataclass(frozen=True)
class Plan:
    pytorch: str  # in words
    requirement: str = ""
    reuse: str = ""  # folder of the installed PyTorch that is used
    error: str = ""


def make_plan(facts: Facts, device: str = "auto") -> Plan:
    """Which PyTorch to use. A GPU that none can use is an error, unless device is cpu."""
    needs_gpu = bool(facts.gpus) and device != "cpu"
    here = facts.torch
    if here is not None and release(here.version) >= MINIMUM and (here.gpus > 0 or not needs_gpu):
        return Plan(f"{here}, which is here", f"torch=={here.version.split('+')[0]}", here.folder)  # so pip leaves it
    requirement, error = requirement_for(facts) if needs_gpu else (REQUIREMENT, "")
    with_cuda = (sys.platform == "linux" and facts.machine == "x86_64") or needs_gpu
    if not error and facts.free_gigabytes < GIGABYTES[with_cuda]:
        error = f"expected {GIGABYTES[with_cuda]} GB of free disk for PyTorch, found {facts.free_gigabytes:.1f}"
    if error:
        return Plan("none", error=error)
    instead = f", since {here} does not see the GPU" if needs_gpu and here is not None else ""
    return Plan(f"{requirement} is installed into .venv{instead}", requirement)


def requirement_for(facts: Facts) -> tuple[str, str]:
    """The PyTorch to install for these GPUs and their driver; or an error."""
    gpu = min(facts.gpus, key=lambda gpu: gpu.architecture or (99, 0))
    this = f"{gpu} with {facts.driver}"
    cpu = "or give --device cpu"
    if facts.driver.cuda is None:
        return "", f"{this}: expected nvidia-smi to tell the driver's version of CUDA. Mend the driver, {cpu}"
    major = min(facts.driver.cuda[0], 13)
    if major < 12:
        return "", f"{this}: expected a driver for CUDA 12 (525 or newer). Update it, {cpu}"
    if gpu.architecture is not None and gpu.architecture < OLDEST_BY_CUDA[13]:
        major = 12  # later builds have no code for it
    if gpu.architecture is not None and gpu.architecture < OLDEST_BY_CUDA[12]:
        return "", f"{this}: PyPI's PyTorch has no code for it. {own_build('12.6')}, {cpu}"
    if major == 12 and facts.machine != "x86_64":
        return "", f"{this}: PyPI has no PyTorch of CUDA 12 for {facts.machine}. {own_build('12.8')}, {cpu}"
    return (REQUIREMENT if major == 13 else LAST_OF_CUDA_12), ""


def own_build(cuda: str) -> str:
    return (
        f"Install the build of CUDA {cuda} that pytorch.org has (torch and torchvision) into an environment, "
        "and let PYTHON name its python"
    )


def lines(facts: Facts, plan: Plan) -> list[str]:
    count = f"{len(facts.gpus)} x " if len(facts.gpus) > 1 else ""
    told = {
        "GPU": f"{count}{facts.gpus[0]}, {facts.driver}" if facts.gpus else "none",
        "PyTorch": plan.pytorch,
        "compilers": f"{facts.compiler or 'no C++ compiler that works'}; {facts.nvcc or 'no nvcc'}",
        "native": native(facts),
    }
    return [f"{name + ':':11}{text}" for name, text in told.items()]


def native(facts: Facts) -> str:
    if facts.compiler is None:
        return "nothing: the operators will run in plain PyTorch"
    if not facts.gpus:
        return "the operators on the CPU"
    if facts.nvcc is None and (facts.driver.cuda or (0, 0)) < (13, 0):
        return "the operators on the CPU; on the GPU after installing a toolkit of CUDA 12"
    return "the operators on CPU and GPU" + ("" if facts.nvcc else ", with nvcc from PyPI")


# ---- the facts of this machine ----


def find_torch(python: str) -> Torch | None:
    result = subprocess.run([python, "-W", "ignore", "-c", PROBE], text=True, capture_output=True)
    if result.returncode != 0:
        return None
    version, cuda, gpus, folder = json.loads(result.stdout)
    return Torch(version, cuda, gpus, folder, python)


def compiler_name() -> str | None:
    try:
        return shlex.join(find_compiler().command)
    except NotBuilt:
        return None


def nvcc_name() -> str | None:
    for program in nvcc_programs():
        try:
            return f"nvcc {dotted(Nvcc(program, ()).release())} ({program})"
        except NotBuilt:
            continue  # the build will say why it is of no use
    return None


def find_facts(python: str) -> Facts:
    return Facts(
        gpus=find_gpus(),
        driver=find_driver(),
        torch=find_torch(python),
        nvcc=nvcc_name(),
        compiler=compiler_name(),
        free_gigabytes=shutil.disk_usage(Path.cwd()).free / 1e9,
        machine=platform.machine(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="What run_local.sh will use and install on this machine.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment that is active")
    parser.add_argument("--shell", action="store_true", help="print variables for utils/environment.sh")
    args = parser.parse_args()
    facts = find_facts(args.python)
    plan = make_plan(facts, args.device)
    print(*lines(facts, plan), sep="\n", file=sys.stderr if args.shell else sys.stdout)
    if plan.error:
        print(f"error: {plan.error}", file=sys.stderr)
        return 2
    if args.shell:
        print(f"REUSE={shlex.quote(plan.reuse)} TORCH={shlex.quote(plan.requirement)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
