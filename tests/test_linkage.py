"""What the libraries ask of the machine that loads them, read from the files."""

import platform
import re
import shutil
import subprocess

import pytest

from cc_attention import native

GLIBC = (2, 34)  # of RHEL 9, Ubuntu 22.04 and Debian 12; what README.md promises
LIBSTDCXX = (3, 4, 29)  # of GCC 11, as these have at least
NEEDED = {"libtorch_cpu.so", "libtorch_cuda.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}
NEEDED |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libdl.so.2", "librt.so.1", "libpthread.so.0"}
STABLE_ABI = re.compile(r"(aoti_torch|torch)_\w+")
WEAK = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}  # of every shared library

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("readelf") is None, reason="needs Linux and readelf"
)


@pytest.fixture(params=["_C", "_C_cuda"])
def library(request) -> str:
    path = native.library(request.param)
    if not path.exists():
        pytest.skip(f"needs {path}")
    return str(path)


def dynamic_symbols(library: str, which: str) -> list[str]:
    """Names with versions, as dlsym@GLIBC_2.34."""
    result = subprocess.run(["nm", "-D", which, library], check=True, text=True, stdout=subprocess.PIPE)
    return [line.split()[-1] for line in result.stdout.splitlines()]


def test_no_library_of_a_version_of_cuda_is_needed(library):
    result = subprocess.run(["readelf", "-d", library], check=True, text=True, stdout=subprocess.PIPE)
    assert set(re.findall(r"NEEDED.*\[(.*)\]", result.stdout)) <= NEEDED


def test_of_pytorch_only_the_stable_abi_is_used(library):
    without_version = {name for name in dynamic_symbols(library, "--undefined-only") if "@" not in name}
    assert {name for name in without_version if not STABLE_ABI.fullmatch(name)} <= WEAK
    assert any(map(STABLE_ABI.fullmatch, without_version))


@pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", platform.libc_ver()[1]))) > (2, 36), reason="built with a newer glibc than 2.36"
)
def test_no_newer_glibc_than_promised_is_needed(library):
    versions = {name.split("@")[1] for name in dynamic_symbols(library, "--undefined-only") if "@" in name}
    newest = {"GLIBC": GLIBC, "GLIBCXX": LIBSTDCXX, "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)}
    for version in versions:
        of, _, number = version.partition("_")
        assert tuple(map(int, number.split("."))) <= newest[of], version


def test_nothing_of_cudart_is_exported(library):
    names = dynamic_symbols(library, "--defined-only")
    assert [name for name in names if re.match(r"_*(cuda|cu[A-Z])|.*cudart", name)] == []
