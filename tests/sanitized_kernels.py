"""The CUDA kernels in the emulator (cuda_emulator/), compiled with sanitizers; and whether these, and it, find bugs.

tests/sanitizers.sh runs these tests: to compile the kernels takes minutes.
"""

import re
import subprocess

import pytest
from emulation import EMULATOR, KERNELS, compile_with_emulator


def run_sanitized(executable, *arguments):
    result = subprocess.run([executable, *map(str, arguments)], text=True, capture_output=True)
    return result.returncode, result.stdout, result.stderr


# Each sanitizer sees all kinds of kernels: on tensor cores (half, bfloat16), on plain ones, and on tensor cores as TF32
# (float). Those of double are float's plain ones.
@pytest.mark.parametrize(
    ("sanitizer", "dtype"), [("address", "bfloat16"), ("address", "float"), ("thread", "half"), ("thread", "float")]
)
def test_sanitizers_find_nothing(sanitizer, dtype):
    """AddressSanitizer and UndefinedBehaviorSanitizer; ThreadSanitizer, for which threads of a block are threads."""
    kernels = [path for path in KERNELS if path.stem.endswith(f"_{dtype}")]
    name = {"half": "Half", "bfloat16": "BFloat16"}.get(dtype, dtype)
    sources = [EMULATOR / "run_kernels.cpp", *kernels]
    executable = compile_with_emulator(f"run_{dtype}", sources, sanitizer, f"-DDTYPE={name}")
    code, out, error = run_sanitized(executable)
    assert (code, out) == (0, "done\n"), out + error


# Where a planted bug shows: in a run without sanitizer (what it says), under AddressSanitizer and
# UndefinedBehaviorSanitizer, under ThreadSanitizer. Where nothing stands it may pass unseen.
BUGS = {
    "first_barrier_missing": {"": r"wrong: out", "thread": "data race"},
    "second_barrier_missing": {"": r"wrong: out", "thread": "data race"},
    "syncwarp_missing": {"": r"wrong: out", "thread": "data race"},
    "partial_tile_not_masked": {"": r"wrong: out"},
    "copy_not_waited": {"": r"a thread returned without waiting for its copies"},
    "read_past_shared": {"address": "use-after-poison"},
    "read_before_shared": {"address": "use-after-poison"},
    "write_past_shared": {"": r"a write past the end of a piece of shared memory", "address": "use-after-poison"},
    "divergent_barrier": {"": r"at different __syncthreads: .*planted_bugs\.cpp:\d+ and .*planted_bugs\.cpp:\d+"},
    "early_return": {"": r"threads returned before a __syncthreads\n.* wait at .*planted_bugs\.cpp:\d+"},
    "half_warp_shuffle": {"": r"deadlock: no thread of the block can go on\n.* wait at .*planted_bugs\.cpp:\d+"},
    "blocks_race": {"thread": "data race"},
    "misaligned_vector": {"address": "misaligned address"},
    "uninitialised_sum": {"address": r"wrong: out"},
    "different_accesses": {"": r"lanes of one warp access memory at .*planted_bugs\.cpp:\d+, others do not"},
    "too_much_shared": {"": r"the kernel takes \d+ bytes of shared memory, the launch gave \d+"},
}


@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
def test_planted_bugs_are_caught(sanitizer):
    executable = compile_with_emulator("planted_bugs", [EMULATOR / "planted_bugs.cpp"], sanitizer)
    assert run_sanitized(executable, "none", 97) == (0, "right\n", "")
    for bug, where in BUGS.items():
        if sanitizer in where:
            _, out, error = run_sanitized(executable, bug, 97)
            assert re.search(where[sanitizer], out + error), f"{bug}: {out}{error}"
            if where[sanitizer] == "data race":  # with both lines
                assert len(re.findall(r"planted_bugs\.cpp:\d+", error)) >= 2, error
    # A tile that is not masked is seen only at lengths that leave a part of one.
    assert run_sanitized(executable, "partial_tile_not_masked", 96) == (0, "right\n", "")
