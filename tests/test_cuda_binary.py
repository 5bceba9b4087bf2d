"""What nvcc made of the kernels, for every architecture: registers, spills, instructions. Nothing runs on a GPU."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from attention import DTYPES, everything, random_inputs, tf32
from emulation import ROOT, emulated_gpu, take_launched_kernels

from benchmarks import sass
from benchmarks.sass import short
from cc_attention import native

LIBRARY = Path(native.__file__).with_name("_C_cuda.abi3.so")
DOCUMENT = ROOT / "docs" / "cuda_kernels.md"
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
# Of a multiprocessor, by the CUDA programming guide's table of compute capabilities
REGISTERS, RESERVED_BYTES, BLOCKS = 65536, 1024, 16
SHARED_KB_AND_WARPS = {
    "sm_75": (64, 32),
    "sm_80": (164, 64),
    "sm_86": (100, 48),
    "sm_89": (100, 48),
    "sm_90": (228, 64),
    "sm_100": (228, 64),
    "sm_120": (100, 48),
}
ATTENTION = re.compile(r"(tiled_)?(attention|value_gradient|query_key_gradient)_kernel")

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not LIBRARY.exists(), reason="needs cc_attention/_C_cuda: pip install -e ., with nvcc"),
    pytest.mark.skipif(not sass.disassembler(), reason="needs cuobjdump: CUDA's, or triton's"),
]


def cuobjdump(*arguments: str) -> str:
    """What CUDA's disassembler prints about the library, with demangled names."""
    text = sass.cuobjdump(LIBRARY, *arguments)
    return subprocess.run(["c++filt"], input=text, check=True, text=True, stdout=subprocess.PIPE).stdout


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


DEVICES = {"sm_75": {"shared_bytes": 64 * 1024, "architecture": 75}, "sm_80": {}}


@pytest.fixture(scope="module")
def launched_on() -> dict[str, dict[str, tuple[int, int]]]:
    """(threads a block, bytes of shared memory) by kernel, as launchers ask for them, on sm_75 and on all later."""
    take_launched_kernels()
    launched = {}
    for name, device in DEVICES.items():
        with emulated_gpu(**device):
            for dtype in DTYPES:
                for length in (8, 65, 113, 129):
                    inputs = {name: x.to(dtype) for name, x in random_inputs(1, 8, 8, 1, length).items()}
                    list(everything(inputs, inputs))
                launch_batch_norm(dtype)
            with tf32("fp32_precision"):
                inputs = {name: x.float() for name, x in random_inputs(1, 8, 8, 1, 8).items()}
                list(everything(inputs, inputs))
        launched[name] = {short(name): size for name, size in take_launched_kernels().items()}
    return launched


@pytest.fixture(scope="module")
def launched(launched_on) -> dict[str, tuple[int, int]]:
    return launched_on["sm_75"] | launched_on["sm_80"]


