"""Installs the two operators for other people's networks: `from cc_attention import CrissCrossAttention`.

    pip install -e .

builds their native code, cc_attention/_C, once for all versions of PyTorch from MINIMUM_TORCH and of Python from 3.10
(LibTorch's stable ABI). It needs a C++17 compiler; without one the package is installed without native code, and
computes in plain PyTorch. The scripts, train.py and evaluate.py, and packages that only they use are not installed.

CXX names the compiler. The CUDA kernels, cc_attention/_C_cuda, are built too if PyTorch is a CUDA build and nvcc is
found: in CUDA_HOME, on the PATH, or in the nvidia-cuda-nvcc wheels, which

    pip install -e .[nvcc]

installs. On a machine with a GPU but no nvcc, pip installs these wheels for the build. FORCE_CUDA=1 does so without a
GPU too, and makes it an error if the CUDA kernels are not built; FORCE_CUDA=0 leaves them out. TORCH_CUDA_ARCH_LIST
names the architectures; the default is those of the GPUs here, or all from sm_75 on. If the CUDA kernels cannot be
built, a message says why and the package is installed without them.

This file is also the build backend that pyproject.toml names. It extends that of setuptools: it finds PyTorch in the
environment from which a build was started, and requires the nvcc wheels.
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
MINIMUM_TORCH = (2, 10)  # also in pyproject.toml and requirements.txt
TORCH_REQUIREMENT = "torch>={}.{}".format(*MINIMUM_TORCH)
OLDEST_ARCHITECTURE = (7, 5)  # the first with ldmatrix
ARCHITECTURES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]  # if there is no GPU
JETSON_ARCHITECTURES = [(8, 7), (11, 0)]  # Orin and Thor (aarch64), which do not run code for others
COMPILER_PROBE = """
#include <type_traits>
#if defined(__clang__) ? __clang_major__ < 12 && !defined(__apple_build_version__) : __GNUC__ < 10
#error too old
#endif
static_assert(std::is_same_v<int, int>);
"""
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*MINIMUM_TORCH)]
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
# They contain no paths, since nvcc splits values at commas and spaces.
NVCC_FLAGS = ["-std=c++17", "-O2", "-Xcompiler", "-fvisibility=hidden"]


class NoCuda(Exception):
    """The CUDA kernels cannot be built; the message says why."""


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# ---- PyTorch ----


def site_packages() -> list[str]:
    return [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages()]


def surrounding_pythons() -> list[str]:
    """Interpreters of the environments from which an isolated build may have been started, the most likely first.

    build and uv run this backend in a new environment, and do not say from which environment they were called.
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
    """sys.path of an interpreter if it has PyTorch and is of the same Python version, otherwise an empty list."""
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
    """Import PyTorch; in an isolated build, from the environment that started it. None if it is not found."""
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
            f"pip install '{TORCH_REQUIREMENT}'. If it is installed, build in its environment: pip install "
            "--no-build-isolation"
        )
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < MINIMUM_TORCH:
        raise SystemExit(f"error: expected {TORCH_REQUIREMENT}, found {torch.__version__}")
    return torch


# ---- compilers ----


def find_compiler() -> str | None:
    """The command of the C++ compiler; None if there is none. A compiler that is too old is an error."""
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
    """nvcc in CUDA_HOME, on the PATH (of a wrapper, the nvcc that it runs) or in the nvidia-cuda-nvcc wheels."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:
            nvcc = Path(os.environ[variable]) / "bin" / "nvcc"
            if nvcc.exists():
                return nvcc
            warn(f"{variable}={os.environ[variable]} is ignored: {nvcc} does not exist")
    on_path = shutil.which("nvcc")
    if on_path is not None:
        # nvcc prints where its toolkit is: TOP=<toolkit>/bin/..
        dry_run = subprocess.run([on_path, "--dryrun", "-x", "cu", "/dev/null"], text=True, capture_output=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
        toolkit = Path(top[1]).resolve() if top else Path(on_path).resolve().parent.parent
        return toolkit / "bin" / "nvcc"
    folders = dict.fromkeys([*sys.path, *site_packages()])  # isolated builds have the wheels on sys.path
    return next((nvcc for folder in folders for nvcc in sorted(Path(folder).glob("nvidia/**/bin/nvcc"))), None)


def nvcc_wheels(torch) -> list[str]:
    """Requirements for the nvcc of torch's CUDA version; empty before CUDA 13, whose wheels do not contain nvcc."""
    major, minor = map(int, (torch.version.cuda or "0.0").split(".")[:2])
    names = ("cuda-nvcc", "cuda-crt", "cuda-cccl", "cuda-runtime", "nvvm")
    return [f"nvidia-{name}=={major}.{minor}.*" for name in names] if major >= 13 else []


