"""Building and loading the native code: what setup.py says before it compiles, the wheel, and living without either."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from cc_attention import native

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_py():
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def nvcc_of(release: str) -> str:
    return f"echo 'Cuda compilation tools, release {release}, V{release}.1'"


def test_old_pytorch_is_named(setup_py, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.9.1+cu126"))
    with pytest.raises(SystemExit, match=r"expected PyTorch 2\.10 or newer, found 2\.9\.1\+cu126"):
        setup_py.import_torch()


def test_missing_pytorch_is_named(setup_py, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"PyTorch is needed .* Install it first: pip install 'torch>=2\.10'"):
        setup_py.import_torch()


def test_compiler(setup_py, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_py.find_compiler() is None
    monkeypatch.setenv("CXX", "no-such-c++ -O2")
    with pytest.raises(SystemExit, match=r"CXX=no-such-c\+\+ -O2: no such program"):
        setup_py.find_compiler()
    monkeypatch.setenv("CXX", "c++ -U__GNUC__ -D__GNUC__=9")
    monkeypatch.setenv("PATH", path)
    with pytest.raises(SystemExit, match=r"(?s)GCC 10 or Clang 12 or newer, and c\+\+.*too old"):
        setup_py.find_compiler()
    monkeypatch.setenv("CXX", str(executable(tmp_path / "old", "echo 'unknown argument -std=c++17' >&2; exit 1")))
    with pytest.raises(SystemExit, match=r"(?s)expected a C\+\+17 compiler.*old says:.*unknown argument -std=c\+\+17"):
        setup_py.find_compiler()


def test_nvcc_is_found_where_it_is(setup_py, monkeypatch, tmp_path):
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(setup_py, "site_packages", lambda: [str(tmp_path / "site-packages")])
    assert setup_py.find_nvcc() is None
    wheel = executable(tmp_path / "site-packages/nvidia/cu13/bin/nvcc", "")
    assert setup_py.find_nvcc() == wheel
    # A wrapper on the PATH: nvcc itself says where it is.
    toolkit = executable(tmp_path / "cuda-13.0/bin/nvcc", "").parents[1]
    executable(tmp_path / "path/nvcc", f"echo '#$ TOP={toolkit}/bin/..' >&2")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    assert setup_py.find_nvcc() == toolkit / "bin/nvcc"
    home = executable(tmp_path / "home/bin/nvcc", "").parents[1]
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert setup_py.find_nvcc() == home / "bin/nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"CUDA_HOME=.*nowhere: expected .*nowhere/bin/nvcc, which does not exist"):
        setup_py.find_nvcc()


def test_nvcc_of_another_major_version_is_an_error(setup_py, tmp_path):
    nvcc = executable(tmp_path / "nvcc", nvcc_of("12.8"))
    setup_py.check_nvcc(nvcc, "12.4")
    with pytest.raises(
        SystemExit, match=r"nvcc is of CUDA 12\.8, and this PyTorch is of CUDA 13\.0: expected the same"
    ):
        setup_py.check_nvcc(nvcc, "13.0")


def test_forced_cuda_needs_a_pytorch_with_it_and_nvcc(setup_py, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    without = types.SimpleNamespace(__version__="2.12.0+cpu", version=types.SimpleNamespace(cuda=None))
    with pytest.raises(SystemExit, match=r"FORCE_CUDA=1, and PyTorch 2\.12\.0\+cpu was built without CUDA"):
        setup_py.cuda_toolkit(without)
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: None)
    with_cuda = types.SimpleNamespace(__version__="2.12.0", version=types.SimpleNamespace(cuda="13.0"))
    with pytest.raises(
        SystemExit, match=r"FORCE_CUDA=1, and there is no nvcc.*pip install 'nvidia-cuda-nvcc==13\.0\.\*'"
    ):
        setup_py.cuda_toolkit(with_cuda)
    with_older_cuda = types.SimpleNamespace(__version__="2.12.0", version=types.SimpleNamespace(cuda="12.8"))
    with pytest.raises(SystemExit, match=r"there is no nvcc.*Install a toolkit of CUDA 12\.8"):
        setup_py.cuda_toolkit(with_older_cuda)
    monkeypatch.delenv("FORCE_CUDA")
    assert setup_py.cuda_toolkit(without) is setup_py.cuda_toolkit(with_cuda) is None


def test_nvcc_is_asked_for_where_it_is_of_use_and_missing(setup_py, monkeypatch):
    torch = types.SimpleNamespace(
        version=types.SimpleNamespace(cuda="13.2"), cuda=types.SimpleNamespace(is_available=lambda: True)
    )
    monkeypatch.setattr(setup_py, "import_torch", lambda: torch)
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: None)
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    wheels = setup_py.missing_nvcc_wheels()
    assert wheels[0] == "nvidia-cuda-nvcc==13.2.*"
    assert setup_py.get_requires_for_build_editable() == setup_py.get_requires_for_build_wheel() == wheels
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert setup_py.missing_nvcc_wheels() == []
    monkeypatch.delenv("FORCE_CUDA")
    torch.cuda.is_available = lambda: False
    assert setup_py.missing_nvcc_wheels() == []
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert setup_py.missing_nvcc_wheels() == wheels
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: Path("/usr/local/cuda/bin/nvcc"))
    assert setup_py.missing_nvcc_wheels() == []


def test_architectures(setup_py, monkeypatch, tmp_path):
    """The user's, those of the GPUs here (PyTorch asks them), or all that this nvcc knows, with PTX for later ones."""
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    executable(tmp_path / "bin/nvcc", "echo sm_70; echo sm_75; echo sm_90; echo sm_90a")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    setup_py.set_architectures(torch, tmp_path)
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.6"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    setup_py.set_architectures(torch, tmp_path)
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;9.0+PTX"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    torch.cuda.is_available = lambda: True
    setup_py.set_architectures(torch, tmp_path)
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ
    executable(tmp_path / "bin/nvcc", "echo sm_50")
    torch.cuda.is_available = lambda: False
    with pytest.raises(SystemExit, match="--list-gpu-code names none of ours: sm_50"):
        setup_py.set_architectures(torch, tmp_path)


