"""Loads the native operators, `torch.ops.ccnet`, that installing the package builds (setup.py)."""

import warnings
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_C.abi3.so")


def _load() -> bool:
    """Whether the operators can be called; one warning if not."""
    if _LIBRARY.exists():
        try:
            torch.ops.load_library(_LIBRARY)
            return True
        except OSError as error:
            reason = f"{_LIBRARY} cannot be loaded ({error})"
    else:
        reason = "their native code has not been built"
    checkout = _LIBRARY.parents[1]
    source = f"-e {checkout}" if (checkout / "setup.py").exists() else "--force-reinstall PATH_OF_CCNET'S_SOURCE"
    warnings.warn(
        f"the operators run in plain PyTorch, slower and with more memory: {reason}. "
        f"This builds it, with a C++ compiler: pip install --no-deps {source}",
        stacklevel=2,
    )
    return False


LOADED = _load()
# Types of devices that the operators run on. On "meta" are shapes only, as torch.compile and torch.export use them.
_DEVICES = frozenset({"cpu", "meta"}) if LOADED else frozenset()


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
