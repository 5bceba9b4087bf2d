"""Installs the two operators for other people's networks: `from cc_attention import CrissCrossAttention`.

    pip install -e .

builds their native code in cc_attention/_C, once for every PyTorch from 2.10 and every Python from 3.10 on (LibTorch's
stable ABI). It needs a C++17 compiler; without one the package is installed all the same, and computes in plain
PyTorch. The scripts (train.py, evaluate.py) and what only they use run from the checkout.

CXX names the compiler. The CUDA kernels, cc_attention/_C_cuda, are built as well where PyTorch is a CUDA build and
nvcc is found: in CUDA_HOME, on the PATH, or among the installed nvidia-cuda-nvcc wheels, which

    pip install -e .[nvcc]

installs. On a machine with a GPU and without nvcc, pip fetches these wheels for the build by itself. FORCE_CUDA=1 does
so without a GPU too, and makes it an error to end without CUDA kernels; FORCE_CUDA=0 leaves them out.
TORCH_CUDA_ARCH_LIST names the architectures; by default they are those of the GPUs here, or all from sm_75 on. Where
the CUDA kernels cannot be built, a message says why and the package is installed without them.

This file is also the build backend that pyproject.toml names: setuptools', which in addition finds PyTorch in the
environment that a build was started from, and asks for the wheels of nvcc.
"""

import copy
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from glob import glob
from itertools import chain
from pathlib import Path

from setuptools import build_meta, setup

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)
OLDEST_ARCHITECTURE = (7, 5)  # the first with ldmatrix
ARCHITECTURES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]  # where there is no GPU to ask
JETSON_ARCHITECTURES = [(8, 7), (11, 0)]  # Orin and Thor, which are aarch64 and run no other architecture's code
COMPILER_PROBE = """
#include <type_traits>
#if defined(__clang__) ? __clang_major__ < 12 && !defined(__apple_build_version__) : __GNUC__ < 10
#error too old
#endif
static_assert(std::is_same_v<int, int>);
"""
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # of the release above
CXX_FLAGS = [
    "-std=c++17",
    "-O2",
    "-g0",
    "-Wall",
    "-Wno-psabi",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    f"-ffile-prefix-map={ROOT}/=",
]
# No path among them: nvcc splits values at commas and spaces.
NVCC_FLAGS = ["-std=c++17", "-O2", "-Xcompiler", "-fvisibility=hidden"]


class NoCuda(Exception):
    """Why the CUDA kernels cannot be built."""


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# ---- PyTorch ----


def site_packages() -> list[str]:
    return [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages()]


