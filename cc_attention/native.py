"""Loads the native operators, `torch.ops.ccnet`, which are built when the package is installed (setup.py).

The environment variable CCNET_NATIVE selects where they are used: 0: nowhere, cpu or cuda: only there, 1 or unset:
everywhere. Elsewhere the operators run in plain PyTorch.
"""

import os
import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


def _wanted_devices() -> frozenset[str]:
    """The device types that CCNET_NATIVE selects."""
    value = os.environ.get("CCNET_NATIVE", "")
    wanted = {"": {"cpu", "cuda"}, "1": {"cpu", "cuda"}, "0": set(), "cpu": {"cpu"}, "cuda": {"cuda"}}
    if value not in wanted:
        raise ValueError(f"CCNET_NATIVE: expected 0, 1, cpu or cuda, got {value!r}")
    return frozenset(wanted[value])


def library(name: str) -> Path:
    return _FOLDER / f"{name}.abi3.so"


def _load(name: str) -> str | None:
    """Load a library. Returns None, or the reason if it cannot be loaded."""
    if not library(name).exists():
        why = _FOLDER / f"{name}.not_built"  # written by setup.py
        return "their native code has not been built" + (f" ({why.read_text()})" if why.exists() else "")
    try:
        torch.ops.load_library(library(name))
    except OSError as error:
        return f"{library(name)} cannot be loaded ({error})"
    return None


def _load_cuda() -> str | None:
    """Load the library for GPUs. Returns None, or the reason if it cannot be loaded or run."""
    reason = _load("_C_cuda")
    if reason is None and (problem := torch.ops.ccnet.cuda_driver_problem()):
        return f"{library('_C_cuda')} cannot run: {problem}"
    return reason


def _warn(where: str, reason: str, needs: str) -> None:
    checkout = _FOLDER.parent
    source = f"-e {checkout}" if (checkout / "setup.py").exists() else "--force-reinstall PATH_OF_CCNET'S_SOURCE"
    warnings.warn(
        f"the operators run in plain PyTorch{where}, slower and with more memory: {reason}. "
        f"This builds it, with {needs}: pip install --no-deps {source}",
        stacklevel=3,
    )


def _warn_on_gpu(where: str, reason: str) -> None:
    _warn(where, reason, "a C++ compiler and nvcc (README.md)")


def _load_all(wanted: frozenset[str]) -> dict[str, str | None]:
    """Load the libraries. Returns for each device type the reason why native code is not used there; None if it is.

    Warns if native code could run on a device but is not there, unless CCNET_NATIVE turns it off.
    """
    off = "CCNET_NATIVE turns it off"
    if not wanted:
        return {"cpu": off, "cuda": off}
    cpu = _load("_C")  # also declares the operators, for all devices
    if cpu is not None:
        _warn("", cpu, "a C++ compiler")
        return {"cpu": cpu, "cuda": cpu}
    if torch.version.cuda is None:
        cuda: str | None = "this PyTorch is built without CUDA"
    elif "cuda" not in wanted:
        cuda = off
    else:
        cuda = _load_cuda()
        if cuda is not None and torch.cuda.is_available():
            _warn_on_gpu(" on the GPU", cuda)
    return {"cpu": None if "cpu" in wanted else off, "cuda": cuda}


_WANTED = _wanted_devices()
WHY_NOT = _load_all(_WANTED)  # by type of device
LOADED = hasattr(torch.ops.ccnet, "cpu_capability")  # the operators are declared

_architectures: dict[int, int] = {}  # cache of gpu_architecture


def gpu_architecture(index: int) -> int:
    """Of which PTX the native code is that the GPU runs, 80 for compute_80. 0, and a warning, if it can run none."""
    if index not in _architectures:
        _architectures[index] = torch.ops.ccnet.cuda_architecture(index)
        if _architectures[index] == 0:
            name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
            built = f"{library('_C_cuda')} has no code for its architecture {capability[0]}.{capability[1]}"
            _warn_on_gpu(f" on cuda:{index}, {name}", built)
    return _architectures[index]


def _gpu_has_code(index: int | None) -> bool:
    if not torch.cuda.is_available():  # tensors without data, when compiling for another machine
        return True
    return gpu_architecture(torch.cuda.current_device() if index is None else index) > 0


# As torch.compiler.assume_constant_result does, which imports the compiler: that takes as long as PyTorch's own import.
_gpu_has_code._dynamo_marked_constant = True  # type: ignore[attr-defined]


def runs_on(device: torch.device) -> bool:
    """Whether native operators run on that device; otherwise plain PyTorch does."""
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():  # which knows PyTorch's own operators only
        return False
    if device.type == "meta":  # tensors without data, in torch.compile and torch.export
        return LOADED
    if WHY_NOT.get(device.type, "no kernels for it") is not None:
        return False
    return device.type == "cpu" or _gpu_has_code(device.index)


def cpu_capability() -> str:
    """The instruction set that the native CPU kernels use: baseline, avx2, avx512 or avx512_bf16.

    It is the best one of the CPU, or the one that the environment variable CCNET_CPU_CAPABILITY names.

    Raises:
        RuntimeError: CCNET_CPU_CAPABILITY names none of these, or one that the CPU does not have; or the operators are
            not loaded.
    """
    if not LOADED:
        raise RuntimeError("the native operators are not loaded")
    return torch.ops.ccnet.cpu_capability()
