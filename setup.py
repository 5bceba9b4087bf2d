"""Installs the two operators for other people's networks: `from cc_attention import CrissCrossAttention`.

    pip install -e .

builds their native code, cc_attention/_C, once for all versions of PyTorch from 2.10 and of Python from 3.10
(LibTorch's stable ABI). It needs a C++17 compiler.

    pip install .[networks]

also installs what the networks need: `from criss_cross_attention import load_model`. The scripts, train.py and
evaluate.py, are not installed.

CXX names the compiler. The CUDA kernels, cc_attention/_C_cuda, are built too if PyTorch is a CUDA build and an nvcc of
CUDA 12 or newer works: that in CUDA_HOME, on the PATH, or in NVIDIA's wheels, which

    pip install -e .[nvcc]

installs. On a machine with a GPU but no nvcc of use, pip installs these wheels for the build. CUDAHOSTCXX names nvcc's
host compiler, if it is another. FORCE_CUDA=1 builds for other machines: for all architectures, and whatever the driver
here; FORCE_CUDA=0 leaves the CUDA kernels out. TORCH_CUDA_ARCH_LIST names the architectures; the default is those of
the GPUs here, or all from sm_75 on.

What cannot be built is left out, and computed in plain PyTorch: a line says why, here and when the package is imported.
It is an error instead where it was asked for, by CXX or FORCE_CUDA=1.

This file is also the build backend that pyproject.toml names. It extends that of setuptools: it finds PyTorch in the
environment from which a build was started, and requires the nvcc wheels.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, build_meta, setup
from setuptools.command.build_ext import build_ext

from building import pytorch, scripts
from building.compilers import NotBuilt, warn
from building.cuda import forced, missing_nvcc_wheels, nvcc_wheels
from building.libraries import build_cpu, build_cuda, needs

LIBRARIES = {"_C": build_cpu, "_C_cuda": build_cuda}


class Build(build_ext):
    """Builds what can be built in cc_attention/, there or in the folder of the wheel."""

    def run(self) -> None:
        torch = pytorch.import_torch()
        wanted, self.extensions = self.extensions, []  # setuptools expects a file of each
        for extension in wanted:
            name = extension.name.split(".")[1]
            target = Path("." if self.inplace else self.build_lib, self.get_ext_filename(extension.name))
            why_not = target.parent / f"{name}.not_built"  # read by native.py
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                print(f"{target}: {LIBRARIES[name](torch, target)}; {needs(target)}", flush=True)
            except NotBuilt as reason:
                target.unlink(missing_ok=True)  # of other sources
                leave_out(name, str(reason))
                why_not.write_text(str(reason))
                break  # _C_cuda needs _C
            self.extensions.append(extension)
            why_not.unlink(missing_ok=True)


def leave_out(name: str, reason: str) -> None:
    """Say so; it is an error if the library was asked for."""
    if forced():
        raise SystemExit(f"error: FORCE_CUDA=1, and {reason}")
    if name == "_C" and os.environ.get("CXX"):
        raise SystemExit(f"error: CXX is set, and {reason}")
    where = "everywhere" if name == "_C" else "on the GPU"
    warn(f"the operators will run in plain PyTorch {where}: {reason}")


def main() -> None:
    typed = {name: ["py.typed"] for name in ("cc_attention", "libs")}
    packages: dict = {"packages": list(typed), "package_data": typed, "cmdclass": {"build_ext": Build}}
    if "editable_wheel" not in sys.argv:
        packages["packages"] += scripts.FOLDERS
        packages["package_dir"] = scripts.FOLDERS
        packages["package_data"] |= scripts.FILES
        packages["cmdclass"]["build_py"] = scripts.BuildPackages
    if {"sdist", "egg_info"} & set(sys.argv):  # neither PyTorch nor a compiler is needed
        setup(**packages)
        return
    needed = scripts.requirements(Path("requirements.txt").read_text().splitlines())
    setup(
        **packages,
        extras_require={"networks": needed, "nvcc": nvcc_wheels(pytorch.import_torch())},
        ext_modules=[Extension(f"cc_attention.{name}", [], py_limited_api=True) for name in LIBRARIES],
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


# ---- build backend (PEP 517), called by pip, build and uv ----


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """In place of setuptools' hook, which would run main(), which already needs these requirements."""
    torch = pytorch.find_torch()
    return [pytorch.REQUIREMENT] if torch is None else missing_nvcc_wheels(torch)


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []


get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_wheel, build_editable, build_sdist = build_meta.build_wheel, build_meta.build_editable, build_meta.build_sdist


if __name__ == "__main__":
    main()