def round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def blocks_at_once(architecture: str, threads: int, shared_bytes: int, registers: int) -> int:
    """How many blocks a multiprocessor holds."""
    shared_kb, most_warps = SHARED_KB_AND_WARPS[architecture]
    warps = threads // 32
    by_registers = REGISTERS // (round_up(registers * 32, 256) * round_up(warps, 4))
    by_shared = shared_kb * 1024 // (round_up(shared_bytes, 128) + RESERVED_BYTES)
    return min(by_registers, by_shared, most_warps // warps, BLOCKS)


def test_every_architecture_is_built(resources, launched):
    assert re.search(r"PTX file.*sm_80", cuobjdump("-lptx"))
    assert set(resources) == set(launched)  # every kernel in the library is one that something launches
    assert all(set(of) >= set(ARCHITECTURES) for of in resources.values())


def test_nothing_is_spilled(resources, launched_on):
    for name, of in resources.items():
        for architecture, (_, stack, local) in of.items():
            if name not in launched_on["sm_75" if architecture == "sm_75" else "sm_80"]:
                continue
            assert (stack, local) == (0, 0), f"{name} on {architecture}: stack {stack}, local memory {local}"


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_two_blocks_fit_on_a_multiprocessor(architecture, resources, launched_on):
    for name, (threads, shared_bytes) in launched_on["sm_80"].items():
        if ATTENTION.match(name) or architecture == "sm_80":  # the explicit form's largest kernels take 64 KB
            registers = resources[name][architecture][0]
            blocks = blocks_at_once(architecture, threads, shared_bytes, registers)
            assert blocks >= 2, (name, threads, shared_bytes, registers)


def test_kernels_need_no_more_shared_memory_than_devices_have(launched):
    """At most 99 KB, but for those that launchers take only where the device has that much."""
    assert max(shared_bytes for _, shared_bytes in launched.values()) <= 99 * 1024


@pytest.mark.parametrize("architecture", ["sm_75", "sm_120"])  # without and with cp.async; sm_80's run in test_sass.py
def test_instructions(architecture, resources, launched_on):
    """Kernels on tensor cores: their products are HMMA, fragments come by LDSM, global memory in 16 bytes."""
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
    for name in launched_on["sm_75" if architecture == "sm_75" else "sm_80"]:
        instructions = seen[name]
        assert not any(re.match(r"LDL|STL", instruction) for instruction in instructions), f"{name}: local memory"
        if not re.match(r"abn_(total|merge|running)|abn_\w+<\w+, 1[,>]|change_layout", name):  # by element
            assert any(re.match(r"(LDG|LDGSTS)\..*128", x) for x in instructions), f"{name}: no loads of 16 bytes"
        if ATTENTION.match(name) and not name.startswith("tiled_"):
            stores = {x.removesuffix(".SYS") for x in instructions if x.startswith("STG")}
            assert "STG.E.128" in stores, f"{name}: no stores of 16 bytes"
            assert stores <= {"STG.E.128", "STG.E.64", "STG.E"}, f"{name}: {stores}"  # these: numbers of the softmax
        # GPUs that are not for computing centres have few units for float64: only kernels for single channels use it.
        if name.startswith("abn_") and not re.search(r"double|abn_(merge|running)", name):
            in_double = {x for x in instructions if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|\w+\..*F64|MUFU.*64", x)}
            assert not in_double, f"{name}: {in_double}"
        if re.match(r"abn_|change_layout", name) or "PlainCores" in name:
            continue
        assert any(instruction.startswith("HMMA") for instruction in instructions), f"{name}: no HMMA"
        assert any(instruction.startswith("LDSM") for instruction in instructions), f"{name}: no LDSM"
        if architecture != "sm_75":
            of = {"bfloat16": "HMMA.16816.F32.BF16", "half": "HMMA.16816.F32", "float": "HMMA.1688.F32.TF32"}
            kind = of[re.findall(r"bfloat16|half|float", name)[-1]]
            assert kind in instructions, f"{name}: {sorted(instructions)}"
            assert any(re.match(r"LDGSTS\.E\.BYPASS.*128", x) for x in instructions), f"{name}: no cp.async"


def table(resources, launched) -> str:
    header = ["kernel", "threads", "shared bytes", *ARCHITECTURES[1:], "blocks, sm_80", "sm_86", "sm_90"]
    lines = [f"| {' | '.join(header)} |", f"|:--|{'--:|' * (len(header) - 1)}"]
    for name in sorted(launched):
        if not ATTENTION.match(name) or "half" in name or "double" in name:  # as bfloat16, and as float
            continue
        threads, shared_bytes = launched[name]
        registers = {architecture: resources[name][architecture][0] for architecture in ARCHITECTURES[1:]}
        blocks = [blocks_at_once(x, threads, shared_bytes, registers[x]) for x in ("sm_80", "sm_86", "sm_90")]
        numbers = (threads, shared_bytes, *registers.values(), *blocks)
        lines.append(f"| `{name}` | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def test_the_documented_numbers_are_those_of_this_build(resources, launched_on):
    text = DOCUMENT.read_text()
    documented = re.search(r"Registers a thread, by CUDA ([\d.]+)'s compiler", text)
    assert documented is not None
    producer = torch.ops.ccnet.cuda_build().split("; ")[0]
    if producer != f"CUDA {documented[1]}":
        pytest.skip(f"the table is of CUDA {documented[1]}; this build is of {producer}")
    wanted = table(resources, launched_on["sm_80"])
    assert wanted in text, f"{DOCUMENT.name} should have\n\n{wanted}"
