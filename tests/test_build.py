"""Building and loading the native code: what is found on which machine, what is left out, the wheel, living without."""

import importlib.util
import os
import platform
import re
import runpy
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
from programs import forked_program

from building import compilers, cuda, libraries, pytorch
from building.compilers import Compiler, NotBuilt
from cc_attention import native

ROOT = Path(__file__).parents[1]
MACHINE = Compiler(("c++",))


@pytest.fixture
def backend():
    """setup.py, as front ends import it."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def stand_in(path: Path, release: str = "13.0", fails: str = "error: no", rejects: str = "no such argument") -> Path:
    """An nvcc that keeps its arguments in nvcc.log beside it, and compiles an empty file as C++.

    Where its arguments contain `rejects`, it fails and prints `fails` among other things.
    """
    return executable(
        path,
        f"""
        case $* in
        --version) echo 'Cuda compilation tools, release {release}, V{release}.1'; exit ;;
        --list-gpu-code) for x in 70 75 80 86 90 90a; do echo sm_$x; done; exit ;;
        esac
        printf '%s\\n' "$@" >>"{path.parent}/nvcc.log"
        case $* in *"{rejects}"*) printf 'warning: what a pity\\n%s\\nand 200 lines more\\n' '{fails}'; exit 1 ;; esac
        kind=-c
        while [ $# -gt 0 ]; do
            case $1 in -o) out=$2 ;; -shared) kind=-shared ;; -MF) echo "x:" >"$2" ;; esac
            shift
        done
        exec c++ -fPIC $kind -x c++ /dev/null -o "$out"
        """,
    )


def fake_torch(cuda_release: str | None = "13.0", gpu: bool = False, driver: int = 13000) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        __version__="2.12.0",
        version=types.SimpleNamespace(cuda=cuda_release),
        cuda=types.SimpleNamespace(is_available=lambda: gpu),
        _C=types.SimpleNamespace(_cuda_getDriverVersion=lambda: driver),
    )


# ---- PyTorch ----


def test_the_oldest_pytorch_is_the_same_everywhere():
    assert pytorch.REQUIREMENT == "torch>=2.10"
    assert pytorch.STABLE_ABI == "-DTORCH_TARGET_VERSION=0x020a000000000000"
    assert f'dependencies = ["{pytorch.REQUIREMENT}"]' in (ROOT / "pyproject.toml").read_text()
    assert pytorch.REQUIREMENT in (ROOT / "requirements.txt").read_text().splitlines()


def test_old_pytorch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.9.1+cu126"))
    with pytest.raises(SystemExit, match=r"expected torch>=2\.10, found 2\.9\.1\+cu126"):
        pytorch.import_torch()


@pytest.fixture
def no_torch(monkeypatch):
    """Nowhere, as an isolated build sees it."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(pytorch, "site_packages", list)
    monkeypatch.setattr(pytorch, "surrounding_pythons", list)


def test_missing_pytorch_is_named(no_torch):
    with pytest.raises(SystemExit, match=r"PyTorch is needed .* Install it first: pip install 'torch>=2\.10'"):
        pytorch.import_torch()


def test_a_build_asks_for_pytorch_only_where_there_is_none(backend, no_torch):
    """pip, build and uv then install it for the build."""
    assert backend.get_requires_for_build_wheel() == backend.get_requires_for_build_editable() == ["torch>=2.10"]
    assert backend.get_requires_for_build_sdist() == []


def test_pytorch_is_found_in_the_environment_that_an_isolated_build_began_in(no_torch, monkeypatch, tmp_path):
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
    monkeypatch.setattr(pytorch, "surrounding_pythons", lambda: map(str, (other, without, broken, right)))
    torch = pytorch.import_torch()
    monkeypatch.delitem(sys.modules, "torch")
    assert torch.__file__ == str(tmp_path / "site/torch.py")
    assert sys.path == [str(tmp_path / "site")]


