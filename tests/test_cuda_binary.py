"""What nvcc made of the kernels, for every architecture: registers, spills, instructions. Nothing runs on a GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from attention import DTYPES, everything, random_inputs
from emulation import ROOT, emulated_gpu, launches

from cc_attention import native

LIBRARY = Path(native.__file__).with_name("_C_cuda.abi3.so")
DOCUMENT = ROOT / "docs" / "cuda_kernels.md"
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
# Of sm_80, by the CUDA programming guide's table of compute capabilities
REGISTERS, SHARED_BYTES, RESERVED_BYTES, WARPS, BLOCKS = 65536, 164 * 1024, 1024, 64, 32

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not LIBRARY.exists(), reason="needs cc_attention/_C_cuda: pip install -e ., with nvcc"),
]


def cuobjdump(*arguments: str) -> str:
    """CUDA's disassembler: a toolkit's, or the one that comes with triton."""
    program = shutil.which("cuobjdump")
    if program is None:
        triton = pytest.importorskip("triton", reason="needs cuobjdump: CUDA's, or triton's")
        program = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    result = subprocess.run([program, *arguments, str(LIBRARY)], check=True, text=True, stdout=subprocess.PIPE)
    return subprocess.run(["c++filt"], input=result.stdout, check=True, text=True, stdout=subprocess.PIPE).stdout


def short(name: str) -> str:
    """attention_kernel<TensorCores, half, 128> for what compilers call it."""
    name = name.split("(")[0].removeprefix("void ").replace("ccnet::", "").replace("__nv_", "").replace("__", "")
    return re.sub(r"<\w+<(.*?)> ?>", r"<\1>", name).strip()


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, tuple[int, int, int]]]:
    """(registers, bytes of stack, bytes of local memory) by kernel and architecture."""
    built = set(re.findall(r"^ELF file.*\.(sm_\w+)\.cubin", cuobjdump("-lelf"), re.MULTILINE))
    if not built >= set(ARCHITECTURES) and (torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ):
        pytest.skip(f"needs a build for every architecture, and this one is for {', '.join(sorted(built))}")
    found: dict[str, dict[str, tuple[int, int, int]]] = {}
    architecture = name = ""
    for line in cuobjdump("-res-usage").splitlines():
        if start := re.match(r"arch = (sm_\w+)", line):
            architecture = start[1]
        elif start := re.match(r"\s*Function (.*):$", line):
            name = short(start[1])
        elif numbers := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found.setdefault(name, {})[architecture] = tuple(map(int, numbers.groups()))
    assert found.pop("image_kernel")  # never launched: PyTorch asks by it what code a GPU runs
    return found


def launch_batch_norm(dtype: torch.dtype) -> None:
    ops, numbers = torch.ops.ccnet, torch.float64 if dtype == torch.float64 else torch.float32
    for channels in (8, 7):  # whole packs of 16 bytes, and not
        x = torch.ones(2, channels, dtype=dtype)
        weight = torch.ones(channels, dtype=numbers)
        running = (weight.clone(), weight.clone())
        ops.abn_normaliser_of_parts_(ops.abn_statistics(x)[None], *running, 0.1, 1e-5)
        ops.abn_normaliser_of_running(*running, 1e-5)
        normaliser = ops.abn_normaliser_of_batch_(x, *running, 0.1, 1e-5)
        for activation in ("identity", "leaky_relu", "elu", "relu"):
            constants = (weight, weight, None, 1e-5, activation, 0.01)
            z = ops.abn_forward(x, normaliser, *constants)
            kept = (x, None, x, normaliser) if activation == "relu" else (None, z, x, normaliser)
            ops.abn_backward_sums(*kept, *constants)
            ops.abn_backward_of_batch(*kept, *constants)


@pytest.fixture(scope="module")
def launched() -> dict[str, tuple[int, int]]:
    """(threads a block, bytes of shared memory) by kernel, as launchers ask for them."""
    for dtype in DTYPES:
        for device in ({}, {"shared_bytes": 64 * 1024, "has_bfloat16": False}):
            with emulated_gpu(**device):
                for length in (8, 65, 129):
                    inputs = {name: x.to(dtype) for name, x in random_inputs(1, 8, 8, 1, length).items()}
                    list(everything(inputs, inputs))
        with emulated_gpu():
            launch_batch_norm(dtype)
    return {short(name): size for name, size in launches().items()}


def round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def blocks_on_sm_80(threads: int, shared_bytes: int, registers: int) -> int:
    """How many blocks a multiprocessor holds at once."""
    warps = threads // 32
    by_registers = REGISTERS // (round_up(registers * 32, 256) * warps)
    by_shared = SHARED_BYTES // (round_up(shared_bytes, 128) + RESERVED_BYTES)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)


def test_every_architecture_is_built(resources, launched):
    assert re.search(r"PTX file.*sm_120", cuobjdump("-lptx"))
    assert set(resources) == set(launched)  # every kernel in the library is one that something launches
    assert all(set(of) >= set(ARCHITECTURES) for of in resources.values())


def test_nothing_is_spilled(resources):
    for name, of in resources.items():
        for architecture, (_, stack, local) in of.items():
            assert (stack, local) == (0, 0), f"{name} on {architecture}: stack {stack}, local memory {local}"


def test_two_blocks_fit_on_a_multiprocessor_of_sm_80(resources, launched):
    for name, (threads, shared_bytes) in launched.items():
        registers = resources[name]["sm_80"][0]
        assert blocks_on_sm_80(threads, shared_bytes, registers) >= 2, (name, threads, shared_bytes, registers)


def test_kernels_need_no_more_shared_memory_than_devices_have(launched):
    """At most 99 KB, but for those that launchers take only where the device has that much."""
    assert max(shared_bytes for _, shared_bytes in launched.values()) <= 99 * 1024


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_120"])  # without and with cp.async, and the newest
def test_instructions(architecture, resources):
    """16-bit kernels on tensor cores: their products are HMMA, fragments come by LDSM, global memory in 16 bytes."""
    seen: dict[str, set[str]] = {}
    name = ""
    for line in cuobjdump("-sass", "-arch", architecture).splitlines():
        if start := re.match(r"\s*Function : (.*)$", line):
            name = short(start[1])
            seen[name] = set()
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            seen[name].add(instruction[1])
    del seen["image_kernel"]
    assert set(seen) == set(resources)
    for name, instructions in seen.items():
        assert not any(re.match(r"LDL|STL", instruction) for instruction in instructions), f"{name}: local memory"
        wide = any(re.match(r"(LDG|LDGSTS)\..*128", x) for x in instructions)
        by_element = re.match(r"abn_(total|merge|running)|abn_\w+<\w+, 1[,>]", name)
        assert wide or by_element, f"{name}: no global loads of 16 bytes"
        # GPUs that are not for computing centres have few units for float64: only kernels for single channels use it.
        if not re.search(r"double|abn_(merge|running)", name):
            in_double = {x for x in instructions if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|\w+\..*F64|MUFU.*64", x)}
            assert not in_double, f"{name}: {in_double}"
        if "TensorCores" not in name and "WholeLine" not in name:
            continue
        if architecture == "sm_75" and "bfloat16" in name:  # never launched there
            continue
        assert any(instruction.startswith("HMMA") for instruction in instructions), f"{name}: no HMMA"
        assert any(instruction.startswith("LDSM") for instruction in instructions), f"{name}: no LDSM"
        if architecture != "sm_75":
            kind = "HMMA.16816.F32.BF16" if "bfloat16" in name else "HMMA.16816.F32"
            assert kind in instructions, f"{name}: {sorted(instructions)}"
            assert any(re.match(r"LDGSTS\.E\.BYPASS.*128", x) for x in instructions), f"{name}: no cp.async"


def table(resources, launched) -> str:
    header = ["kernel", "threads", "shared bytes", *ARCHITECTURES, "blocks on an SM of sm_80"]
    lines = [f"| {' | '.join(header)} |", f"|:--|{'--:|' * (len(header) - 1)}"]
    for name in sorted(launched):
        if name.startswith("abn_"):
            continue
        threads, shared_bytes = launched[name]
        registers = [resources[name][architecture][0] for architecture in ARCHITECTURES]
        blocks = blocks_on_sm_80(threads, shared_bytes, registers[1])
        lines.append(f"| `{name}` | {' | '.join(map(str, (threads, shared_bytes, *registers, blocks)))} |")
    return "\n".join(lines)


def test_the_documented_numbers_are_those_of_this_build(resources, launched):
    text = DOCUMENT.read_text()
    documented = re.search(r"Registers a thread, by CUDA ([\d.]+)'s compiler", text)
    assert documented is not None
    producer = torch.ops.ccnet.cuda_build().split("; ")[0]
    if producer != f"CUDA {documented[1]}":
        pytest.skip(f"the table is of CUDA {documented[1]}; this build is of {producer}")
    wanted = table(resources, launched)
    assert wanted in text, f"{DOCUMENT.name} should have\n\n{wanted}"
