"""Loads the native operators, `torch.ops.ccnet`, that installing the package builds (setup.py)."""

import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


def _load(name: str) -> str | None:
    """None if the library is loaded, otherwise why not."""
    library = _FOLDER / f"{name}.abi3.so"
    if not library.exists():
        return "their native code has not been built"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} cannot be loaded ({error})"
    return None


def _warn(where: str, reason: str, needs: str) -> None:
    checkout = _FOLDER.parent
    source = f"-e {checkout}" if (checkout / "setup.py").exists() else "--force-reinstall PATH_OF_CCNET'S_SOURCE"
    warnings.warn(
        f"the operators run in plain PyTorch{where}, slower and with more memory: {reason}. "
        f"This builds it, with {needs}: pip install --no-deps {source}",
        stacklevel=3,
    )


def _devices() -> frozenset[str]:
    """Types of devices that the operators run on, with a warning where they could run on one and do not."""
    missing = _load("_C")
    if missing is not None:
        _warn("", missing, "a C++ compiler")
        return frozenset()
    devices = {"cpu", "meta"}  # on "meta" are shapes only, as torch.compile and torch.export use them
    if torch.version.cuda is not None:
        missing = _load("_C_cuda")
        if missing is None:
            devices.add("cuda")
        elif torch.cuda.is_available():
            _warn(" on the GPU", missing, "a C++ compiler and nvcc (README.md)")
    return frozenset(devices)


_DEVICES = _devices()
LOADED = "cpu" in _DEVICES


def runs_on(device: torch.device) -> bool:
    """Whether the native operators take tensors of that device; if not, the references compute."""
    return device.type in _DEVICES


def cpu_capability() -> str:
    """The instruction set that the native CPU kernels use: baseline, avx2, avx512 or avx512_bf16.

    The best that the CPU has, or what the environment variable CCNET_CPU_CAPABILITY names.

    Raises:
        RuntimeError: CCNET_CPU_CAPABILITY names none of these or one beyond this CPU; the operators are not loaded.
    """
    if not LOADED:
        raise RuntimeError("the native operators are not loaded")
    return torch.ops.ccnet.cpu_capability()
