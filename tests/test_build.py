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


# ---- PyTorch ----


def test_the_oldest_pytorch_is_the_same_everywhere(setup_py):
    assert setup_py.TORCH_REQUIREMENT == "torch>=2.10"
    assert setup_py.STABLE_ABI == ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    assert f'dependencies = ["{setup_py.TORCH_REQUIREMENT}"]' in (ROOT / "pyproject.toml").read_text()
    assert setup_py.TORCH_REQUIREMENT in (ROOT / "requirements.txt").read_text().splitlines()


def test_old_pytorch_is_named(setup_py, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.9.1+cu126"))
    with pytest.raises(SystemExit, match=r"expected torch>=2\.10, found 2\.9\.1\+cu126"):
        setup_py.import_torch()


@pytest.fixture
def no_torch(setup_py, monkeypatch):
    """Nowhere, as an isolated build sees it."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(setup_py, "site_packages", list)
    monkeypatch.setattr(setup_py, "surrounding_pythons", list)


def test_missing_pytorch_is_named(setup_py, no_torch):
    with pytest.raises(SystemExit, match=r"PyTorch is needed .* Install it first: pip install 'torch>=2\.10'"):
        setup_py.import_torch()


def test_a_build_asks_for_pytorch_only_where_there_is_none(setup_py, no_torch):
    """pip, build and uv then install it for the build."""
    assert setup_py.get_requires_for_build_wheel() == setup_py.get_requires_for_build_editable() == ["torch>=2.10"]
    assert setup_py.get_requires_for_build_sdist() == []


def test_pytorch_is_found_in_the_environment_that_an_isolated_build_began_in(setup_py, no_torch, monkeypatch, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/torch.py").write_text("__version__ = '2.10.0'")
    answer = '["{}", {}, ["", "{}"]]'
    other = executable(tmp_path / "other/python", f"echo '{answer.format('2.7.18', 'true', '/nowhere')}'")
    without = executable(
        tmp_path / "without/python", f"echo '{answer.format(platform.python_version(), 'false', '/nowhere')}'"
    )
    broken = executable(tmp_path / "broken/python", "exit 1")
    right = executable(
        tmp_path / "right/python", f"echo '{answer.format(platform.python_version(), 'true', tmp_path / 'site')}'"
    )
    monkeypatch.setattr(setup_py, "surrounding_pythons", lambda: map(str, (other, without, broken, right)))
    torch = setup_py.import_torch()
    monkeypatch.delitem(sys.modules, "torch")
    assert torch.__file__ == str(tmp_path / "site/torch.py")
    assert sys.path == [str(tmp_path / "site")]


def test_environments_that_a_build_may_have_begun_in(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "activated"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.chdir(tmp_path)
    wanted = [executable(tmp_path / name, "") for name in ("activated/bin/python", ".venv/bin/python", "path/python3")]
    found = setup_py.surrounding_pythons()
    assert [python for python in found if python.startswith(str(tmp_path))] == [str(path) for path in wanted]
    # A front end is the parent of the process that builds.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import setup; print(setup.surrounding_pythons()[0])"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    if Path("/proc/self").exists():
        out = subprocess.run([sys.executable, "-c", parent], text=True, check=True, stdout=subprocess.PIPE).stdout
        assert out.strip() == sys.executable


# ---- compilers ----


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


def test_nvcc_is_found_where_it_is(setup_py, monkeypatch, tmp_path, capsys):
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
    assert setup_py.find_nvcc() == toolkit / "bin/nvcc"
    assert re.search(r"CUDA_HOME=.*nowhere is ignored: .*nowhere/bin/nvcc does not exist", capsys.readouterr().err)


def test_nvcc_of_another_major_version_is_an_error(setup_py, tmp_path):
    nvcc = executable(tmp_path / "nvcc", nvcc_of("12.8"))
    setup_py.check_nvcc(nvcc, "12.4")
    with pytest.raises(
        setup_py.NoCuda, match=r"nvcc is of CUDA 12\.8, and this PyTorch is of CUDA 13\.0: expected the same"
    ):
        setup_py.check_nvcc(nvcc, "13.0")


def test_forced_cuda_needs_a_pytorch_with_it_and_nvcc(setup_py, monkeypatch, capsys):
    without = types.SimpleNamespace(__version__="2.12.0+cpu", version=types.SimpleNamespace(cuda=None))
    with pytest.raises(setup_py.NoCuda, match=r"PyTorch 2\.12\.0\+cpu was built without CUDA"):
        setup_py.cuda_toolkit(without)
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: None)
    with_cuda = types.SimpleNamespace(__version__="2.12.0", version=types.SimpleNamespace(cuda="13.0"))
    with pytest.raises(setup_py.NoCuda, match=r"there is no nvcc.*pip install 'nvidia-cuda-nvcc==13\.0\.\*'"):
        setup_py.cuda_toolkit(with_cuda)
    with_older_cuda = types.SimpleNamespace(__version__="2.12.0", version=types.SimpleNamespace(cuda="12.8"))
    with pytest.raises(setup_py.NoCuda, match=r"there is no nvcc.*Install a toolkit of CUDA 12\.8"):
        setup_py.cuda_toolkit(with_older_cuda)
    reason = setup_py.NoCuda("there is no nvcc")
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    setup_py.leave_out_cuda(reason)
    assert capsys.readouterr().err == "warning: the CUDA kernels are left out: there is no nvcc\n"
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="error: FORCE_CUDA=1, and there is no nvcc"):
        setup_py.leave_out_cuda(reason)


def test_nvcc_is_asked_for_where_it_is_of_use_and_missing(setup_py, monkeypatch):
    torch = types.SimpleNamespace(
        version=types.SimpleNamespace(cuda="13.2"), cuda=types.SimpleNamespace(is_available=lambda: True)
    )
    monkeypatch.setattr(setup_py, "find_torch", lambda: torch)
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


NVCC_KNOWS = "echo sm_70; echo sm_75; echo sm_80; echo sm_86; echo sm_90; echo sm_90a"


@pytest.mark.parametrize(
    ("setting", "gpus", "expected"),
    [
        (None, [], "75 80 86 90 PTX90"),  # all that nvcc knows of ours, with PTX for later ones
        ("", [], "75 80 86 90 PTX90"),
        ("native", [], "75 80 86 90 PTX90"),
        ("7.0;8.0", [], "80"),
        ("7.5+PTX", [], "75 PTX75"),
        ("8.0, 9.0+PTX", [], "80 90 PTX90"),
        ("Ampere", [], "80 86 PTX86"),
        (None, [(8, 6), (8, 6)], "86 PTX86"),
        ("", [(6, 1), (8, 0)], "80 PTX80"),
        (None, [(8, 9)], "86 PTX86"),  # which this nvcc does not know, and which runs that
        (None, [(12, 0)], "90 PTX90"),
        ("7.5", [(8, 0)], "75"),
    ],
)
def test_architectures(setting, gpus, expected, setup_py, monkeypatch, tmp_path, capsys):
    """Those of TORCH_CUDA_ARCH_LIST, of the GPUs here, or all; without those that the kernels do not run on."""
    executable(tmp_path / "bin/nvcc", NVCC_KNOWS)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "to be put back")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST") if setting is None else monkeypatch.setenv(
        "TORCH_CUDA_ARCH_LIST", setting
    )
    flags = setup_py.architecture_flags(torch, tmp_path)
    codes = [re.fullmatch(r"-gencode=arch=compute_(\d+),code=(sm|compute)_\1", flag) for flag in flags]
    assert {("" if code[2] == "sm" else "PTX") + code[1] for code in codes} == set(expected.split())
    assert ("left out" in capsys.readouterr().err) == ("7.0" in str(setting) or (6, 1) in gpus)


def test_jetsons_code_is_made_on_their_kind_of_machine(setup_py, monkeypatch):
    known = [(7, 5), (8, 0), (8, 7), (9, 0), (11, 0)]
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert setup_py.default_architectures(torch, known) == ["7.5", "8.0", "8.7", "9.0", "11.0+PTX"]
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert setup_py.default_architectures(torch, known) == ["7.5", "8.0", "9.0+PTX"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("6.1", "the kernels need architecture 7.5 or newer, and this build is for 6.1"),
        ("9.9", "TORCH_CUDA_ARCH_LIST=9.9: Unknown CUDA arch"),
        ("12.0", "does not know architecture 12.0, but 7.5, 8.0, 8.6, 9.0"),
    ],
)
def test_architectures_that_cannot_be_built_for_are_named(setting, message, setup_py, monkeypatch, tmp_path):
    executable(tmp_path / "bin/nvcc", NVCC_KNOWS)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setting)
    with pytest.raises(setup_py.NoCuda, match=re.escape(message)):
        setup_py.architecture_flags(torch, tmp_path)
    executable(tmp_path / "bin/nvcc", "echo sm_50")
    with pytest.raises(setup_py.NoCuda, match=r"--list-gpu-code names none from 7\.5 on: sm_50"):
        setup_py.architecture_flags(torch, tmp_path)


def test_native_sources_use_nothing_that_the_oldest_pytorch_has_not():
    """STABLE_TORCH_ERROR_CODE_CHECK came with 2.13, instead of TORCH_ERROR_CODE_CHECK."""
    sources = [path for package in ("cc_attention", "libs") for path in (ROOT / package / "csrc").rglob("*.*")]
    assert len(sources) > 40
    assert [path.name for path in sources if "STABLE_TORCH_ERROR_CODE_CHECK" in path.read_text()] == []


# ---- loading ----


def test_native_code_is_there_where_there_is_a_compiler(setup_py):
    """Otherwise its tests would all be skipped."""
    assert native.LOADED or setup_py.find_compiler() is None


def test_cuda_kernels_are_there_where_there_is_nvcc(setup_py):
    """And load without a GPU and its driver."""
    wanted = torch.version.cuda is not None and native.LOADED and setup_py.find_nvcc() is not None
    assert native.runs_on(torch.device("cuda")) or not wanted or os.environ.get("FORCE_CUDA") == "0"


EVERYWHERE = frozenset({"cpu", "cuda"})


def test_a_gpu_without_kernels_for_it_is_warned_about(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda name: None if name == "_C" else "it is broken")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(
        UserWarning, match=r"in plain PyTorch on the GPU.*it is broken\. This builds it.*FORCE_CUDA=1 pip"
    ):
        assert native._load_all(EVERYWHERE) == {"cpu": None, "cuda": "it is broken"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._load_all(frozenset({"cpu"})) == {"cpu": None, "cuda": "CCNET_NATIVE turns it off"}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert native._load_all(EVERYWHERE) == {"cpu": None, "cuda": "it is broken"}
    monkeypatch.setattr(native, "_load", lambda name: None)
    assert native._load_all(EVERYWHERE) == {"cpu": None, "cuda": None}


def test_a_gpu_that_the_library_has_no_code_for_runs_plain_pytorch(monkeypatch):
    """The operators would fail on it. Each GPU is asked once, and warned about once."""
    asked = []

    def architecture(index: int) -> int:
        asked.append(index)
        return [80, 0][index]

    gpus = types.SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 1,
        get_device_name=lambda index: "Tesla P100",
        get_device_capability=lambda index: (6, 0),
    )
    operators = types.SimpleNamespace(ccnet=types.SimpleNamespace(cuda_architecture=architecture))
    monkeypatch.setattr(native, "torch", types.SimpleNamespace(cuda=gpus, ops=operators, device=torch.device))
    monkeypatch.setattr(native, "WHY_NOT", {"cpu": None, "cuda": None})
    monkeypatch.setattr(native, "_architectures", {})
    assert native.runs_on(torch.device("cuda", 0))
    with pytest.warns(UserWarning, match=r"on cuda:1, Tesla P100.*no code for its architecture 6\.0.*FORCE_CUDA=1"):
        assert not native.runs_on(torch.device("cuda", 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.runs_on(torch.device("cuda", 0))
        assert not native.runs_on(torch.device("cuda"))
    assert asked == [0, 1]

    def choose(x):
        return x + 1 if native.runs_on(torch.device("cuda", 0)) and not native.runs_on(torch.device("cuda", 1)) else x

    assert torch.compile(choose, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
    assert not native.runs_on(torch.device("xpu"))


def test_devices_by_environment_variable(monkeypatch):
    for value, wanted in {"0": set(), "1": EVERYWHERE, "": EVERYWHERE, "cpu": {"cpu"}, "cuda": {"cuda"}}.items():
        monkeypatch.setenv("CCNET_NATIVE", value)
        assert native._wanted_devices() == wanted
    monkeypatch.setattr(native, "_load", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    off = "CCNET_NATIVE turns it off"
    assert native._load_all(frozenset()) == {"cpu": off, "cuda": off}
    assert native._load_all(frozenset({"cuda"})) == {"cpu": off, "cuda": None}
    monkeypatch.setenv("CCNET_NATIVE", "no")
    with pytest.raises(ValueError, match="CCNET_NATIVE: expected 0, 1, cpu or cuda, got 'no'"):
        native._wanted_devices()


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


# ---- building and using ----

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
BUILDING = pytest.mark.xdist_group("building")  # in one process after the other: they build in the same folder


def run_python(text: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", text], cwd=folder, env=environment, text=True, capture_output=True, check=True
    )


def copy_packages(target: Path, *ignored: str) -> None:
    for package in ("cc_attention", "libs"):
        shutil.copytree(
            ROOT / package, target / package, ignore=shutil.ignore_patterns("*.so", "__pycache__", *ignored)
        )


@pytest.mark.slow
def test_without_native_code_the_reference_computes_and_one_warning_says_so(tmp_path):
    copy_packages(tmp_path)
    result = run_python(USE, tmp_path)
    assert result.stdout.startswith(f"False {tmp_path}")
    assert result.stderr.count("Warning") == 1
    assert "native code has not been built" in result.stderr
    assert "pip install" in result.stderr
    result = run_python(USE, tmp_path, CCNET_NATIVE="0")
    assert (result.stdout.split()[0], result.stderr) == ("False", "")  # it was asked for


@pytest.mark.slow
def test_native_code_that_does_not_load_is_reported(tmp_path):
    copy_packages(tmp_path, "csrc")
    (tmp_path / "cc_attention/_C.abi3.so").write_text("not a library")
    result = run_python(USE, tmp_path)
    assert result.stdout.startswith("False")
    assert re.search(r"cc_attention/_C\.abi3\.so cannot be loaded \(.*\)\. This builds it.*pip install", result.stderr)


PROJECT_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project with a source of one line each for the CPU and for CUDA, in a path that takes quoting."""
    root = tmp_path_factory.mktemp("build") / "research with spaces" / "project"
    (root / "cc_attention/csrc/cuda").mkdir(parents=True)
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, root)
    (root / "cc_attention/csrc/one.cpp").write_text("int on_the_cpu() { return 1; }\n")
    (root / "cc_attention/csrc/cuda/one.cu").write_text("int on_the_gpu() { return 1; }\n")
    return root


