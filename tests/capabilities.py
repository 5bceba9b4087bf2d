"""The instruction sets that the CPU kernels are compiled for, and those of them that this CPU has."""

import os
from contextlib import contextmanager

from libs import native

ALL_CAPABILITIES = ["baseline", "avx2", "avx512", "avx512_bf16"]


@contextmanager
def capability(name):
    before = os.environ.get("CCNET_CPU_CAPABILITY")
    os.environ["CCNET_CPU_CAPABILITY"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["CCNET_CPU_CAPABILITY"]
        else:
            os.environ["CCNET_CPU_CAPABILITY"] = before


def is_supported(name):
    with capability(name):
        try:
            return native.cpu_capability() == name
        except RuntimeError:
            return False


CAPABILITIES = [name for name in ALL_CAPABILITIES if native.LOADED and is_supported(name)]