def test_native_code_is_there_where_there_is_a_compiler(setup_py):
    """Otherwise its tests would all be skipped."""
    assert native.LOADED or setup_py.find_compiler() is None


def test_cuda_kernels_are_there_where_there_is_nvcc(setup_py):
    """And load without a GPU and its driver."""
    wanted = torch.version.cuda is not None and native.LOADED and setup_py.find_nvcc() is not None
    assert native.runs_on(torch.device("cuda")) or not wanted or os.environ.get("FORCE_CUDA") == "0"


def test_a_gpu_without_kernels_for_it_is_warned_about(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda name: None if name == "_C" else "it is broken")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match=r"in plain PyTorch on the GPU.*it is broken\. This builds it, with .* nvcc"):
        assert native._devices() == {"cpu", "meta"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._devices() == {"cpu", "meta"}
    monkeypatch.setattr(native, "_load", lambda name: None)
    assert native._devices() == {"cpu", "meta", "cuda"}


@pytest.mark.skipif(
    not native.LOADED or platform.machine() != "x86_64" or shutil.which("objdump") is None,
    reason="needs native code for x86 and objdump",
)
def test_vector_instructions_stay_in_the_code_for_their_cpus():
    """An AVX instruction in a function that every CPU runs would stop the older ones."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", Path(native.__file__).with_name("_C.abi3.so")],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    ).stdout
    function, seen = "", set()
    for line in listing.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = start[1]
            continue
        if re.match(r"\s+[0-9a-f]+:\tv\w+ ", line):
            names = "avx512(_bf16)?" if "%zmm" in line else "avx2|avx512(_bf16)?"
            own = re.search(rf"ccnet::({names})::", function)
            assert own is not None, f"{function}: {line.strip()}"
            assert "bf16" not in line.split("\t")[1].split()[0] or own[1] == "avx512_bf16", (
                f"{function}: {line.strip()}"
            )
            seen.add(own[1])
    assert seen == {"avx2", "avx512", "avx512_bf16"}


USE = """
import torch, cc_attention, libs
from cc_attention import native
x = torch.randn(1, 16, 5, 6)
expected = cc_attention.reference.criss_cross_attention(x, x, x)
torch.testing.assert_close(cc_attention.criss_cross_attention(x, x, x), expected)
module = cc_attention.CrissCrossAttention(16)
module(x).sum().backward()
print(native.LOADED, native.__file__)
"""


def run_python(text: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", text], cwd=folder, env=environment, text=True, capture_output=True, check=True
    )


@pytest.mark.slow
def test_without_native_code_the_reference_computes_and_one_warning_says_so(tmp_path):
    for package in ("cc_attention", "libs"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so"))
    result = run_python(USE, tmp_path)
    assert result.stdout.startswith(f"False {tmp_path}")
    assert result.stderr.count("Warning") == 1
    assert "native code has not been built" in result.stderr
    assert "pip install" in result.stderr


@pytest.mark.slow
def test_native_code_that_does_not_load_is_reported(tmp_path):
    for package in ("cc_attention", "libs"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "cc_attention/_C.abi3.so").write_text("not a library")
    result = run_python(USE, tmp_path)
    assert result.stdout.startswith("False")
    assert re.search(r"cc_attention/_C\.abi3\.so cannot be loaded \(.*\)\. This builds it.*pip install", result.stderr)


def pip(*arguments: str | Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, **environment})


@pytest.mark.slow
def test_wheel_is_abi3_and_works_away_from_the_checkout(tmp_path):
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"ccnet-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"cc_attention/__init__.py", "libs/__init__.py", "cc_attention/_C.abi3.so"} <= set(names)
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"cc_attention", "libs"}
    pip("install", "--no-deps", "--target", tmp_path / "site", wheel)
    result = run_python(USE, tmp_path / "site")
    assert result.stdout.startswith(f"True {tmp_path / 'site'}")
    assert "Warning" not in result.stderr


@pytest.mark.slow
def test_source_distribution_holds_the_sources(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    sources = [path for package in ("cc_attention", "libs") for path in (ROOT / package / "csrc").rglob("*.*")]
    assert {str(path.relative_to(ROOT)) for path in sources} <= names


@pytest.mark.slow
def test_without_a_compiler_the_package_is_installed_all_the_same(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for package in ("cc_attention", "libs"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("*.so"))
    only_python = tmp_path / "bin"
    only_python.mkdir()
    (only_python / "python").symlink_to(sys.executable)
    install = ("install", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site", source)
    pip(*install, PATH=str(only_python))
    result = run_python(USE, tmp_path / "site")
    assert result.stdout.startswith(f"False {tmp_path / 'site'}")
    assert "native code has not been built" in result.stderr
