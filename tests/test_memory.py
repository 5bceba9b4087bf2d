"""What a process does with memory that it has freed: counted page faults of a large tensor made again and again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Prints for each way to treat freed memory how many pages the system cleared for 5 times a tensor of 24 MiB and one
# of 96 MiB, after others like them: glibc before 2.38 finds room for an aligned block only where there is some more.
PROGRAM = """
import resource
import torch
from dataset.loading import _set_up_worker
from utils.memory import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    for mib in (24, 96):
        torch.zeros(mib << 18)
def as_a_worker():
    keep_freed_memory()  # it is a fork of a process that does
    _set_up_worker(0)
for treat in (lambda: None, as_a_worker, keep_freed_memory):
    treat()
    for _ in range(8):
        use()
    before = faults()
    for _ in range(5):
        use()
    print(faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_in_a_run_and_returned_in_the_processes_that_load_its_data():
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, text=True, check=True, capture_output=True)
    as_it_is, returned, kept = map(int, run.stdout.split())
    assert as_it_is > 5 * (96 << 20) // 4096 // 2
    assert kept < as_it_is / 20
    assert returned > as_it_is / 2
