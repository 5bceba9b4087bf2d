"""What a process does with memory that it has freed: counted page faults of a large tensor made again and again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Prints how many pages the system had to clear for 5 times a tensor of 24 MiB and one of 96 MiB, after others like
# them: glibc before 2.38 finds room for an aligned block only where there is some more.
PROGRAM = """
import os, resource, sys
import torch
from utils import memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    for mib in (24, 96):
        torch.zeros(mib << 18)
{set_up}
for _ in range(8):
    use()
before = faults()
for _ in range(5):
    use()
print(faults() - before)
"""


def faults_of(set_up: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", PROGRAM.format(set_up=set_up)]
    return int(subprocess.run(program, env=environment, text=True, check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_in_a_run_and_returned_in_the_processes_that_load_its_data():
    as_it_is = faults_of("")
    assert as_it_is > 5 * (96 << 20) // 4096 // 2
    assert faults_of("memory.keep_freed_memory()") < as_it_is / 20
    in_a_worker = "memory.keep_freed_memory(); from dataset.loading import _set_up_worker; _set_up_worker(0)"
    assert faults_of(in_a_worker) > as_it_is / 2