def missing_nvcc_wheels() -> list[str]:
    """Additional requirements of a build of the CUDA kernels, if they are wanted here."""
    torch = import_torch()
    wanted = os.environ.get("FORCE_CUDA", "1" if torch.cuda.is_available() else "0") == "1"
    return nvcc_wheels(torch) if wanted and find_nvcc() is None else []


def check_nvcc(nvcc: Path, cuda_of_torch: str) -> None:
    """Raise NoCuda unless nvcc has the major version of CUDA that torch was built with."""
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
    """The folder of the CUDA toolkit to compile with."""
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
    """The versioned file of libcudart (wheels have no libcudart.so). PyTorch loads the same library before ours."""
    found = [path for folder in ("lib64", "lib", "targets/*/lib") for path in toolkit.glob(f"{folder}/libcudart.so*")]
    if not found:
        raise NoCuda(f"no libcudart.so in {toolkit}")
    return found[0]


def known_architectures(toolkit: Path) -> list[tuple[int, int]]:
    """The architectures, (major, minor), that this nvcc supports and our kernels run on."""
    result = subprocess.run([str(toolkit / "bin" / "nvcc"), "--list-gpu-code"], text=True, capture_output=True)
    numbers = (int(number) for number in re.findall(r"^sm_(\d+)$", result.stdout, re.MULTILINE))
    known = sorted(divmod(number, 10) for number in numbers if divmod(number, 10) >= OLDEST_ARCHITECTURE)
    if not known:
        raise NoCuda(f"{toolkit}/bin/nvcc --list-gpu-code names none from 7.5 on: {result.stdout}{result.stderr}")
    return known


def default_architectures(torch, known: list[tuple[int, int]]) -> list[str]:
    """The architectures of the GPUs here, or if there is none, ARCHITECTURES; with PTX for later ones."""
    gpus = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    if gpus:  # a GPU that is newer than nvcc gets the newest code that nvcc can compile
        found = {gpu if gpu < OLDEST_ARCHITECTURE else max((a for a in known if a <= gpu), default=gpu) for gpu in gpus}
    else:
        common = ARCHITECTURES + (JETSON_ARCHITECTURES if platform.machine() == "aarch64" else [])
        found = set(common) & set(known) or {known[-1]}
    names = [f"{major}.{minor}" for major, minor in sorted(found)]
    return [*names[:-1], names[-1] + "+PTX"]


def architecture_flags(torch, toolkit: Path) -> list[str]:
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST.

    We pass them ourselves, since torch adds none if a path among the flags contains "arch".
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


# ---- extensions ----


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
    """cc_attention._C and, if it can be built, cc_attention._C_cuda."""
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
            self.build_temp = str(ROOT / "build" / "native")  # kept between builds, unlike pip's temporary folder

        def build_extensions(self):
            """Build one extension after the other; if the CUDA kernels fail, the other one is built nevertheless."""
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
                    if self.inplace or self.editable_mode:  # an old library is of other sources
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


# ---- build backend (PEP 517), called by pip, build and uv ----


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """In place of setuptools' hook, which would run main(), which already needs these requirements."""
    return [TORCH_REQUIREMENT] if find_torch() is None else missing_nvcc_wheels()


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []


get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_wheel, build_editable, build_sdist = build_meta.build_wheel, build_meta.build_editable, build_meta.build_sdist


if __name__ == "__main__":
    main()
