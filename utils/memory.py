"""What a process does with the memory of tensors on the CPU when it no longer needs them.

By default the C library returns the memory of a large tensor to the system as soon as it is freed, and the next tensor
gets other pages, which the system clears first. How much of a run's time that takes depends on the machine: a few
hundredths of it to a third were seen (docs/training_speed.md).
"""

import ctypes

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_MIB = 1 << 20


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensors, from now on. Does nothing where the C library is not glibc.

    Raises:
        RuntimeError: the C library refuses.
    """
    _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 * _MIB})


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`: the values at which the C library's own adjustment ends after a large tensor."""
    _set({_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 * _MIB, _M_TRIM_THRESHOLD: 64 * _MIB, _M_TOP_PAD: _MIB // 8})


def _set(values: dict[int, int]) -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    for parameter, value in values.items():
        if libc.mallopt(parameter, value) != 1:
            raise RuntimeError(f"mallopt({parameter}, {value}) was refused")
