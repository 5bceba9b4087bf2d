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
TORCH_CUDA_ARCH_LIST names the architectures; by default they are those of the GPUs here, or all from sm_75 on.

This file is also the build backend that pyproject.toml names: setuptools', which in addition asks for those wheels.
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import build_meta, setup

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # where there is no GPU to ask
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
NVCC_FLAGS = ["-std=c++17", "-O2", "-Xcompiler", f"-fvisibility=hidden,-ffile-prefix-map={ROOT}/="]


def site_packages() -> list[str]:
    return [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages()]


def import_torch():
    """PyTorch of the environment that is installed into, which pip's isolated builds hide."""
    try:
        import torch
    except ImportError:
        sys.path += site_packages()
        try:
            import torch
        except ImportError as error:
            raise SystemExit(
                f"error: PyTorch is needed to build the operators and cannot be imported by {sys.executable} "
                f"({error}). Install it first: pip install 'torch>=2.10'. If it is there, build in its environment: "
                "pip install --no-build-isolation"
            ) from None
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < MINIMUM_TORCH:
        raise SystemExit(f"error: expected PyTorch 2.10 or newer, found {torch.__version__}")
    return torch


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
            if not nvcc.exists():
                raise SystemExit(f"error: {variable}={os.environ[variable]}: expected {nvcc}, which does not exist")
            return nvcc
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
        raise SystemExit(f"error: {nvcc} --version names no release: {result.stdout}{result.stderr}")
    if release[1] != cuda_of_torch.split(".")[0]:
        raise SystemExit(
            f"error: {nvcc} is of CUDA {release[1]}.{release[2]}, and this PyTorch is of CUDA {cuda_of_torch}: "
            "expected the same major version. Let CUDA_HOME name a toolkit that fits, install a PyTorch that does, or "
            "leave the CUDA kernels out with FORCE_CUDA=0"
        )


def cuda_toolkit(torch) -> Path | None:
    """The folder of the toolkit to compile CUDA sources with, None for none."""
    forced = os.environ.get("FORCE_CUDA") == "1"
    if os.environ.get("FORCE_CUDA") == "0":
        return None
    if torch.version.cuda is None:
        if forced:
            raise SystemExit(f"error: FORCE_CUDA=1, and PyTorch {torch.__version__} was built without CUDA")
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if forced:
            wheels = nvcc_wheels(torch)
            needed = f"it: pip install {shlex.join(wheels)}" if wheels else f"a toolkit of CUDA {torch.version.cuda}"
            raise SystemExit(
                "error: FORCE_CUDA=1, and there is no nvcc: none in CUDA_HOME, on the PATH or in the wheels. "
                f"Install {needed}"
            )
        return None
    check_nvcc(nvcc, torch.version.cuda)
    return nvcc.parent.parent


def cuda_runtime(toolkit: Path) -> Path:
    """libcudart, by its file: wheels have no libcudart.so. PyTorch has loaded the same one when ours is loaded."""
    found = [path for folder in ("lib64", "lib", "targets/*/lib") for path in toolkit.glob(f"{folder}/libcudart.so*")]
    if not found:
        raise SystemExit(f"error: no libcudart.so in {toolkit}")
    return found[0]


def set_architectures(torch, toolkit: Path) -> None:
    """Tell torch's build code for which architectures to compile, unless the user or the GPUs here do."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ or torch.cuda.is_available():
        return
    result = subprocess.run([str(toolkit / "bin" / "nvcc"), "--list-gpu-code"], text=True, capture_output=True)
    known = [name for name in ARCHITECTURES if f"sm_{name.replace('.', '')}" in result.stdout.split()]
    if not known:
        raise SystemExit(
            f"error: {toolkit}/bin/nvcc --list-gpu-code names none of ours: {result.stdout}{result.stderr}"
        )
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(known) + "+PTX"


def extensions(torch) -> list:
    """cc_attention._C; and cc_attention._C_cuda, where there is nvcc."""
    from torch.utils import cpp_extension

    if find_compiler() is None:
        print("warning: no C++ compiler (CXX, c++): the operators will run in plain PyTorch", file=sys.stderr)
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
    toolkit = cuda_toolkit(torch)
    if toolkit is not None:
        set_architectures(torch, toolkit)
        cpp_extension.CUDA_HOME = str(toolkit)  # torch's own guess knows neither wrappers nor wheels
        cuda = cpp_extension.CUDAExtension("cc_attention._C_cuda", sorted(glob("*/csrc/cuda/*.cu")), **common)
        cuda.libraries.remove("cudart")
        cuda.extra_objects.append(str(cuda_runtime(toolkit)))
        found.append(cuda)
    return found


def main() -> None:
    torch = import_torch()
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / "native")  # pip's own is new each time: nothing would be kept

    setup(
        name="ccnet",
        version="0.1.0",
        description="Criss-cross attention and in-place activated batch norm, as in CCNet",
        license="MIT",
        python_requires=">=3.10",
        packages=["cc_attention", "libs"],
        install_requires=["torch>=2.10"],
        extras_require={"nvcc": nvcc_wheels(torch)},
        ext_modules=extensions(torch),
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


# ---- what pip calls (PEP 517) ----


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return missing_nvcc_wheels()  # setuptools' would run main() to find out, which needs them


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_wheel, build_editable, build_sdist = build_meta.build_wheel, build_meta.build_editable, build_meta.build_sdist


if __name__ == "__main__":
    main()
