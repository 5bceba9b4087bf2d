"""`python -m cc_attention`: what it prints, and that it finds what is wrong."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cc_attention
from cc_attention import __main__ as self_check
from cc_attention import native, reference


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(self_check, "TIMED_SIZES", {"cpu": (1, 16, 4, 5), "cuda": (1, 16, 4, 5)})


def test_all_is_right(capsys):
    assert self_check.main() == 0
    out = capsys.readouterr().out
    assert f"PyTorch      {torch.__version__}" in out
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        for operator in ("criss_cross_attention", "ca_weight", "ca_map", "in-place batch norm"):
            for dtype in ("float32", "bfloat16", "float16", "float64"):
                assert f"{operator:22} {device:7} {dtype:9} right" in out
    if native.LOADED:
        assert f"_C.abi3.so, {native.cpu_capability()}" in out
    if native.WHY_NOT["cuda"] is None:
        assert re.search(r"_C_cuda\.abi3\.so, built by CUDA \d+\.\d from .*compute_80", out)


def wrong_result(weight, value):
    return reference.ca_map(weight, value) * 1.01


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, value):
        ctx.save_for_backward(weight, value)
        return reference.ca_map(weight, value)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            of_weight, of_value = torch.autograd.grad(reference.ca_map(*inputs), inputs, grad)
        return of_weight, of_value * float("nan")


def failing(weight, value):
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (wrong_result, "result differs from the definition by 1.0e-02"),
        (WrongGradient.apply, "gradient of value differs from the definition by nan"),
        (failing, "WRONG: RuntimeError: out of order"),
    ],
)
def test_a_broken_operator_is_found(broken, message, monkeypatch, capsys):
    monkeypatch.setattr(self_check, "DTYPES", (torch.float32,))
    monkeypatch.setattr(cc_attention, "ca_map", broken)
    assert self_check.main() == 1
    out = capsys.readouterr().out
    assert message in out
    devices = 1 + torch.cuda.device_count()
    assert out.count("right, error") == 3 * devices
    assert f"WRONG: {devices} of {4 * devices}." in out


@pytest.mark.skipif(not native.LOADED, reason="needs the native operators")
def test_a_gpu_is_described(monkeypatch):
    gpu = type("Properties", (), {"name": "NVIDIA A10", "major": 8, "minor": 6, "total_memory": 24 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setitem(native.WHY_NOT, "cuda", None)
    monkeypatch.setattr(native, "_architectures", {0: 80, 1: 0})
    assert self_check.describe_gpu(0) == "NVIDIA A10, sm_86, 24576 MiB; runs the code from compute_80"
    assert self_check.describe_gpu(1) == "NVIDIA A10, sm_86, 24576 MiB; runs plain PyTorch"
    monkeypatch.setitem(native.WHY_NOT, "cuda", "it is broken")
    assert self_check.native_code("cuda") == "none: it is broken"


@pytest.mark.slow
def test_somebody_elses_libs_is_left_alone(tmp_path):
    """cc_attention does not need the folder of that name, which other projects have too."""
    folder = Path(cc_attention.__file__).parent
    shutil.copytree(folder, tmp_path / "cc_attention", ignore=shutil.ignore_patterns("*.so", "csrc"))
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs/__init__.py").write_text("raise SystemExit('not yours')")
    run = "from cc_attention import __main__ as check; check.TIMED_SIZES = {'cpu': (1, 8, 4, 5)}; exit(check.main())"
    result = subprocess.run(
        [sys.executable, "-c", run],
        cwd=tmp_path,
        env={**os.environ, "CCNET_NATIVE": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "native CPU   none: CCNET_NATIVE turns it off" in result.stdout
    assert "batch norm" not in result.stdout