@pytest.fixture
def toolkit(tmp_path) -> Path:
    """A folder with an nvcc that keeps its arguments in nvcc.log, compiles as C++, and fails where told to."""
    subprocess.run([*["c++", "-shared", "-x", "c++", "/dev/null", "-o"], tmp_path / "libcudart.so"], check=True)
    (tmp_path / "lib64").mkdir()
    (tmp_path / "libcudart.so").rename(tmp_path / "lib64/libcudart.so")
    compile_as_cpp = """
    printf '%s\\n' "$@" >>"$log"
    while [ $# -gt 0 ]; do case $1 in -o) out=$2 ;; *.cu) source=$2$1 ;; esac; shift; done
    exec c++ -fPIC -c -x c++ /dev/null -o "$out"
    """
    executable(
        tmp_path / "bin/nvcc",
        f"""log="{tmp_path}/nvcc.log"
        case $* in
        --version) {nvcc_of(str(torch.version.cuda))} ;;
        --list-gpu-code) {NVCC_KNOWS} ;;
        *) if [ "$NVCC_FAILS" ]; then echo "no such luck" >&2; exit 1; fi
        {compile_as_cpp} ;;
        esac""",
    )
    return tmp_path


def build_in_place(project: Path, toolkit: Path, **environment: str) -> subprocess.CompletedProcess:
    for path in project.glob("cc_attention/*.so"):
        path.unlink()
    shutil.rmtree(project / "build", ignore_errors=True)
    without = {name: value for name, value in os.environ.items() if name not in ("TORCH_CUDA_ARCH_LIST", "FORCE_CUDA")}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=project,
        env={**without, "CUDA_HOME": str(toolkit), "CUDA_VISIBLE_DEVICES": "", **environment},
        text=True,
        capture_output=True,
    )


needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch that is built with CUDA")


@BUILDING
@needs_cuda_build
def test_every_architecture_is_built_wherever_the_project_stands(project, toolkit):
    """PyTorch adds no architecture where a flag has the letters "arch" in it, as a path may."""
    result = build_in_place(project, toolkit)
    assert result.returncode == 0, result.stderr
    arguments = (toolkit / "nvcc.log").read_text().splitlines()
    architectures = [argument for argument in arguments if argument.startswith("-gencode")]
    assert sorted(architectures) == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_90,code=sm_90",
    ]
    assert {path.name for path in (project / "cc_attention").glob("*.so")} == {"_C.abi3.so", "_C_cuda.abi3.so"}


@BUILDING
@needs_cuda_build
def test_what_stops_the_cuda_kernels_does_not_stop_the_others(project, toolkit):
    result = build_in_place(project, toolkit, NVCC_FAILS="1")
    assert result.returncode == 0, result.stderr
    assert "warning: the CUDA kernels are left out: " in result.stderr
    assert [path.name for path in (project / "cc_attention").glob("*.so")] == ["_C.abi3.so"]


def test_a_path_that_nvcc_cannot_take_is_named(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "ROOT", Path("/home/me/b,c"))
    monkeypatch.setattr(setup_py, "cuda_toolkit", lambda torch: Path("/usr/local/cuda"))
    with pytest.raises(setup_py.NoCuda, match="nvcc splits the names of folders at commas: /home/me/b,c"):
        setup_py.cuda_extension(torch)