def test_environments_that_a_build_may_have_begun_in(monkeypatch, tmp_path):
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "activated"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.chdir(tmp_path)
    wanted = [executable(tmp_path / name, "") for name in ("activated/bin/python", ".venv/bin/python", "path/python3")]
    found = pytorch.surrounding_pythons()
    assert [python for python in found if python.startswith(str(tmp_path))] == [str(path) for path in wanted]
    # A front end is the parent of the process that builds.
    code = "from building import pytorch; print(pytorch.surrounding_pythons()[0])"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    if Path("/proc/self").exists():
        out = subprocess.run([sys.executable, "-c", parent], text=True, check=True, stdout=subprocess.PIPE).stdout
        assert out.strip() == sys.executable


def test_a_parent_that_may_not_be_looked_into(monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "readlink", refuse)
    assert pytorch.surrounding_pythons()  # those of other places


# ---- compilers ----


def only_on_path(monkeypatch, *folders: Path) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders)))


def programs(folder: Path, *names: str) -> Path:
    """A folder with links to these programs of the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    return folder


TOOLS = ("sh", "c++", "as", "ld")


def test_a_command_of_several_words_is_taken_apart():
    """nvcc and others want the compiler alone."""
    compiler = Compiler(("ccache", "/opt/g++", "-m64", "-pthread"))
    assert (compiler.program, compiler.flags) == ("/opt/g++", ("-m64", "-pthread"))
    assert (MACHINE.program, MACHINE.flags) == ("c++", ())
    assert Compiler(("ccache",)).program == "ccache"  # pretends to be a compiler, by its place on the PATH


def test_the_compiler_that_works_is_found(monkeypatch, tmp_path):
    assert compilers.find_compiler() == MACHINE
    only_on_path(monkeypatch, tmp_path / "clang")
    with pytest.raises(NotBuilt, match=r"no C\+\+ compiler that works: no c\+\+, g\+\+, clang\+\+"):
        compilers.find_compiler()
    executable(tmp_path / "clang/clang++", "exit 0")  # the only one there is
    assert compilers.find_compiler() == Compiler(("clang++",))
    executable(tmp_path / "clang/c++", "echo 'fatal error: type_traits: No such file or directory' >&2; exit 1")
    assert compilers.find_compiler() == Compiler(("clang++",))
    (tmp_path / "clang/clang++").unlink()
    with pytest.raises(NotBuilt, match=r"that works: c\+\+: fatal error: type_traits: No such file"):
        compilers.find_compiler()


def test_old_compilers_are_refused():
    for macros in (("-U__GNUC__", "-D__GNUC__=9"), ("-D__clang__", "-D__clang_major__=11")):
        assert "error expected GCC 10, Clang 12 or newer" in compilers.why_not(Compiler(("c++", *macros)))
    assert compilers.why_not(Compiler(("c++", "-D__clang__", "-D__clang_major__=12"))) is None


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-c++ -O2", r"CXX=no-such-c\+\+ -O2: there is no program no-such-c\+\+"),
        ("c++ -U__GNUC__ -D__GNUC__=9", "error expected GCC 10"),
        ("ccache no-such-c++", "there is no program (ccache|no-such)"),
    ],
)
def test_the_compiler_that_cxx_names_has_to_work(command, message, monkeypatch):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(SystemExit, match=message):
        compilers.find_compiler()


def test_windows_is_left_out(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("CXX", "cl")
    with pytest.raises(NotBuilt, match="not built on Windows"):
        compilers.find_compiler()
    assert cuda.missing_nvcc_wheels(fake_torch(gpu=True)) == []


def test_the_first_error_is_told():
    output = "from torch/util/Error.h:3:\na.cu(3): warning: y\na.cu(7): {} z\na.cu(8): error: w\n200 errors detected"
    for word in ("error:", "fatal error:", "error #20014-D:", "error   :"):
        assert compilers.first_error(output.format(word)) == f"a.cu(7): {word} z"
    assert (
        compilers.first_error("nvcc fatal   : Unsupported gpu architecture")
        == "nvcc fatal   : Unsupported gpu architecture"
    )
    assert compilers.first_error("a\nKilled\n") == "Killed"
    assert compilers.first_error("") == "it failed and printed nothing"
    works, output = compilers.run(["sh", "-c", "echo Stack dump:; kill -SEGV $$"])
    assert (works, compilers.first_error(output)) == (False, "error: it was ended by signal 11")


# ---- nvcc ----


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    """No nvcc on the PATH or in wheels."""
    only_on_path(monkeypatch, programs(tmp_path / "tools", *TOOLS))
    monkeypatch.setattr(cuda, "site_packages", list)
    monkeypatch.setattr(sys, "path", [])


def test_nvcc_is_looked_for_where_it_is(no_nvcc, monkeypatch, tmp_path, capsys):
    assert list(cuda.nvcc_programs()) == []
    monkeypatch.setattr(cuda, "site_packages", lambda: [str(tmp_path / "site-packages")])
    wheel = stand_in(tmp_path / "site-packages/nvidia/cu13/bin/nvcc")
    on_path = stand_in(tmp_path / "path/nvcc")
    home = stand_in(tmp_path / "home/bin/nvcc")
    monkeypatch.setenv("PATH", f"{on_path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert list(cuda.nvcc_programs()) == [str(home), str(on_path), str(wheel)]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "stale"))
    assert list(cuda.nvcc_programs()) == [str(on_path), str(wheel)]
    assert re.search(r"CUDA_HOME=.*stale is ignored: .*stale/bin/nvcc does not exist", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("of_nvcc", "of_torch"), [("12.4", "13.0"), ("13.0", "12.8"), ("12.0", "12.8"), ("13.5", "13.0")]
)
def test_nvcc_of_any_release_will_do(of_nvcc, of_torch, no_nvcc, monkeypatch, tmp_path):
    """cudart is linked statically. Without a GPU, nothing is known of the driver."""
    monkeypatch.setenv("CUDA_HOME", str(stand_in(tmp_path / "bin/nvcc", of_nvcc).parents[1]))
    nvcc = cuda.find_nvcc(fake_torch(of_torch), MACHINE)
    assert nvcc.program == str(tmp_path / "bin/nvcc")
    assert nvcc.command()[1:3] == ["-ccbin", "c++"]
    assert "--cudart=static" in nvcc.command()


@pytest.mark.parametrize(
    ("nvcc", "message"),
    [
        ({"release": "11.8"}, "nvcc is of CUDA 11.8: expected 12.0 or newer"),
        ({"release": "13.0"}, "nvcc is of CUDA 13.0, and the GPU's driver runs code of CUDA 12 at most"),
        (
            {"release": "12.4", "rejects": "-shared", "fails": "fatal error: nv/target: No such file"},
            "nvcc: fatal error: nv/target: No such file",
        ),
        (
            {"release": "12.4", "rejects": "-shared", "fails": "1: error: #error -- unsupported GNU version! gcc > 13"},
            "unsupported GNU version! gcc > 13 Let CUDAHOSTCXX or NVCC_CCBIN name a C++ compiler",
        ),
    ],
)
def test_an_nvcc_of_no_use_is_told_and_the_next_one_used(nvcc, message, no_nvcc, monkeypatch, tmp_path, capsys):
    torch = fake_torch("12.8", gpu=True, driver=12040)
    monkeypatch.setenv("CUDA_HOME", str(stand_in(tmp_path / "home/bin/nvcc", **nvcc).parents[1]))
    with pytest.raises(NotBuilt) as raised:
        cuda.find_nvcc(torch, MACHINE)
    assert message in str(raised.value)
    assert str(raised.value).endswith("This helps: install a toolkit of CUDA 12, and let CUDA_HOME name it")
    assert len(str(raised.value).splitlines()) == 1
    good = stand_in(tmp_path / "good/nvcc", "12.4")
    monkeypatch.setenv("PATH", f"{good.parent}:{os.environ['PATH']}")
    assert cuda.find_nvcc(torch, MACHINE).program == str(good)
    assert message in capsys.readouterr().err
    monkeypatch.setenv("FORCE_CUDA", "1")  # for other machines
    assert (nvcc != {"release": "13.0"}) == (cuda.find_nvcc(torch, MACHINE).program == str(good))


def test_wheels_on_a_disk_that_runs_nothing(no_nvcc, monkeypatch, tmp_path):
    """pip installs them for a build in TMPDIR, which may be mounted with noexec."""
    wheel = stand_in(tmp_path / "nvidia/cu13/bin/nvcc")
    wheel.chmod(0o644)
    monkeypatch.setattr(cuda, "site_packages", lambda: [str(tmp_path)])
    with pytest.raises(NotBuilt, match=r"Permission denied.*This helps: pip install 'cuda-toolkit\[nvcc,"):
        cuda.find_nvcc(fake_torch("13.2"), MACHINE)


def test_host_compilers(no_nvcc, monkeypatch, tmp_path):
    ours = Compiler(("ccache", "g++-15", "-m64"))
    assert cuda.hosts(ours) == [("-ccbin", "g++-15", "-Xcompiler=-m64"), ()]
    # Debian's nvcc chooses one that it accepts, where the machine's is too new.
    nvcc = stand_in(tmp_path / "bin/nvcc", rejects="-ccbin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda.find_nvcc(fake_torch(), ours) == cuda.Nvcc(str(nvcc), ())
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", " -ccbin=/conda/bin/x86_64-conda-linux-gnu-c++")
    assert cuda.hosts(ours) == [()]
    monkeypatch.setenv("NVCC_CCBIN", "/opt/g++-12")
    assert cuda.hosts(ours) == [("-ccbin", "/opt/g++-12")]
    monkeypatch.setenv("CUDAHOSTCXX", "/opt/g++-13")
    assert cuda.hosts(ours) == [("-ccbin", "/opt/g++-13")]


WHEELS = ["cuda-toolkit[nvcc,crt,cccl,cudart,nvvm]==13.2.*"]


def test_nvcc_wheels_are_asked_for_where_they_are_of_use(backend, no_nvcc, monkeypatch, tmp_path):
    on_gpu = fake_torch("13.2", gpu=True)
    monkeypatch.setattr(pytorch, "find_torch", lambda: on_gpu)
    assert backend.get_requires_for_build_editable() == backend.get_requires_for_build_wheel() == WHEELS
    assert cuda.missing_nvcc_wheels(fake_torch("13.2")) == []  # no GPU
    assert cuda.missing_nvcc_wheels(fake_torch("12.8", gpu=True)) == []  # there are none
    assert cuda.missing_nvcc_wheels(fake_torch(None)) == []
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert cuda.missing_nvcc_wheels(on_gpu) == []
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert cuda.missing_nvcc_wheels(fake_torch("13.2")) == WHEELS
    stand_in(tmp_path / "home/bin/nvcc", rejects="-shared")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda.missing_nvcc_wheels(on_gpu) == WHEELS  # this nvcc is of no use
    stand_in(tmp_path / "home/bin/nvcc")
    assert cuda.missing_nvcc_wheels(on_gpu) == []
    monkeypatch.delenv("CUDA_HOME")
    only_on_path(monkeypatch, tmp_path)  # no compiler
    assert cuda.missing_nvcc_wheels(on_gpu) == []


# ---- architectures ----

KNOWN = [(7, 5), (8, 0), (8, 6), (9, 0)]


@pytest.mark.parametrize(
    ("setting", "gpus", "expected"),
    [
        (None, [], "75 80 86 90 PTX80"),  # all that nvcc knows of ours, with PTX for later ones
        ("", [], "75 80 86 90 PTX80"),
        ("native", [], "75 80 86 90 PTX80"),
        ("7.0;8.0", [], "80"),
        ("7.5+PTX", [], "75 PTX75"),
        ("9.0a", [], "90"),
        ("8.0, 9.0+PTX", [], "80 90 PTX80"),
        ("Ampere", [], "80 86 PTX80"),
        (
            "7.0 7.5 8.0 10.0 12.0+PTX",
            [],
            "75 80 90 PTX80",
        ),  # as images set it: newer ones run the newest that nvcc knows
        ("12.0", [], "90 PTX80"),
        (None, [(8, 6), (8, 6)], "86 PTX80"),
        ("", [(6, 1), (8, 0)], "80 PTX80"),
        (None, [(8, 9)], "86 PTX80"),  # which this nvcc does not know, and which runs that
        (None, [(12, 0)], "90 PTX80"),
        ("7.5", [(8, 0)], "75"),
    ],
)
def test_architectures(setting, gpus, expected, monkeypatch, capsys):
    """Those of TORCH_CUDA_ARCH_LIST, of the GPUs here, or all; without those that the kernels do not run on."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "to be put back")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST") if setting is None else monkeypatch.setenv(
        "TORCH_CUDA_ARCH_LIST", setting
    )
    flags = cuda.architecture_flags(torch, KNOWN)
    codes = [re.fullmatch(r"-gencode=arch=compute_(\d+),code=(sm|compute)_(\d+)", flag).groups() for flag in flags]
    assert {("" if kind == "sm" else "PTX") + number for _, kind, number in codes} == set(expected.split())
    assert {ptx for ptx, *_ in codes} <= {"75", "80"}
    warned = any(name in str(setting) for name in ("7.0", "12.0")) or (6, 1) in gpus
    assert ("no code for" in capsys.readouterr().err) == warned


