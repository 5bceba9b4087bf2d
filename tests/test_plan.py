"""What is used and installed on which machine: the plan, and utils/environment.sh with stand-ins for what it runs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from test_build import executable

from building.plan import LAST_OF_CUDA_12, Facts, Torch, lines, make_plan
from utils import launch, nvidia
from utils.commandline import CommandError
from utils.nvidia import Driver, Gpu

ROOT = Path(__file__).parents[1]
A100, V100, P100, B200 = (
    Gpu("NVIDIA A100", (8, 0)), Gpu("Tesla V100", (7, 0)), Gpu("Tesla P100", (6, 0)), Gpu("NVIDIA B200", (10, 0)),
)  # fmt: skip
NEWEST = "torch>=2.10"


def driver(*cuda: int) -> Driver:
    return Driver("550.54.14", cuda or None)


def installed(version="2.14.1", cuda="13.0", gpus=1) -> Torch:
    return Torch(version, cuda, gpus, "/opt/conda/lib/python3.11/site-packages", "/opt/conda/bin/python")


def facts(gpus, driver, torch=None, free=100.0, machine="x86_64", nvcc=None, compiler="c++") -> Facts:
    return Facts(gpus, driver, torch, nvcc, compiler, free, machine)


@pytest.mark.parametrize(
    ("facts", "requirement"),
    [
        # No GPU: any PyTorch
        (facts([], Driver(None, None)), NEWEST),
        (facts([], Driver(None, None), installed(gpus=0)), "torch==2.14.1"),
        (facts([], Driver(None, None), installed("2.9.1+cpu", None, 0)), NEWEST),
        # A PyTorch that sees the GPU is used, whatever its CUDA
        (facts([A100], driver(13, 0), installed()), "torch==2.14.1"),
        (facts([A100], driver(12, 4), installed("2.10.0+cu126", "12.6")), "torch==2.10.0"),
        (facts([P100], driver(12, 4), installed("2.10.0+cu126", "12.6")), "torch==2.10.0"),
        # Otherwise one that the driver runs, and that has code for the GPU
        (facts([A100], driver(13, 1)), NEWEST),
        (facts([A100], driver(12, 4)), LAST_OF_CUDA_12),
        (facts([A100], driver(12, 4), installed("2.14.1", "13.0", 0)), LAST_OF_CUDA_12),
        (facts([A100], driver(12, 4), installed("2.14.1+cpu", None, 0)), LAST_OF_CUDA_12),
        (facts([A100], driver(13, 0), installed("2.9.1")), NEWEST),
        (facts([B200], driver(12, 8)), LAST_OF_CUDA_12),
        (facts([V100], driver(13, 0)), LAST_OF_CUDA_12),
        (facts([A100, V100], driver(13, 0)), LAST_OF_CUDA_12),
        (facts([Gpu("NVIDIA A100", None)], driver(12, 2)), LAST_OF_CUDA_12),
        (facts([A100], driver(13, 0), machine="aarch64"), NEWEST),
    ],
    ids=repr,
)
def test_the_pytorch_of_a_machine(facts, requirement):
    plan = make_plan(facts)
    assert (plan.requirement, plan.error) == (requirement, "")
    assert bool(plan.reuse) == requirement.startswith("torch==")
    assert len(lines(facts, plan)) <= 6


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (facts([A100], driver(11, 4)), r"A100 \(8\.0\) with driver 550\.54\.14, CUDA 11\.4: .*525 or newer"),
        (facts([A100], Driver(None, None)), "does not answer nvidia-smi: expected nvidia-smi to tell"),
        (facts([P100], driver(12, 4)), r"P100 .*: PyPI's PyTorch has no code for it\. Install the build of CUDA 12\.6"),
        (facts([A100], driver(12, 4), machine="aarch64"), "no PyTorch of CUDA 12 for aarch64.*let PYTHON name"),
        (facts([A100], driver(13, 0), free=3.2), r"expected 9 GB of free disk for PyTorch, found 3\.2"),
    ],
    ids=repr,
)
def test_a_machine_on_which_no_pytorch_can_be_used(facts, message):
    plan = make_plan(facts)
    assert re.search(message, plan.error)
    assert (plan.requirement, plan.reuse) == ("", "")
    assert (make_plan(facts, "cpu").error == "") == ("disk" not in plan.error)


def test_the_plan_in_words():
    this = facts([A100] * 4, driver(12, 4), installed("2.14.1+cu130", "13.0", 0), nvcc="nvcc 12.4 (/usr/bin/nvcc)")
    assert lines(this, make_plan(this)) == [
        "GPU:       4 x NVIDIA A100 (8.0), driver 550.54.14, CUDA 12.4",
        "PyTorch:   torch>=2.10,<2.11 is installed into .venv, since 2.14.1+cu130 (CUDA 13.0) of /opt/conda/bin/python "
        "does not see the GPU",
        "compilers: c++; nvcc 12.4 (/usr/bin/nvcc)",
        "native:    the operators on CPU and GPU",
    ]
    for changed, native in (
        ({"compiler": None}, "nothing: the operators will run in plain PyTorch"),
        ({"nvcc": None}, "the operators on the CPU; on the GPU after installing a toolkit of CUDA 12"),
        ({"nvcc": None, "driver": driver(13, 0)}, "the operators on CPU and GPU, with nvcc from PyPI"),
        ({"gpus": []}, "the operators on the CPU"),
    ):
        other = facts(**{"gpus": [A100], "driver": driver(12, 4), "nvcc": "nvcc 12.4", **changed})
        assert lines(other, make_plan(other))[-1].endswith(native)


# ---- nvidia-smi and the kernel's folder ----

HEADER = "| NVIDIA-SMI 550.54.14     Driver Version: 550.54.14     CUDA Version: 12.4  |"


def nvidia_smi(folder: Path, name_and_capability: str, header: str = HEADER) -> Path:
    return executable(
        folder / "nvidia-smi",
        f"""case $* in
        *name,compute_cap*) {name_and_capability} ;;
        *query-gpu=name*) echo 'Tesla K80' ;;
        *driver_version*) echo 550.54.14 ;;
        *) echo '{header}' ;;
        esac""",
    )


def test_what_nvidia_smi_tells(monkeypatch, tmp_path):
    monkeypatch.setattr(nvidia, "KERNEL", tmp_path / "proc")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert (nvidia.find_gpus(), nvidia.find_driver()) == ([], Driver(None, None))
    nvidia_smi(tmp_path, "echo 'NVIDIA A100, PCIe, 8.0'; echo 'Tesla V100, 7.0'")
    assert nvidia.find_gpus() == [Gpu("NVIDIA A100, PCIe", (8, 0)), V100]
    assert nvidia.find_driver() == Driver("550.54.14", (12, 4))
    nvidia_smi(tmp_path, "exit 2", HEADER.replace("CUDA Version: 12.4", "CUDA UMD Version: 13.2"))
    assert nvidia.find_gpus() == [Gpu("Tesla K80", None)]
    assert nvidia.find_driver() == Driver("550.54.14", (13, 2))


def test_gpus_whose_driver_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(nvidia, "KERNEL", tmp_path / "proc")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    executable(tmp_path / "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    information = tmp_path / "proc/gpus/0000:01:00.0/information"
    information.parent.mkdir(parents=True)
    information.write_text("Model: \t\t NVIDIA A100\nIRQ:   \t\t 60\n")
    assert nvidia.find_gpus() == [Gpu("NVIDIA A100", None)]
    assert nvidia.find_driver() == Driver(None, None)


# ---- a GPU that is here and cannot be used ----


def test_a_gpu_that_pytorch_cannot_use_is_an_error(monkeypatch):
    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nMore")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launch, "find_gpus", lambda: [A100])
    monkeypatch.setattr(launch, "find_driver", lambda: driver(12, 4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    message = r"NVIDIA A100 \(8\.0\) with driver 550\.54\.14, CUDA 12\.4, which PyTorch .* cannot use: The NVIDIA "
    message += r"driver on your system is too old \(found version 12040\)\. Install .*--device cpu does without"
    for device in ("auto", "cuda"):
        with pytest.raises(CommandError, match=message):
            launch.find_devices(device, "all", None, None)
    assert launch.find_devices("cpu", "None", None, None) == [torch.device("cpu")]
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert launch.find_devices("auto", "all", None, None) == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("capability", "known", "runs"),
    [
        ((8, 6), ["sm_75", "sm_80"], True),
        ((8, 0), ["sm_75", "sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((7, 0), ["sm_75", "sm_80", "compute_80"], False),
        ((12, 0), ["sm_90a", "sm_120"], True),
        ((9, 0), ["gfx90a"], True),  # AMD's
    ],
)
def test_a_gpu_for_which_pytorch_has_no_code_is_named(capability, known, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla X")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: known)
    device = torch.device("cuda", 1)
    if runs:
        launch.check_architecture(device)
        return
    with pytest.raises(CommandError, match=r"cuda:1, Tesla X, is of architecture .* has code for 7\.5, 8\.\d only"):
        launch.check_architecture(device)


# ---- utils/environment.sh, with a stand-in for Python that makes environments of itself ----

PYTHON = f"""
here="$0"
echo "$*" >>"$LOG"
if [ "$STOP_AT" ] && case $* in *"$STOP_AT"*) true ;; *) false ;; esac; then
    kill -INT $$ # as Ctrl-C does to this process
