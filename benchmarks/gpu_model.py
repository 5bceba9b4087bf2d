"""A model of the time that CUDA kernels take, from what they issue and move: nothing here runs on a GPU.

The machine code of every kernel is run on the CPU (benchmarks/sass), one block of each kind that a launch has. It has
to do what the emulator counted of that block, as often and at the same addresses; else there is an error. A launch then
takes as long as the longest of

- memory: the bytes that pass the L2 cache, at the memory's full bandwidth;
- tensor cores: the instructions of the busiest one, on the multiprocessor that has most blocks; every fourth warp of a
  block shares one;
- issue: all instructions there, one a cycle for each of four schedulers, or the busiest unit's if that takes longer;
- latency: one block by itself, whose warps issue in order and wait for operands and at barriers, times the rounds that
  the busiest multiprocessor needs for its blocks.

Left out are contention within these, instruction fetches, L2's own bandwidth, and clocks below boost. Expect +-40%.
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from benchmarks.sass import (
    WARP,
    Block,
    Instruction,
    Issue,
    Kernel,
    Launch,
    Memory,
    Operand,
    SassError,
    kernels,
    run_block,
    short,
)

SECTOR = 32  # bytes
SCHEDULERS = 4  # a multiprocessor's; each has its own units but for shared memory
# From one kernel's end to the next one's first instruction in a stream that has work queued. An estimate: 2 to 3 us are
# usual in profiles of these GPUs.
LAUNCH = 2.5e-6


class Gpu(NamedTuple):
    name: str
    architecture: str
    # NVIDIA's datasheets, and the whitepapers of the Ampere GA100, Hopper and Ada architectures
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes/s
    l2_bytes: int
    bfloat16: float  # FLOP/s, dense, tensor cores with float32 sums
    float32: float  # FLOP/s, without tensor cores
    # CUDA programming guide, table of compute capabilities: what a multiprocessor has
    shared_bytes: int
    warps: int
    blocks: int
    # Cycles for which a warp's instruction keeps its unit (CUDA programming guide, "Arithmetic instructions")
    fma: float  # float32; of integers, comparisons and logic it is 2 everywhere, of exp2 and 1/x 8
    mma: float  # m16n8k16 on one of four tensor cores
    # Cycles until a result can be used. Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
    # Microbenchmarking" (arXiv 2402.13499), of the PCIe model for the H100
    shared_latency: float
    l2_latency: float
    memory_latency: float

    def properties(self) -> dict[str, int]:
        """What launchers ask of a device, as emulation.emulated_gpu takes it; 1 KB of shared memory is reserved."""
        return {
            "shared_bytes": self.shared_bytes - 1024,
            "cache_bytes": self.l2_bytes,
            "multiprocessors": self.multiprocessors,
        }


GPUS = (
    Gpu(
        "A100 SXM 80 GB", "sm_80", 108, 1.41e9, 2039e9, 40 << 20, 312e12, 19.5e12, 164 << 10, 64, 32, 2, 8, 29, 262, 466
    ),
    # wgmma takes 4 cycles for as much; mma.sync reaches 63% of that, measured by Luo et al.
    Gpu("H100 SXM", "sm_90", 132, 1.83e9, 3350e9, 50 << 20, 989.4e12, 66.9e12, 228 << 10, 64, 32, 1, 6.4, 29, 262, 479),
    # With float32 sums its tensor cores run at half rate.
    Gpu("RTX 4090", "sm_89", 128, 2.52e9, 1008e9, 72 << 20, 165.2e12, 82.6e12, 100 << 10, 48, 24, 1, 32, 30, 273, 542),
)

# Cycles until a result can be used: dependent arithmetic takes 4 (Abdelkhalik et al., "Demystifying the Nvidia Ampere
# Architecture through Microbenchmarking and Instruction-level Analysis", arXiv 2208.11174); m16n8k16 33 (Sun et al.,
# "Dissecting Tensor Cores via Microbenchmarks", arXiv 2206.02874). The rest are estimates of about this size.
ARITHMETIC, TENSOR, SPECIAL, SHUFFLE, UNIFORM, BARRIER = 4, 33, 18, 23, 10, 20

# The unit that an instruction needs, by name; others take a slot of the scheduler only. Uniform ones have their own.
UNITS = {
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "IMAD"), "fma"),
    **dict.fromkeys(("IADD3", "VIADD", "LOP3", "SHF", "SEL", "ISETP", "FSETP", "FSEL", "PRMT", "LEA", "IMNMX"), "alu"),
    **dict.fromkeys(("FMNMX", "VIMNMX", "VIADDMNMX", "PLOP3", "P2R", "R2P", "IABS", "MOV", "CS2R", "F2FP"), "alu"),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "POPC"), "special"),
    "HMMA": "mma",
}


# ---- what is issued ----


class BlocksRun(NamedTuple):
    """One block of a launch, and how many there are like it."""

    block: Block
    alike: int
    left_out: Counter[str]  # by the compiler, of what the emulator counted of the block


# What the emulator counts under these names, and the machine code's instructions that do it. The compiler may leave out
# what only makes a result, if nobody uses that or there is another that makes it.
MARKERS = {"mma": "HMMA", "ldmatrix": "LDSM", "copies": "LDGSTS", "barriers": "BAR", "shuffles": "SHFL"}
MAY_BE_LEFT_OUT = ("mma", "ldmatrix", "shuffles", "loads")


def run_launch(launch, kernel: Kernel, memory: Memory) -> list[BlocksRun]:
    """Run one of each kind of blocks of an emulation.CountedLaunch. SassError if it does not do what was counted."""
    runs = []
    for alike in launch.alike:
        given = Launch(launch.blocks, launch.threads, launch.shared_bytes, launch.parameters)
        block = run_block(kernel, given, alike.first, memory)
        runs.append(BlocksRun(block, alike.count, check_block(block, alike.counters)))
    return runs


def check_block(block: Block, counters) -> Counter[str]:
    """What the compiler left out. SassError if the block did otherwise not do what an emulation.Counters says of it."""
    acted = acting_by_name(block)
    found = {name: acted[instruction] for name, instruction in MARKERS.items()} | block.accesses
    left_out: Counter[str] = Counter()
    for name, count in found.items():
        counted = getattr(counters, name)
        if name in MAY_BE_LEFT_OUT and count < counted:
            left_out[name] = counted - count
        elif count != counted and not (name == "load_addresses" and left_out["loads"]):
            raise SassError(
                f"{block.kernel.name} on {block.kernel.architecture}, block {block.number}: {name} is {count} in its "
                f"machine code, but the emulator counted {counted}"
            )
    return +left_out


def issued_by_name(block: Block) -> Counter[str]:
    """Instructions that the block's warps issue."""
    return _by_name(block, lambda issue: issue.warps)