def surrounding_pythons() -> list[str]:
    """Interpreters of the environments that an isolated build may have been started from, the likeliest first.

    build and uv run this backend with an interpreter of an environment of its own, and do not say which is theirs.
    """
    found = []
    parent = Path(f"/proc/{os.getppid()}")
    if parent.exists():  # `.venv/bin/python -m build` itself
        program = (parent / "cmdline").read_bytes().split(b"\0")[0].decode()
        found += [os.path.join(os.readlink(parent / "cwd"), program)] if "/" in program else []
    environments = [os.environ[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if name in os.environ]
    environments += [str(folder / ".venv") for folder in (Path.cwd(), *Path.cwd().parents)]  # uv's rule
    found += [os.path.join(environment, "bin", "python") for environment in environments]
    found += [os.path.join(folder, "python3") for folder in os.get_exec_path()]
    found.append(getattr(sys, "_base_executable", sys.executable))
    return [python for python in dict.fromkeys(found) if "python" in Path(python).name and os.access(python, os.X_OK)]


def path_with_torch(python: str) -> list[str]:
    """sys.path of that interpreter if it is of this version and has PyTorch, otherwise nothing."""
    probe = (
        "import importlib.util as u, json, sys; print(json.dumps([sys.version, bool(u.find_spec('torch')), sys.path]))"
    )
    result = subprocess.run([python, "-c", probe], text=True, capture_output=True, cwd="/")
    if result.returncode != 0:
        return []
    version, has_torch, path = json.loads(result.stdout)
    same_version = version.split(".")[:2] == sys.version.split(".")[:2]
    return [folder for folder in path if folder] if has_torch and same_version else []


def find_torch():
    """PyTorch, of the environment that the build was started from if it is isolated; None if there is none."""
    hidden_by_pip = site_packages()  # of the same interpreter
    for folders in chain([[], hidden_by_pip], map(path_with_torch, surrounding_pythons())):
        sys.path += folders
        try:
            import torch
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
        else:
            return torch
    return None


def import_torch():
    torch = find_torch()
    if torch is None:
        raise SystemExit(
            f"error: PyTorch is needed to build the operators, and {sys.executable} cannot find it. Install it first: "
            "pip install 'torch>=2.10'. If it is there, build in its environment: pip install --no-build-isolation"
        )
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < MINIMUM_TORCH:
        raise SystemExit(f"error: expected PyTorch 2.10 or newer, found {torch.__version__}")
    return torch


# ---- compilers ----


def find_compiler() -> str | None:
    """The C++ compiler, if there is one. One that does not know C++17 is an error."""
    command = os.environ.get("CXX", "c++")
    if shutil.which(command.split()[0]) is None:
        if "CXX" in os.environ:
            raise SystemExit(f"error: CXX={command}: no such program")
        return None
    arguments = [*command.split(), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    result = subprocess.run(arguments, input=COMPILER_PROBE, text=True, capture_output=True)
    if result.returncode != 0:
        raise SystemExit(
            f"error: expected a C++17 compiler, GCC 10 or Clang 12 or newer, and {command} says:\n{result.stderr}"
        )
    return command


def find_nvcc() -> Path | None:
    """nvcc in CUDA_HOME, on the PATH or in the nvidia-cuda-nvcc wheels; a wrapper on the PATH is followed."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:
            nvcc = Path(os.environ[variable]) / "bin" / "nvcc"
            if nvcc.exists():
                return nvcc
            warn(f"{variable}={os.environ[variable]} is ignored: {nvcc} does not exist")
    on_path = shutil.which("nvcc")
    if on_path is not None:
        # nvcc says itself where its toolkit is: TOP=<toolkit>/bin/..
        dry_run = subprocess.run([on_path, "--dryrun", "-x", "cu", "/dev/null"], text=True, capture_output=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
        toolkit = Path(top[1]).resolve() if top else Path(on_path).resolve().parent.parent
        return toolkit / "bin" / "nvcc"
    folders = dict.fromkeys([*sys.path, *site_packages()])  # pip's isolated builds have what they need on sys.path
    return next((nvcc for folder in folders for nvcc in sorted(Path(folder).glob("nvidia/**/bin/nvcc"))), None)


def nvcc_wheels(torch) -> list[str]:
    """Requirements that bring nvcc for torch's CUDA. Before CUDA 13 there are none: those wheels lack nvcc itself."""
    major, minor = map(int, (torch.version.cuda or "0.0").split(".")[:2])
    names = ("cuda-nvcc", "cuda-crt", "cuda-cccl", "cuda-runtime", "nvvm")
    return [f"nvidia-{name}=={major}.{minor}.*" for name in names] if major >= 13 else []


def missing_nvcc_wheels() -> list[str]:
    """What a build of the CUDA kernels, if they are of use here, needs in addition."""
    torch = import_torch()
    wanted = os.environ.get("FORCE_CUDA", "1" if torch.cuda.is_available() else "0") == "1"
    return nvcc_wheels(torch) if wanted and find_nvcc() is None else []


def check_nvcc(nvcc: Path, cuda_of_torch: str) -> None:
    """nvcc is of the major version of CUDA that torch was built with."""
    result = subprocess.run([str(nvcc), "--version"], text=True, capture_output=True)
    release = re.search(r"release (\d+)\.(\d+)", result.stdout)
    if release is None:
        raise NoCuda(f"{nvcc} --version names no release: {result.stdout}{result.stderr}")
    if release[1] != cuda_of_torch.split(".")[0]:
        raise NoCuda(
            f"{nvcc} is of CUDA {release[1]}.{release[2]}, and this PyTorch is of CUDA {cuda_of_torch}: expected the "
            "same major version. Let CUDA_HOME name a toolkit that fits, or install a PyTorch that does"
        )


def cuda_toolkit(torch) -> Path:
    """The folder of the toolkit to compile CUDA sources with."""
    if torch.version.cuda is None:
        raise NoCuda(f"PyTorch {torch.__version__} was built without CUDA")
    nvcc = find_nvcc()
    if nvcc is None:
        wheels = nvcc_wheels(torch)
        needed = f"it: pip install {shlex.join(wheels)}" if wheels else f"a toolkit of CUDA {torch.version.cuda}"
        raise NoCuda(f"there is no nvcc: none in CUDA_HOME, on the PATH or in the wheels. Install {needed}")
    check_nvcc(nvcc, torch.version.cuda)
    return nvcc.parent.parent


def cuda_runtime(toolkit: Path) -> Path:
    """libcudart, by its file: wheels have no libcudart.so. PyTorch has loaded the same one when ours is loaded."""
    found = [path for folder in ("lib64", "lib", "targets/*/lib") for path in toolkit.glob(f"{folder}/libcudart.so*")]
    if not found:
        raise NoCuda(f"no libcudart.so in {toolkit}")
    return found[0]


def known_architectures(toolkit: Path) -> list[tuple[int, int]]:
    """What this nvcc compiles for and our kernels run on, as (major, minor)."""
    result = subprocess.run([str(toolkit / "bin" / "nvcc"), "--list-gpu-code"], text=True, capture_output=True)
    numbers = (int(number) for number in re.findall(r"^sm_(\d+)$", result.stdout, re.MULTILINE))
    known = sorted(divmod(number, 10) for number in numbers if divmod(number, 10) >= OLDEST_ARCHITECTURE)
    if not known:
        raise NoCuda(f"{toolkit}/bin/nvcc --list-gpu-code names none from 7.5 on: {result.stdout}{result.stderr}")
    return known


def default_architectures(torch, known: list[tuple[int, int]]) -> list[str]:
    """Those of the GPUs here, or, where there is none, those that GPUs have; with PTX for later ones."""
    gpus = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    if gpus:  # a GPU that is newer than nvcc runs the newest code that there is
        found = {gpu if gpu < OLDEST_ARCHITECTURE else max((a for a in known if a <= gpu), default=gpu) for gpu in gpus}
    else:
        common = ARCHITECTURES + (JETSON_ARCHITECTURES if platform.machine() == "aarch64" else [])
        found = set(common) & set(known) or {known[-1]}
    names = [f"{major}.{minor}" for major, minor in sorted(found)]
    return [*names[:-1], names[-1] + "+PTX"]


def architecture_flags(torch, toolkit: Path) -> list[str]:
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST.

    Passed by ourselves: torch would add none where a path among the flags has the letters "arch" in it.
    """
    from torch.utils import cpp_extension

    known = known_architectures(toolkit)
    names = [name for name in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if name]
    if names in ([], ["native"]):
        names = default_architectures(torch, known)
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names)
    try:
        flags = cpp_extension._get_cuda_arch_flags()  # knows names like Ampere
    except ValueError as error:
        raise NoCuda(f"TORCH_CUDA_ARCH_LIST={';'.join(names)}: {error}") from None
    kept, dropped = [], set()
    for flag in flags:
        architecture = divmod(int(re.search(r"compute_(\d+)", flag)[1]), 10)
        if architecture < OLDEST_ARCHITECTURE:
            dropped.add("{}.{}".format(*architecture))
            continue
        if architecture not in known:
            raise NoCuda(
                "{0}/bin/nvcc does not know architecture {2}.{3}, but {1}".format(
                    toolkit, ", ".join(f"{major}.{minor}" for major, minor in known), *architecture
                )
            )
        kept.append(flag)
    if not kept:
        raise NoCuda(f"the kernels need architecture 7.5 or newer, and this build is for {', '.join(sorted(dropped))}")
    if dropped:
        warn(f"the kernels need architecture 7.5 or newer: {', '.join(sorted(dropped))} left out")
    return kept


# ---- what is built ----


def leave_out_cuda(reason: Exception) -> None:
    if os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"error: FORCE_CUDA=1, and {reason}")
    warn(f"the CUDA kernels are left out: {reason}")


def cuda_extension(torch, **common):
    from torch.utils import cpp_extension

    toolkit = cuda_toolkit(torch)
    for folder in (str(ROOT), *cpp_extension.include_paths()):
        if "," in folder:
            raise NoCuda(f"nvcc splits the names of folders at commas: {folder}")
    flags = common["extra_compile_args"]
    flags = {**flags, "nvcc": flags["nvcc"] + architecture_flags(torch, toolkit)}
    cpp_extension.CUDA_HOME = str(toolkit)  # torch's own guess knows neither wrappers nor wheels
    sources = sorted(glob("*/csrc/cuda/*.cu"))
    extension = cpp_extension.CUDAExtension("cc_attention._C_cuda", sources, **{**common, "extra_compile_args": flags})
    extension.libraries.remove("cudart")
    extension.extra_objects.append(str(cuda_runtime(toolkit)))
    return extension


def extensions(torch) -> list:
    """cc_attention._C; and cc_attention._C_cuda, where it can be built."""
    from torch.utils import cpp_extension

    if find_compiler() is None:
        warn("no C++ compiler (CXX, c++): the operators will run in plain PyTorch")
        return []
    common = {
        "include_dirs": [str(ROOT)],
        "depends": [
            "setup.py",
            *(path for end in ("h", "cuh") for path in sorted(glob(f"*/csrc/**/*.{end}", recursive=True))),
        ],
        "extra_compile_args": {"cxx": CXX_FLAGS + STABLE_ABI, "nvcc": NVCC_FLAGS + STABLE_ABI + ["-DUSE_CUDA"]},
        "py_limited_api": True,
    }
    sources = sorted(glob("*/csrc/*.cpp") + glob("*/csrc/cpu/*.cpp"))
    found = [cpp_extension.CppExtension("cc_attention._C", sources, **common)]
    if os.environ.get("FORCE_CUDA") != "0":
        try:
            found.append(cuda_extension(torch, **common))
        except NoCuda as reason:
            leave_out_cuda(reason)
    return found


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / "native")  # pip's own is new each time: nothing would be kept

        def build_extensions(self):
            """One after the other: what stops the CUDA kernels, PyTorch's own checks included, stops nothing else."""
            compiler, wanted, built = self.compiler, self.extensions, []
            for extension in wanted:
                self.compiler, self.extensions = copy.copy(compiler), [extension]  # PyTorch changes the compiler
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:
                    if not extension.name.endswith("_C_cuda"):
                        raise
                    leave_out_cuda(error)
                    if self.inplace or self.editable_mode:  # the one before is of other sources
                        Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = built

    return Build


def main() -> None:
    if {"sdist", "egg_info"} & set(sys.argv):  # neither PyTorch nor a compiler is needed
        setup()
        return
    torch = import_torch()
    setup(
        extras_require={"nvcc": nvcc_wheels(torch)},
        ext_modules=extensions(torch),
        cmdclass={"build_ext": build_command()},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


# ---- what pip, build and uv call (PEP 517) ----


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """setuptools' own would run main() to find out, which needs them."""
    return ["torch>=2.10"] if find_torch() is None else missing_nvcc_wheels()


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []


get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_wheel, build_editable, build_sdist = build_meta.build_wheel, build_meta.build_editable, build_meta.build_sdist


if __name__ == "__main__":
    main()