def test_a_forced_build_is_for_all_machines(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert cuda.default_architectures(torch, KNOWN) == ["8.6+PTX"]
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert cuda.default_architectures(torch, KNOWN) == ["7.5", "8.0", "8.6", "9.0+PTX"]


def test_jetsons_code_is_made_on_their_kind_of_machine(monkeypatch):
    known = [(7, 5), (8, 0), (8, 7), (9, 0), (11, 0)]
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cuda.default_architectures(torch, known) == ["7.5", "8.0", "8.7", "9.0", "11.0+PTX"]
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert cuda.default_architectures(torch, known) == ["7.5", "8.0", "9.0+PTX"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("6.1", "the kernels need architecture 7.5 or newer, and this nvcc knows 7.5, 8.0, 8.6, 9.0: there is nothing"),
        ("Kepler", "TORCH_CUDA_ARCH_LIST has Kepler: expected 8.0, 8.0+PTX and such, or Volta"),
    ],
)
def test_architectures_that_cannot_be_built_for_are_named(setting, message, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setting)
    with pytest.raises(NotBuilt, match=re.escape(message)):
        cuda.architecture_flags(torch, KNOWN)


def test_an_nvcc_that_knows_none_of_our_architectures(tmp_path):
    nvcc = cuda.Nvcc(str(executable(tmp_path / "nvcc", "echo sm_50")), ())
    with pytest.raises(NotBuilt, match=r"--list-gpu-code names none from 7\.5 on: sm_50"):
        nvcc.architectures()