def pip(*arguments: str | Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, **environment})


@BUILDING
@pytest.mark.slow
def test_wheel_is_abi3_and_works_away_from_the_checkout(tmp_path):
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"criss_cross_attention-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert {"cc_attention/__init__.py", "libs/__init__.py", "cc_attention/_C.abi3.so"} <= set(names)
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"cc_attention", "libs"}
    archive.extractall(tmp_path / "site")
    result = run_python(USE, tmp_path / "site")
    assert result.stdout.startswith(f"True {tmp_path / 'site'}")
    assert "Warning" not in result.stderr


@BUILDING
def test_source_distribution_holds_the_sources_and_needs_no_pytorch(tmp_path):
    no_torch = tmp_path / "path/torch.py"
    no_torch.parent.mkdir()
    no_torch.write_text("raise ImportError('not here')")
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(no_torch.parent)}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    sources = [path for package in ("cc_attention", "libs") for path in (ROOT / package / "csrc").rglob("*.*")]
    assert {*PROJECT_FILES, *(str(path.relative_to(ROOT)) for path in sources)} <= names


@pytest.mark.slow
def test_without_a_compiler_the_package_is_installed_all_the_same(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, source)
    copy_packages(source)
    only_python = tmp_path / "bin"
    only_python.mkdir()
    (only_python / "python").symlink_to(sys.executable)
    install = ("install", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site", source)
    pip(*install, PATH=str(only_python))
    assert not list((tmp_path / "site").rglob("*.so"))
    assert (tmp_path / "site/cc_attention/native.py").exists()
