"""What a process does with the memory of tensors on the CPU when it no longer needs them.

By default the C library returns freed memory to the system as soon as it has much of it, and the next tensors get other
pages, which the system clears first. How much of a run's time that takes depends on the machine: a twentieth to a third
was seen (docs/training_speed.md, which also has the ways that were compared).
"""

import ctypes

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MIB = 1 << 20
_LARGE = 32 * _MIB  # the largest threshold that glibc takes, and where its own adjustment ends


def keep_freed_memory() -> None:
    """From now on keep freed memory for the next tensors, but that of tensors beyond 32 MiB, which would fragment it.

    Does nothing where the C library is not glibc.

    Raises:
        RuntimeError: the C library refuses.
    """
    _set({_M_MMAP_THRESHOLD: _LARGE, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 * _MIB})


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`: return what is free beyond 64 MiB, as the C library does after a large tensor."""
    _set({_M_TRIM_THRESHOLD: 2 * _LARGE, _M_TOP_PAD: _MIB // 8})


def _set(values: dict[int, int]) -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    for parameter, value in values.items():
        if libc.mallopt(parameter, value) != 1:
            raise RuntimeError(f"mallopt({parameter}, {value}) was refused")