# ---- loading ----


def test_native_code_is_there_where_there_is_a_compiler():
    """Otherwise its tests would all be skipped."""
    if not native.LOADED:
        with pytest.raises(NotBuilt):
            compilers.find_compiler()


def test_cuda_kernels_are_there_where_there_is_nvcc():
    """And load without a GPU and its driver."""
    if torch.version.cuda is not None and native.LOADED and not native.runs_on(torch.device("cuda")):
        assert list(cuda.nvcc_programs()) == [] or "FORCE_CUDA=0" in native.WHY_NOT["cuda"]


EVERYWHERE = frozenset({"cpu", "cuda"})


def test_a_gpu_without_kernels_for_it_is_warned_about(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda name: None if name == "_C" else "it is broken")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match=r"in plain PyTorch on the GPU.*it is broken\. This builds it.*pip install"):
        assert native._load_all(EVERYWHERE) == {"cpu": None, "cuda": "it is broken"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._load_all(frozenset({"cpu"})) == {"cpu": None, "cuda": "CCNET_NATIVE turns it off"}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert native._load_all(EVERYWHERE) == {"cpu": None, "cuda": "it is broken"}
    monkeypatch.setattr(native, "_load_cuda", lambda: None)
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
    fake = types.SimpleNamespace(cuda=gpus, ops=operators, device=torch.device, compiler=torch.compiler)
    monkeypatch.setattr(native, "torch", fake)
    monkeypatch.setattr(native, "WHY_NOT", {"cpu": None, "cuda": None})
    monkeypatch.setattr(native, "_architectures", {})
    assert native.runs_on(torch.device("cuda", 0))
    with pytest.warns(UserWarning, match=r"on cuda:1, Tesla P100.*no code for its architecture 6\.0.*pip install"):
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


DRIVER = """
#include <cstdlib>
extern "C" int cuDriverGetVersion(int* version) { *version = std::atoi(std::getenv("DRIVER")); return 0; }
"""


@pytest.mark.slow
@pytest.mark.skipif(not native.library("_C_cuda").exists(), reason="needs the CUDA kernels")
def test_a_driver_that_is_too_old_for_the_library_is_told(tmp_path):
    """cudart would refuse it: error 35. The driver stands in; it has nothing but a version."""
    (tmp_path / "libcuda.cpp").write_text(DRIVER)
    subprocess.run(
        ["c++", "-shared", "-fPIC", "libcuda.cpp", "-o", "libcuda.so.1"], cwd=tmp_path, check=True, text=True
    )
    ask = "import torch; from cc_attention import native; print(native.WHY_NOT['cuda'])"
    major = int(re.search(r"CUDA (\d+)", torch.ops.ccnet.cuda_build())[1])
    for driver, expected in (
        (f"{major - 1}080", rf"_C_cuda\.abi3\.so cannot run: .* CUDA {major}, .* than CUDA {major - 1}\.8's"),
        (f"{major}000", "None"),
    ):
        out = run_python(ask, ROOT, LD_LIBRARY_PATH=str(tmp_path), DRIVER=driver).stdout
        assert re.search(expected, out), out


def test_devices_by_environment_variable(monkeypatch):
    for value, wanted in {"0": set(), "1": EVERYWHERE, "": EVERYWHERE, "cpu": {"cpu"}, "cuda": {"cuda"}}.items():
        monkeypatch.setenv("CCNET_NATIVE", value)
        assert native._wanted_devices() == wanted
    monkeypatch.setattr(native, "_load", lambda name: None)
    monkeypatch.setattr(native, "_load_cuda", lambda: None)
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
    best = torch.ops.ccnet.cpu_build().split("; ")[1]  # that this compiler did not fail at
    assert seen == set(libraries.INSTRUCTION_SETS[1 : libraries.INSTRUCTION_SETS.index(best) + 1])


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
PREDICT = """
import numpy, torch
from criss_cross_attention import build_model, load_model
torch.save(build_model("resnet18").state_dict(), "snapshot.pth")
model = load_model("snapshot.pth")
ids = model.predict(numpy.zeros((30, 40, 3), "uint8"))
print(ids.dtype, ids.shape, model.classes.name)
"""
BUILDING = pytest.mark.xdist_group("building")  # in one process after the other: they build in the same folder


def run_python(text: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", text], cwd=folder, env=environment, text=True, capture_output=True, check=True
    )


def copy_packages(target: Path, *ignored: str) -> None:
    for package in ("cc_attention", "libs", "networks", "dataset", "utils"):
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


PROJECT_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "requirements.txt")


