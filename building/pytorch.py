"""Finds PyTorch; in an isolated build, in the environment from which the build was started."""

import json
import os
import re
import site
import subprocess
import sys
import sysconfig
from itertools import chain
from pathlib import Path
from types import ModuleType

MINIMUM = (2, 10)  # also in pyproject.toml and requirements.txt
REQUIREMENT = "torch>={}.{}".format(*MINIMUM)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*MINIMUM)


def release(version: str) -> tuple[int, ...]:
    """(2, 10) of 2.10.0+cu128."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def site_packages() -> list[str]:
    return [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages()]


def surrounding_pythons() -> list[str]:
    """Interpreters of the environments from which an isolated build may have been started, the most likely first.

    build and uv build in a new environment, and do not say from which environment they were called.
    """
    found = []
    parent = Path(f"/proc/{os.getppid()}")
    try:  # `.venv/bin/python -m build` itself
        program = (parent / "cmdline").read_bytes().split(b"\0")[0].decode()
        found += [os.path.join(os.readlink(parent / "cwd"), program)] if "/" in program else []
    except OSError:  # no /proc, or the parent has ended, and the process in its place may not be looked into
        pass
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


def find_torch() -> ModuleType | None:
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


def import_torch() -> ModuleType:
    torch = find_torch()
    if torch is None:
        raise SystemExit(
            f"error: PyTorch is needed to build the operators, and {sys.executable} cannot find it. Install it first: "
            f"pip install '{REQUIREMENT}'. If it is installed, build in its environment: pip install "
            "--no-build-isolation"
        )
    if release(torch.__version__) < MINIMUM:
        raise SystemExit(f"error: expected {REQUIREMENT}, found {torch.__version__}")
    return torch
