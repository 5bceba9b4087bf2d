"""What a process does with memory that it has freed: counted page faults of a tensor made again and again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dataset import loading

ROOT = Path(__file__).parents[1]
# Prints how many pages the system cleared for 5 times a tensor of 24 MiB, each followed by one of 96 MiB, as it is and
# when memory is kept. Before, others like them: glibc before 2.38 finds room for an aligned block only where there is
# some more.
PROGRAM = """
import resource
import torch
from utils.memory import keep_freed_memory
def faults(mib):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(mib << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for set_up in (lambda: None, keep_freed_memory):
    set_up()
    print(sum([(faults(24), faults(96))[0] for _ in range(40)][35:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    # The threshold that the C library begins with; how it adjusts it depends on what else is in memory.
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, text=True, check=True, capture_output=True)
    as_it_is, kept = map(int, run.stdout.split())
    assert as_it_is >= 5 * (24 << 20) // 4096
    assert kept < as_it_is / 20


def test_processes_that_load_data_return_it(monkeypatch):
    called = []
    monkeypatch.setattr(loading, "return_freed_memory", lambda: called.append("returned"))
    monkeypatch.setattr(loading.signal, "signal", lambda *_: None)
    loading._set_up_worker(0)
    assert called == ["returned"]