def copy_project(target: Path) -> Path:
    """What is needed to build, but no sources."""
    target.mkdir(parents=True)
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, target)
    shutil.copytree(ROOT / "building", target / "building", ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture
def project(tmp_path) -> Path:
    """The project with sources of one line each, in a path that takes quoting and has the letters "arch"."""
    root = copy_project(tmp_path / "research, für alle" / "project")
    (root / "cc_attention/csrc/cpu").mkdir(parents=True)
    (root / "cc_attention/csrc/cuda").mkdir()
    sources = ("one.cpp", "cpu/two_avx2.cpp", "cpu/two_avx512.cpp", "cpu/two_avx512_bf16.cpp", "cuda/one.cu")
    for number, name in enumerate(sources):
        (root / "cc_attention/csrc" / name).write_text(f"int source_{number}() {{ return 1; }}\n")
    return root


def build_in_place(project: Path, **environment: str) -> subprocess.CompletedProcess:
    settings = {"CUDA_VISIBLE_DEVICES": "", "TORCH_CUDA_ARCH_LIST": "", **environment}
    return forked_program(setup_py, "--quiet", "build_ext", "--inplace", cwd=project, **settings)


def setup_py(*arguments: str) -> None:
    """`python setup.py arguments...`, with the modules of the folder that it is in."""
    sys.argv = ["setup.py", *arguments]
    sys.path.insert(0, os.getcwd())
    for name in [name for name in sys.modules if name.split(".")[0] == "building"]:
        del sys.modules[name]
    runpy.run_path("setup.py", run_name="__main__")


def built(project: Path) -> set[str]:
    return {path.name for path in (project / "cc_attention").glob("_C*")}


BOTH = {"_C.abi3.so", "_C_cuda.abi3.so"}
ONLY_CPU = {"_C.abi3.so", "_C_cuda.not_built"}
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch that is built with CUDA")


def debian(box: Path) -> dict[str, str]:
    """/usr/bin/nvcc is a script, and neither bin/ nor lib/ is beside the real one."""
    nvcc = stand_in(box / "usr/lib/nvidia-cuda-toolkit/bin/nvcc", "12.4", rejects="-ccbin")
    executable(box / "usr/bin/nvcc", f'exec "{nvcc}" "$@"')
    return {"PATH": f"{box}/usr/bin"}


def conda(box: Path) -> dict[str, str]:
    """Activating sets CXX, flags and nvcc's flags."""
    cxx = programs(box / "bin", "c++") / "c++"
    stand_in(box / "bin/nvcc", "12.9", rejects="-ccbin")
    return {
        "PATH": f"{box}/bin",
        "CONDA_PREFIX": str(box),
        "CXX": str(cxx),
        "CC": "gcc",
        "CXXFLAGS": f"-fvisibility-inlines-hidden -std=c++17 -isystem '{box}/include'",
        "LDFLAGS": f"-Wl,-O2 '-L{box}/lib'",
        "NVCC_PREPEND_FLAGS": f" -ccbin={cxx}",
    }


def hpc_module(box: Path) -> dict[str, str]:
    """nvcc on the PATH alone, compilers of several words, and a CUDA_HOME of the past."""
    stand_in(box / "path/nvcc", "12.4", rejects="-Xcompiler=-pthread-nowhere")
    executable(box / "path/ccache", 'exec "$@"')
    settings = {"CC": "ccache gcc -pthread", "CXX": "ccache c++ -pthread", "CUDA_HOME": str(box / "gone")}
    return {"PATH": f"{box}/path", **settings}


def newer_toolkit(box: Path) -> dict[str, str]:
    return {"CUDA_HOME": str(stand_in(box / "bin/nvcc", "14.1").parents[1])}


@pytest.mark.slow
@needs_cuda_build
@pytest.mark.parametrize("box", [debian, conda, hpc_module, newer_toolkit])
def test_both_libraries_are_built_on(box, project, tmp_path):
    settings = box(tmp_path / "a box, für nvcc")
    path = os.pathsep.join([settings.pop("PATH", ""), "/usr/bin", "/bin"])
    result = build_in_place(project, **settings, PATH=path)
    assert (result.returncode, built(project)) == (0, BOTH), result.stderr
    assert re.search(r"_C\.abi3\.so: instruction sets up to avx512_bf16; \d+\.\d MB", result.stdout)
    assert re.search(
        r"_C_cuda\.abi3\.so: by CUDA 1\d\.\d for compute_80, .*; needs a driver of CUDA 1\d", result.stdout
    )
    (log,) = tmp_path.rglob("nvcc.log")
    arguments = log.read_text().splitlines()
    assert sorted(x for x in arguments if x.startswith("-gencode")) == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_80,code=sm_90",
    ]
    assert not [x for x in arguments if str(project) in x]  # nvcc splits names at commas
    if box is hpc_module:
        assert arguments.count("-Xcompiler=-pthread") == 3  # of the probe, a source and the library
        assert build_in_place(project, **settings, PATH=path).returncode == 0
        assert log.read_text().splitlines().count("-c") == 1  # the second time it only links


