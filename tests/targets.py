"""The targets that the native operators run on: each instruction set of the CPU, the emulated GPU, the GPU."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import emulation
import pytest
import torch

from cc_attention import native

ALL_CAPABILITIES = ["baseline", "avx2", "avx512", "avx512_bf16"]
EMULATED = pytest.param("emulated", marks=pytest.mark.emulated)
DEVICES = ["cpu", EMULATED, "cuda"]
TARGETS = [*ALL_CAPABILITIES, EMULATED, "cuda"]


@contextmanager
def capability(name: str) -> Iterator[None]:
    before = os.environ.get("CCNET_CPU_CAPABILITY")
    os.environ["CCNET_CPU_CAPABILITY"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["CCNET_CPU_CAPABILITY"]
        else:
            os.environ["CCNET_CPU_CAPABILITY"] = before


def _is_supported(name: str) -> bool:
    with capability(name):
        try:
            return native.cpu_capability() == name
        except RuntimeError:
            return False


def best_capability() -> str:
    return native.cpu_capability() if native.LOADED else "baseline"


def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert native.runs_on(torch.device("cuda")), "there is a GPU, and cc_attention/_C_cuda is not loaded"


@contextmanager
def running_on(target: str) -> Iterator[None]:
    """A context in which operators run on the target and tensors are created there; skips the test if there is none."""
    if target == "cuda":
        needs_gpu()
        with torch.device("cuda"):
            yield
    elif target == "emulated":
        with emulation.emulated_gpu():
            yield
    else:
        if not _is_supported(target):
            pytest.skip(f"this CPU has no {target}")
        with capability(target):
            yield


@contextmanager
def running_on_device(name: str) -> Iterator[list[Callable[[], AbstractContextManager]]]:
    """A context in which tensors are created on the device. Yields contexts, one for each way to run operators there.

    On the CPU these are its instruction sets. A test computes the expected result once, and compares each of them.
    """
    if name == "cpu":
        yield [partial(running_on, capability) for capability in ALL_CAPABILITIES if _is_supported(capability)]
    else:
        with running_on(name):
            yield [nullcontext]
