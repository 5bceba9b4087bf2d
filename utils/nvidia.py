"""The NVIDIA GPUs of this machine and their driver, as nvidia-smi and the kernel tell of them. Needs no PyTorch."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

Version = tuple[int, int]  # (12, 4) is CUDA 12.4; (8, 6) is an architecture, sm_86
KERNEL = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class Gpu:
    name: str
    architecture: Version | None  # None if nvidia-smi does not tell

    def __str__(self) -> str:
        return f"{self.name} ({'{}.{}'.format(*self.architecture)})" if self.architecture else self.name


@dataclass(frozen=True)
class Driver:
    version: str | None  # None if it does not answer
    cuda: Version | None  # the newest version of CUDA that it runs

    def __str__(self) -> str:
        if self.version is None:
            return "a driver that does not answer nvidia-smi"
        return f"driver {self.version}" + (", CUDA {}.{}".format(*self.cuda) if self.cuda else "")


def _nvidia_smi(*flags: str) -> str:
    """What it prints; nothing if it is not there or fails."""
    if shutil.which("nvidia-smi") is None:
        return ""
    result = subprocess.run(["nvidia-smi", *flags], text=True, capture_output=True)
    return result.stdout if result.returncode == 0 else ""


def find_gpus() -> list[Gpu]:
    """All GPUs, also those that CUDA_VISIBLE_DEVICES hides."""
    for fields in ("name,compute_cap", "name"):  # older ones do not know compute_cap
        lines = _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
        if lines:
            found = [re.fullmatch(r"(.+?)(?:, (\d+)\.(\d+))?", line.strip()) for line in lines]
            return [Gpu(x[1], (int(x[2]), int(x[3])) if x[2] else None) for x in found if x is not None]
    descriptions = [path.read_text() for path in sorted(KERNEL.glob("gpus/*/information"))]
    names = [re.search(r"Model:\s*(.+)", text) for text in descriptions]
    return [Gpu(name[1].strip() if name else "an NVIDIA GPU", None) for name in names]


def find_driver() -> Driver:
    version = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    cuda = re.search(r"CUDA[A-Z ]* Version: (\d+)\.(\d+)", _nvidia_smi())
    return Driver(version[0].strip() if version else None, (int(cuda[1]), int(cuda[2])) if cuda else None)