@pytest.mark.slow
@needs_cuda_build
def test_what_stops_the_cuda_kernels_does_not_stop_the_others(project, tmp_path):
    nvcc = stand_in(tmp_path / "bin/nvcc", fails="one.cu(3): error: no such luck", rejects="one.cu")
    result = build_in_place(project, CUDA_HOME=str(tmp_path))
    assert (result.returncode, built(project)) == (0, ONLY_CPU), result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    log = "build/native/cc_attention/csrc/cuda/one.log"
    reason = f"one.cu(3): error: no such luck (all of it: {log})"
    assert said == [f"warning: the operators will run in plain PyTorch on the GPU: {reason}"]
    assert "200 lines more" not in result.stderr
    assert "200 lines more" in (project / log).read_text()
    assert (project / "cc_attention/_C_cuda.not_built").read_text() == reason
    forced = build_in_place(project, CUDA_HOME=str(tmp_path), FORCE_CUDA="1")
    assert forced.returncode == 1
    assert forced.stderr.splitlines()[-1] == f"error: FORCE_CUDA=1, and {reason}"
    stand_in(nvcc)
    assert build_in_place(project, CUDA_HOME=str(tmp_path)).returncode == 0
    assert built(project) == BOTH


@pytest.mark.slow
def test_an_instruction_set_that_the_compiler_fails_at_is_left_out(project, tmp_path):
    crash = "echo 'clang: error: unable to execute command: Aborted' >&2; exit 254"
    cxx = executable(tmp_path / "clang 16", f'case $* in *{{0}}.cpp*) {crash} ;; esac; exec c++ "$@"')
    text = cxx.read_text()
    for fails, left, library in (
        ("two_avx512_bf16", "avx512_bf16", "avx512"),
        ("two_avx2", "avx2, avx512, avx512_bf16", "baseline"),
    ):
        cxx.write_text(text.replace("{0}", fails))
        shutil.rmtree(project / "build", ignore_errors=True)
        result = build_in_place(project, CXX=str(cxx), FORCE_CUDA="0")
        assert (result.returncode, built(project)) == (0, ONLY_CPU), result.stderr
        assert (
            f"warning: the kernels for {left} are left out, which this compiler fails at: clang: error" in result.stderr
        )
        assert f"instruction sets up to {library};" in result.stdout
        assert f"-DCCNET_BEST_CAPABILITY={library}" in (project / "build/native/cpp.ninja").read_text()
    cxx.write_text(text.replace("{0}", "one"))
    shutil.rmtree(project / "build")
    result = build_in_place(project, CXX=f"'{cxx}'", FORCE_CUDA="0")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: CXX is set, and clang: error: unable to execute")