fi
case $* in
*building.plan*) exec {sys.executable} "$@" ;;
*"-m venv"*) rm -rf .venv; mkdir -p .venv/bin .venv/site; cp "$here" .venv/bin/python ;;
*sysconfig*) echo .venv/site ;;
*"pip install"*) sleep "${{SLOW:-0}}"; case $* in *--editable*) touch cc_attention/_C.abi3.so ;; esac ;;
*"torch.cuda"*) [ "$TORCH_HERE" ] && echo "$TORCH_HERE" || exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What sets up an environment, in a path that takes quoting."""
    folder = tmp_path / "my archive, größer"
    for name in ("utils/environment.sh", "utils/nvidia.py", "utils/__init__.py", "requirements.txt", "setup.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "building", folder / "building", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "cc_attention/csrc").mkdir(parents=True)
    executable(folder / "bin/python3", PYTHON)
    return folder


def start(checkout: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", "-euc", "umask 077; source utils/environment.sh; set_up_environment requirements.txt; echo set up"],
        cwd=checkout,
        env={
            **os.environ,
            "PATH": f"{checkout / 'bin'}:/usr/bin:/bin",
            "HOME": "/dev/null",  # nothing can be written there
            "LOG": str(checkout / "log"),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a script, it is ignored, and a shell could not change that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def set_up(checkout: Path, **environment: str) -> tuple[int, str, str]:
    process = start(checkout, **environment)
    out, error = process.communicate()
    return process.returncode, out, error


def pip_calls(checkout: Path) -> list[str]:
    return [line for line in (checkout / "log").read_text().splitlines() if "pip install" in line]


def test_an_environment_is_set_up_once(checkout):
    code, out, error = set_up(checkout)
    assert (code, out.splitlines()[-1]) == (0, "set up"), error
    assert error.startswith("GPU:       none\nPyTorch:   torch>=2.10 is installed into .venv\n")
    assert (checkout / ".venv/torch.txt").read_text() == "torch>=2.10\n"
    assert [("--editable" in call, "--constraint .venv/torch.txt" in call) for call in pip_calls(checkout)] == [
        (False, True),
        (True, False),
    ]
    assert set_up(checkout) == (0, "set up\n", "")
    assert len(pip_calls(checkout)) == 2


def test_the_pytorch_of_the_active_environment_is_used(checkout):
    code, _, error = set_up(checkout, TORCH_HERE='["2.12.0+cu130", "13.0", 0, "/opt/my env/site-packages"]')
    assert code == 0, error
    assert "PyTorch:   2.12.0+cu130 (CUDA 13.0) of python3, which is here" in error
    assert (checkout / ".venv/site/reused.pth").read_text() == "/opt/my env/site-packages\n"
    assert (checkout / ".venv/torch.txt").read_text() == "torch==2.12.0\n"


def test_a_driver_that_is_too_old_stops_before_anything_is_installed(checkout):
    nvidia_smi(checkout / "bin", "echo 'NVIDIA A100, 8.0'", HEADER.replace("12.4", "11.4"))
    code, out, error = set_up(checkout)
    assert (code, out) == (2, "")
    assert "error: NVIDIA A100 (8.0) with driver 550.54.14, CUDA 11.4: expected a driver for CUDA 12" in error
    assert not (checkout / ".venv").exists()
    assert set_up(checkout, DEVICE="cpu")[0] == 0


def test_a_folder_that_cannot_be_written_to_is_named():
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, into which only its user may look
        (Path(folder) / "utils").mkdir()
        shutil.copy(ROOT / "utils/environment.sh", f"{folder}/utils")
        for path in (folder, f"{folder}/utils"):
            os.chmod(path, 0o555)
        as_nobody = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []  # root may always write
        command = [*as_nobody, "bash", "-euc", "source utils/environment.sh; set_up_environment requirements.txt"]
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
        os.chmod(folder, 0o755)
        os.chmod(f"{folder}/utils", 0o755)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {folder}: expected a folder that can be written to, for .venv and the built operators\n"
    )


@pytest.mark.parametrize("step", ["building.plan", "-m venv", "sysconfig", "requirements.txt", "--editable"])
def test_interrupted_at_any_step_it_goes_on_where_it_was(checkout, step):
    code, out, _ = set_up(checkout, STOP_AT=step)
    assert code != 0
    assert "set up" not in out
    code, out, error = set_up(checkout)
    assert (code, out.splitlines()[-1]) == (0, "set up"), error
    assert (checkout / ".venv/torch.txt").read_text() == "torch>=2.10\n"
    assert len(pip_calls(checkout)) == 2 + (step in ("requirements.txt", "--editable"))


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_of_two_runs_at_once_the_second_waits(checkout):
    first = start(checkout, SLOW="0.5")
    while not (checkout / "log").exists():  # the first holds the lock
        assert first.poll() is None
        time.sleep(0.01)
    code, out, error = set_up(checkout, SLOW="0.5")
    assert (code, out) == (0, f"waiting for another run that sets up {checkout}/.venv\nset up\n"), error
    assert first.wait() == 0
    assert len(pip_calls(checkout)) == 2