def acting_by_name(block: Block) -> Counter[str]:
    """Those of them that are not predicated off for the whole warp."""
    return _by_name(block, lambda issue: issue.acting)


def on_busiest_tensor_core(block: Block) -> int:
    """Its instructions. A warp's number in the block tells the scheduler, which has a tensor core of its own."""
    counts = [0] * SCHEDULERS
    for issue in block.trace:
        if block.kernel.code[issue.number].name == "HMMA":
            for scheduler in range(SCHEDULERS):
                counts[scheduler] += (issue.acting & 0x11111111 << scheduler).bit_count()
    return max(counts)


def _by_name(block: Block, warps_of: Callable[[Issue], int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for issue in block.trace:
        counts[block.kernel.code[issue.number].name] += warps_of(issue).bit_count()
    return counts


# ---- a block by itself ----


class Waits(NamedTuple):
    """Of one block by itself: how long it takes, and for what its slowest warps wait, in cycles."""

    cycles: float
    global_loads: float  # for registers
    copies: float  # to shared memory
    shared_loads: float  # and shuffles
    tensor_cores: float
    barriers: float
    exposed: float  # instructions that wait for a load or copy


@cache
def registers_of(i: Instruction) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """What an instruction reads and writes, as (kind, number)."""

    def several(x: Operand, count: int) -> list[tuple[str, int]]:
        if x.kind in ("memory", "c"):
            found = [("R", x.number + n) for n in range(2 if x.wide else 1)] if x.number != 255 else []
            return found + ([("UR", x.uniform)] if x.uniform is not None else [])
        unset = {"R": 255, "UR": 63, "P": 7, "UP": 7}.get(x.kind)
        return [] if unset is None or x.number == unset else [(x.kind, x.number + n) for n in range(count)]

    operands, words = i.operands, max(1, i.width() // 4)
    results = 0 if i.base in ("STG", "STS", "LDGSTS", "BRA", "BAR", "EXIT", "RET", "CALL", "R2P") else 1
    results += next((n for n, x in enumerate(operands[1:]) if x.kind not in ("P", "UP")), 0) if results else 0
    if i.base == "SHFL":
        results = 2
    read: list[tuple[str, int]] = several(i.guard, 1) if i.guard else []
    written: list[tuple[str, int]] = []
    for n, x in enumerate(operands):
        count = 1
        if i.base == "HMMA":
            count = (4, 4, 2, 4)[n]
        elif i.base == "LDSM" and n == 0:
            count = next((int(m) for m in i.modifiers if m in ("2", "4")), 1)
        elif i.base in ("LDG", "LDS", "LDC", "STG", "STS"):
            count = words if x.kind != "memory" else 1
        elif (i.has("WIDE") and n in (0, len(operands) - 1)) or i.has("U64") or i.base == "CS2R":
            count = 2
        (written if n < results else read).extend(several(x, count))
    return read, written


class Step(NamedTuple):
    """What an instruction costs a warp."""

    instruction: Instruction
    needs: list[tuple[str, int]]  # registers that have to be there
    writes: list[tuple[str, int]]
    unit: str
    busy: float  # cycles of the unit
    latency: float  # cycles until the result is there
    waits_for: str  # what who waits for the result waits for, a field of Waits; "" is not counted


def steps_of(kernel: Kernel, gpu: Gpu, from_memory: float) -> list[Step]:
    global_latency = gpu.l2_latency + from_memory * (gpu.memory_latency - gpu.l2_latency)
    busy = {"fma": gpu.fma, "alu": 2, "special": 8, "mma": gpu.mma}
    by_unit = {"mma": (TENSOR, "tensor_cores"), "special": (SPECIAL, "")}
    by_name = {
        "LDG": (global_latency, "global_loads"),
        "LDGSTS": (global_latency, ""),
        "SHFL": (SHUFFLE, "shared_loads"),
    }
    by_name |= dict.fromkeys(("LDS", "LDSM", "LDL"), (gpu.shared_latency, "shared_loads"))
    steps = []
    for i in kernel.code:
        unit, (read, written) = UNITS.get(i.name, ""), registers_of(i)
        usual = by_unit.get(unit, (ARITHMETIC if i.base == i.name else UNIFORM, ""))
        latency, waits_for = by_name.get(i.name, usual)
        steps.append(Step(i, [*read, *written], written, unit, busy.get(unit, 0), latency, waits_for))
    return steps


class WarpAlone:
    """A warp that issues in order, one instruction a cycle, as soon as registers, units and copies are there."""

    def __init__(self) -> None:
        self.now = 0.0
        self.there: dict[tuple[str, int], tuple[float, str]] = {}  # since when a register is, and what brings it
        self.free = dict.fromkeys(set(UNITS.values()), 0.0)
        self.copies = 0.0  # when the copies that have no group yet are there,
        self.groups: list[float] = []  # and those of groups
        self.waited, self.exposed = dict.fromkeys(Waits._fields, 0.0), 0

    def issue(self, step: Step, acts: bool) -> None:
        then, waits_for = self.now + 1, ""
        for register in step.needs:
            if register in self.there and self.there[register][0] > then:
                then, waits_for = self.there[register]
        if step.unit and self.free[step.unit] > then:
            then, waits_for = self.free[step.unit], "tensor_cores" if step.unit == "mma" else ""
        if step.instruction.name == "DEPBAR":
            done = max(0, len(self.groups) - sum(x.number for x in step.instruction.operands[1:]))
            if (copied := max(self.groups[:done], default=0)) > then:
                then, waits_for = copied, "copies"
            self.groups = self.groups[done:]
        if waits_for:
            self.waited[waits_for] += then - self.now - 1
            self.exposed += waits_for != "tensor_cores"
        self.now = then
        if step.unit and acts:
            self.free[step.unit] = then + step.busy
        if step.instruction.name == "LDGDEPBAR":
            self.groups.append(self.copies)
        elif acts:  # an instruction that is predicated off everywhere is issued and does nothing
            if step.instruction.name == "LDGSTS":
                self.copies = then + step.latency
            self.there.update(dict.fromkeys(step.writes, (then + step.latency, step.waits_for)))


def run_alone(block: Block, gpu: Gpu, from_memory: float) -> Waits:
    """The block by itself on a multiprocessor. That share of global loads comes from memory, the rest from L2."""
    steps = steps_of(block.kernel, gpu, from_memory)
    issued, acting = (np.array(bits, np.uint32) for bits in list(zip(*block.trace, strict=True))[1:])
    # Warps that do the same take as long; one of them is enough.
    streams = {(issued >> w & 1).tobytes() + (acting >> w & 1).tobytes(): w for w in range(block.threads // WARP)}
    warps = {w: WarpAlone() for w in streams.values()}
    at_barrier: dict[int, WarpAlone] = {}
    for issue in block.trace:
        step = steps[issue.number]
        for w, warp in warps.items():
            if not issue.warps >> w & 1:
                continue
            if w in at_barrier:  # all that live have come
                then = max(other.now for other in at_barrier.values()) + BARRIER
                for other in at_barrier.values():
                    other.waited["barriers"] += then - other.now
                    other.now = then
                at_barrier.clear()
            warp.issue(step, bool(issue.acting >> w & 1))
            if step.instruction.name == "BAR":
                at_barrier[w] = warp
    slowest = max(warps.values(), key=lambda warp: warp.now)
    return Waits(**slowest.waited)._replace(cycles=slowest.now, exposed=slowest.exposed)


# ---- a launch ----


def blocks_at_once(gpu: Gpu, threads: int, shared_bytes: int, registers: int) -> int:
    """How many blocks a multiprocessor holds; 64 K registers, given out by 256, and 1 KB of shared memory a block."""
    warps = threads // WARP
    by_registers = 65536 // (-(-registers * WARP // 256) * 256 * warps)
    by_shared = gpu.shared_bytes // (-(-shared_bytes // 128) * 128 + 1024)
    return min(by_registers, by_shared, gpu.warps // warps, gpu.blocks)


class LaunchModel(NamedTuple):
    """What a launch is expected to do on a GPU. Times in seconds."""

    kernel: str
    blocks: int
    warps: int  # of a block
    at_once: int  # blocks on a multiprocessor
    issued: Counter[str]  # by all warps
    left_out: Counter[str]  # by the compiler, of what the emulator counted
    waits: Waits
    memory: float
    tensor_cores: float
    issue: float
    latency: float

    @property
    def time(self) -> float:
        return LAUNCH + max(self.terms().values())

    def terms(self) -> dict[str, float]:
        return {"memory": self.memory, "mma": self.tensor_cores, "issue": self.issue, "latency": self.latency}


def model_launch(gpu: Gpu, launch, kernel: Kernel, runs: list[BlocksRun]) -> LaunchModel:
    issued: Counter[str] = Counter()
    units: Counter[str] = Counter()
    products = 0  # on the busiest tensor core
    left_out: Counter[str] = Counter()
    for block, count, block_left_out in runs:
        left_out.update({name: count * times for name, times in block_left_out.items()})
        products += count * on_busiest_tensor_core(block)
        issued.update({name: count * times for name, times in issued_by_name(block).items()})
        for name, times in acting_by_name(block).items():
            units[UNITS.get(name, "")] += count * times
    busiest = math.ceil(launch.blocks / gpu.multiprocessors)  # blocks
    share = busiest / launch.blocks / gpu.clock  # of the work in cycles, in seconds on the busiest multiprocessor
    at_once = blocks_at_once(gpu, launch.threads, launch.shared_bytes, kernel.registers)
    counters = launch.counters
    shared = counters.shared_passes + counters.shared_conflicts + counters.ldmatrix_passes + counters.ldmatrix_conflicts
    from_memory = counters.memory_loads / counters.load_sectors if counters.load_sectors else 0
    waits = max(run_alone(run.block, gpu, from_memory) for run in runs)
    return LaunchModel(
        short(launch.kernel),
        launch.blocks,
        launch.threads // WARP,
        at_once,
        issued,
        left_out,
        waits,
        memory=(counters.memory_loads + counters.memory_stores) * SECTOR / gpu.bandwidth,
        tensor_cores=share * products * gpu.mma,
        issue=share
        * max(
            issued.total() / SCHEDULERS,
            units["fma"] * gpu.fma / SCHEDULERS,
            units["alu"] * 2 / SCHEDULERS,
            units["special"] * 8 / SCHEDULERS,
            shared + issued["SHFL"],
        ),
        latency=math.ceil(busiest / at_once) * waits.cycles / gpu.clock,
    )


def model_launches(gpu: Gpu, launches: list, library: Path, tensors: list[Tensor]) -> list[LaunchModel]:
    """Of emulation.CountedLaunch, counted with the GPU's properties. Tensors that are not given are zeros."""
    memory, code = Memory(tensors), kernels(library, gpu.architecture)
    models = []
    for launch in launches:
        kernel = code[short(launch.kernel)]
        models.append(model_launch(gpu, launch, kernel, run_launch(launch, kernel, memory)))
    return models