@pytest.mark.slow
def test_a_machine_whose_compiler_fails_gets_the_package_without_native_code(project, tmp_path):
    """As macOS and others may."""
    executable(
        tmp_path / "c++", 'case $* in *one.cpp*) echo "one.cpp:1: error: what?"; exit 1 ;; esac; exec /usr/bin/c++ "$@"'
    )
    result = build_in_place(project, PATH=f"{tmp_path}:/usr/bin:/bin", FORCE_CUDA="0")
    assert (result.returncode, built(project)) == (0, {"_C.not_built"}), result.stderr
    assert "warning: the operators will run in plain PyTorch everywhere: one.cpp:1: error: what?" in result.stderr


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
    typed = {f"{package}/{name}" for package in ("cc_attention", "libs") for name in ("__init__.py", "py.typed")}
    assert {*typed, "cc_attention/_C.abi3.so", "criss_cross_attention/ccnet.py"} <= set(names)
    packages = {name.split("/")[0] for name in names if "dist-info" not in name}
    assert packages == {"cc_attention", "libs", "criss_cross_attention"}
    archive.extractall(tmp_path / "site")
    result = run_python(USE, tmp_path / "site")
    assert result.stdout.startswith(f"True {tmp_path / 'site'}")
    assert "Warning" not in result.stderr
    for name in ("networks", "dataset", "utils"):  # those of somebody else's project
        (tmp_path / "site" / f"{name}.py").write_text("raise ImportError('not this one')")
    result = run_python(PREDICT, tmp_path / "site")
    assert result.stdout == "uint8 (30, 40) cityscapes\n", result.stderr


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
    sources += list((ROOT / "building").glob("*.py"))
    assert {*PROJECT_FILES, *(str(path.relative_to(ROOT)) for path in sources)} <= names


@pytest.mark.slow
def test_without_a_compiler_the_package_is_installed_all_the_same(tmp_path):
    source = copy_project(tmp_path / "source")
    copy_packages(source)
    only_python = tmp_path / "bin"
    only_python.mkdir()
    (only_python / "python").symlink_to(sys.executable)
    install = ("install", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site", source)
    pip(*install, PATH=str(only_python))
    assert not list((tmp_path / "site").rglob("*.so"))
    result = run_python(USE, tmp_path / "site")
    assert result.stderr.count("Warning") == 1
    assert "has not been built (there is no C++ compiler that works: no c++, g++, clang++)" in result.stderr
