"""The machine code of CUDA kernels (SASS), run on the CPU: which instructions every warp issues, and what they compute.

A block's threads run in lockstep as long as they are at the same instruction, as rows of numpy arrays: registers are
[number, thread]. Every instruction is executed with real data, so branches go where they go on a GPU; one that is not
known here is an error. Warps that diverge come together where the code says so (BSSY, BSYNC), as on a GPU from Volta on.
What is rounded otherwise than by default, and what MUFU approximates, is computed in float32.
"""

import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

WARP = 32
PARAMETERS = {8: 0x160, 9: 0x210}  # where they begin in constant bank 0, by the architecture's generation
RESERVED_SHARED = {8: 0, 9: 1024}  # bytes of shared memory before the kernel's own


class SassError(Exception):
    """The code has something that is not known here, or does not fit what was counted."""


# ---- reading ----


def cuobjdump(library: Path, *arguments: str) -> str:
    """What CUDA's disassembler, a toolkit's or triton's, prints about a library, with demangled names."""
    program = shutil.which("cuobjdump")
    if program is None:
        try:
            import triton
        except ImportError:
            raise SassError("needs cuobjdump: CUDA's, or the one that comes with triton") from None
        program = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    result = subprocess.run([program, *arguments, str(library)], check=True, text=True, stdout=subprocess.PIPE)
    return subprocess.run(["c++filt"], input=result.stdout, check=True, text=True, stdout=subprocess.PIPE).stdout


def short(name: str) -> str:
    """attention_kernel<TensorCores, half, 128> for what compilers call it."""
    name = name.split("(")[0].removeprefix("void ").replace("ccnet::", "").replace("__nv_", "").replace("__", "")
    return re.sub(r"<\w+<(.*?)> ?>", r"<\1>", name).strip()


class Operand:
    """A register, predicate, constant, immediate or address. R and UR by number, with RZ 255 and URZ 63."""

    def __init__(self, text: str, floating: bool):
        self.text = text = text.replace(".reuse", "").strip()
        self.negative, self.inverted, self.absolute = text[:1] in "-!" and text != "-", text[:1] == "~", "|" in text
        body = text.lstrip("-!~").strip("|")
        self.kind, self.number, self.offset, self.scale, self.uniform, self.wide = "", 0, 0, 1, None, False
        if match := re.fullmatch(r"(U?)([RP])(\d+|Z|T)\|?(\.\w+)*", body):
            self.kind = match[1] + match[2]
            self.number = {"R": 255, "UR": 63, "P": 7, "UP": 7}[self.kind] if match[3] in "ZT" else int(match[3])
        elif match := re.fullmatch(r"c\[0x0\]\[(.*)\]\|?", body):
            self.kind = "c"
            self._address(match[1])
        elif match := re.fullmatch(r"(?:desc\[UR\d+\])?\[(.*)\]", body):
            self.kind = "memory"
            self._address(match[1])
        elif floating and (value := _float(text)) is not None:
            self.kind, self.number = "i", struct.unpack("<I", struct.pack("<f", value))[0]
            self.negative = False
        elif re.fullmatch(r"0x[0-9a-f]+|\d+", body):
            self.kind, self.number = "i", int(body, 0)
        self.bits = np.uint32(self.number & 0xFFFFFFFF)

    def _address(self, text: str) -> None:
        """[R2.64+UR4+0x10], [R2.X4+0x10] or the like."""
        self.number = 255
        for part in text.replace("+-", "+~").split("+"):
            if match := re.fullmatch(r"R(\d+|Z)(?:\.(64|U32|X4|X8|X16))?", part):
                self.number = 255 if match[1] == "Z" else int(match[1])
                self.wide = match[2] == "64"
                self.scale = int(match[2][1:]) if match[2] and match[2][0] == "X" else 1
            elif match := re.fullmatch(r"UR(\d+|Z)", part):
                self.uniform = 63 if match[1] == "Z" else int(match[1])
            else:
                self.offset += int(part.replace("~", "-"), 16)


def _float(text: str) -> float | None:
    try:
        return float(text.upper().replace("QNAN", "NAN").replace("SNAN", "NAN"))
    except ValueError:
        return None


class Instruction:
    def __init__(self, place: int, text: str):
        self.place, self.text = place, text
        guard, name, rest = re.fullmatch(r"(?:@(!?U?P\w+) )?(\S+)\s*(.*?)\s*", text).groups()
        self.guard = Operand(guard, False) if guard else None
        self.name, *self.modifiers = name.split(".")
        # The uniform datapath's instructions are the others' with registers of its own.
        self.base = self.name[1:] if self.name[:1] == "U" and self.name[1:] in EXECUTE else self.name
        floating = self.base in ("FADD", "FMUL", "FFMA", "FSETP", "FSEL", "FMNMX", "FCHK", "MUFU", "FSET")
        self.operands = [Operand(x, floating) for x in re.split(r",\s*", rest)] if rest else []

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers

    def width(self) -> int:
        """Bytes that a lane moves."""
        return next((WIDTHS[x] for x in self.modifiers if x in WIDTHS), 4)


WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


class Kernel:
    def __init__(self, name: str, generation: int, lines: list[tuple[int, str]]):
        self.name, self.generation, self._lines = name, generation, lines  # generation: 8 for sm_80 to sm_89

    @cached_property
    def code(self) -> list[Instruction]:
        return [Instruction(place, text) for place, text in self._lines]


@cache
def kernels(library: Path, architecture: str) -> dict[str, Kernel]:
    """The kernels in a library, by short name; architecture is as "sm_80"."""
    found: dict[str, list[tuple[int, str]]] = {}
    for line in cuobjdump(library, "-sass", "-arch", architecture).splitlines():
        if start := re.match(r"\s*Function : (.*)$", line):
            lines = found[short(start[1])] = []
        elif instruction := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            lines.append((int(instruction[1], 16), instruction[2]))
    if not found:
        raise SassError(f"{library.name} has no code for {architecture}")
    generation = int(architecture.removeprefix("sm_")) // 10
    return {name: Kernel(name, generation, lines) for name, lines in found.items()}


class Launch(NamedTuple):
    """What a kernel is launched with."""

    blocks: int
    threads: int
    shared_bytes: int
    parameters: bytes  # as they lie in the constant bank


# ---- memory ----


class Memory:
    """Global memory: copies of tensors at their addresses, and zeros everywhere else."""

    CHUNK = 1 << 20

    def __init__(self, tensors: Iterable[Tensor]):
        self.regions: list[tuple[int, np.ndarray]] = []
        for x in tensors:
            storage = x.untyped_storage()
            data = np.frombuffer(bytes(storage), np.uint8).copy()
            self.regions.append((storage.data_ptr(), data))
        self._sort()

    def _sort(self) -> None:
        self.regions.sort(key=lambda region: region[0])
        self.begins = np.array([begin for begin, _ in self.regions], np.uint64)

    def _each(self, address: np.ndarray):
        """(data, index into it, which of the addresses) for each region that holds some of them."""
        rest = np.arange(len(address))
        while len(rest):
            first = int(address[rest[0]])
            number = int(np.searchsorted(self.begins, np.uint64(first), "right")) - 1
            if number < 0 or first >= self.regions[number][0] + len(self.regions[number][1]):
                begin = first // self.CHUNK * self.CHUNK
                end = begin + self.CHUNK
                if number >= 0:
                    begin = max(begin, self.regions[number][0] + len(self.regions[number][1]))
                if number + 1 < len(self.regions):
                    end = min(end, self.regions[number + 1][0])
                self.regions.append((begin, np.zeros(end - begin, np.uint8)))
                self._sort()
                continue
            begin, data = self.regions[number]
            offset = address[rest].astype(np.int64) - begin
            inside = (offset >= 0) & (offset < len(data))
            yield data, offset[inside], rest[inside]
            rest = rest[~inside]

    def load(self, address: np.ndarray, width: int) -> np.ndarray:
        result = np.empty((len(address), width), np.uint8)
        for data, index, which in self._each(address):
            result[which] = data[index[:, None] + np.arange(width)]
        return result

    def store(self, address: np.ndarray, values: np.ndarray) -> None:
        for data, index, which in self._each(address):
            data[index[:, None] + np.arange(values.shape[1])] = values[which]

    def read(self, x: Tensor) -> np.ndarray:
        """The bytes at a tensor's place."""
        return self.load(np.array([x.data_ptr()]), x.numel() * x.element_size())[0]


# ---- execution ----


class Group(NamedTuple):
    """Threads of a block at one instruction."""

    place: int
    threads: np.ndarray  # bool [threads]
    warps: int  # a bit for each warp that has some


class Block:
    """A block that runs. `trace` has (instruction's index, bits of the warps that issue it), in order."""

    def __init__(self, kernel: Kernel, launch: Launch, number: int, memory: Memory):
        threads = launch.threads
        self.kernel, self.memory, self.threads, self.number = kernel, memory, threads, number
        self.registers = {"R": np.zeros((256, threads), np.uint32), "UR": np.zeros((64, threads), np.uint32)}
        self.predicates = {"P": np.zeros((8, threads), bool), "UP": np.zeros((8, threads), bool)}
        for predicates in self.predicates.values():
            predicates[7] = True
        self.shared = np.zeros(RESERVED_SHARED[kernel.generation] + launch.shared_bytes, np.uint8)
        begin = PARAMETERS[kernel.generation]
        self.constants = bytearray(begin + len(launch.parameters) + 8)
        self.constants[0:24] = struct.pack("<6I", threads, 1, 1, launch.blocks, 1, 1)
        self.constants[begin : begin + len(launch.parameters)] = launch.parameters
        self.meeting: dict[int, np.ndarray] = {}  # of BSSY's registers: who waits for whom
        self.trace: list[tuple[int, int]] = []
        self.accesses = {"loads": 0, "stores": 0, "load_addresses": 0, "store_addresses": 0}
        self.groups = [self._group(0, np.ones(threads, bool))]
        self.at_barrier: list[Group] = []
        self.at_meeting: list[tuple[int, Group]] = []
        self.live = np.ones(threads, bool)
        self.mask = self.group = None
        self.index = {instruction.place: i for i, instruction in enumerate(kernel.code)}

    @staticmethod
    def _group(place: int, threads: np.ndarray) -> Group:
        warps = threads.reshape(-1, WARP).any(1)
        return Group(place, threads, int(sum(1 << int(w) for w in np.flatnonzero(warps))))

    def run(self) -> "Block":
        with np.errstate(all="ignore"):
            while self.groups or self.at_barrier or self.at_meeting:
                if not self.groups:
                    raise SassError(f"{self.kernel.name}: the block's threads wait for each other")
                self._run_group()
        return self

    def _run_group(self) -> None:
        """Run the threads that are furthest behind until they branch or wait, or come to where others are."""
        place = min(group.place for group in self.groups)
        threads, warps, rest = np.zeros(self.threads, bool), 0, []
        for group in self.groups:
            if group.place == place and not group.warps & warps:
                threads, warps = threads | group.threads, warps | group.warps
            else:
                rest.append(group)
        self.groups = rest
        limit = min((group.place for group in rest if group.place > place), default=1 << 62)
        self.group = group = Group(place, threads, warps)
        self.everyone = bool(threads.all())
        i = self.index[place]
        code, trace = self.kernel.code, self.trace
        while True:
            if code[i].place >= limit and code[i].place != place:
                self.groups.append(Group(code[i].place, group.threads, group.warps))
                return
            instruction = code[i]
            trace.append((i, warps))
            self.mask = threads if instruction.guard is None else threads & self.predicate(instruction.guard)
            execute = EXECUTE.get(instruction.base)
            if execute is None:
                raise SassError(f"{self.kernel.name}: {instruction.text} is not known here")
            if execute(self, instruction) is LEAVES:
                return
            i += 1

    # -- operands --

    def predicate(self, operand: Operand) -> np.ndarray:
        value = self.predicates[operand.kind][operand.number]
        return ~value if operand.negative else value

    def raw(self, operand: Operand, which: int = 0):
        """Bits of a register, or of the one `which` behind it."""
        if operand.kind in ("R", "UR"):
            zero = 255 if operand.kind == "R" else 63
            return self.registers[operand.kind][operand.number + which if operand.number != zero else zero]
        if operand.kind == "i":
            return operand.bits if which == 0 else np.uint32(0)
        if operand.kind == "c":
            return np.frombuffer(self.constants, np.uint32, 1, operand.offset + 4 * which)[0]
        raise SassError(f"{self.kernel.name}: operand {operand.text}")

    def u32(self, operand: Operand):
        value = self.raw(operand)
        return ~value if operand.inverted else (~value + np.uint32(1)) if operand.negative else value

    def s32(self, operand: Operand):
        return np.asarray(self.u32(operand)).view(np.int32)

    def carrying(self, operand: Operand):
        """In 64 bits, with -x as 2^32 - x: what the addition's carry depends on."""
        value = np.asarray(self.raw(operand)).astype(np.uint64)
        if operand.inverted:
            return np.uint64(0xFFFFFFFF) - value
        return np.uint64(1 << 32) - value if operand.negative else value

    def u64(self, operand: Operand):
        low, high = self.raw(operand), self.raw(operand, 1)
        value = np.asarray(low).astype(np.uint64) | (np.asarray(high).astype(np.uint64) << np.uint64(32))
        return ~value if operand.inverted else (~value + np.uint64(1)) if operand.negative else value

    def f32(self, operand: Operand):
        value = np.asarray(self.raw(operand)).view(np.float32)
        value = np.abs(value) if operand.absolute else value
        return -value if operand.negative else value

    # -- results --

    def _written(self, kind: str) -> np.ndarray:
        """The threads whose registers of that kind are written: of uniform ones a warp has one for all."""
        if kind[0] != "U" or self.everyone:
            return self.mask
        return np.repeat(self.mask.reshape(-1, WARP).any(1), WARP)

    def set(self, operand: Operand, value, which: int = 0) -> None:
        kind = operand.kind
        if operand.number == (255 if kind == "R" else 63):
            return
        value = np.asarray(value)
        if value.dtype.kind == "f":
            value = value.astype(np.float32).view(np.uint32)
        np.copyto(
            self.registers[kind][operand.number + which], value.astype(np.uint32), where=self._written(kind)
        )

    def set64(self, operand: Operand, value) -> None:
        value = np.asarray(value)
        self.set(operand, value & np.uint64(0xFFFFFFFF))
        self.set(operand, value >> np.uint64(32), 1)

    def set_predicate(self, operand: Operand, value) -> None:
        if operand.number != 7:
            np.copyto(self.predicates[operand.kind][operand.number], value, where=self._written(operand.kind))

    def address(self, operand: Operand, in_global: bool = False) -> np.ndarray:
        """Of the threads in the mask."""
        base = self.registers["R"][operand.number][self.mask].astype(np.uint64) * np.uint64(operand.scale)
        wide = operand.wide and operand.number != 255
        if wide:
            base = base | self.registers["R"][operand.number + 1][self.mask].astype(np.uint64) << np.uint64(32)
        if operand.uniform is not None and operand.uniform != 63:
            base = base + self.registers["UR"][operand.uniform][self.mask]
            if in_global:
                base = base + (self.registers["UR"][operand.uniform + 1][self.mask].astype(np.uint64) << np.uint64(32))
        return base + np.uint64(operand.offset & 0xFFFFFFFFFFFFFFFF)

    def load_shared(self, address: np.ndarray, width: int) -> np.ndarray:
        if len(address) and int(address.max()) + width > len(self.shared):
            raise SassError(f"{self.kernel.name}: reads past {len(self.shared)} bytes of shared memory")
        return self.shared[address.astype(np.int64)[:, None] + np.arange(width)]

    def store_shared(self, address: np.ndarray, values: np.ndarray) -> None:
        if len(address) and int(address.max()) + values.shape[1] > len(self.shared):
            raise SassError(f"{self.kernel.name}: writes past {len(self.shared)} bytes of shared memory")
        self.shared[address.astype(np.int64)[:, None] + np.arange(values.shape[1])] = values

    def set_bytes(self, operand: Operand, values: np.ndarray, instruction: Instruction) -> None:
        """What the threads in the mask have loaded, [threads, bytes]."""
        width = values.shape[1]
        if width < 4:
            signed = instruction.has("S8") or instruction.has("S16")
            words = values.view(f"<{'i' if signed else 'u'}{width}").astype(np.int64).astype(np.uint32)
        else:
            words = np.ascontiguousarray(values).view(np.uint32)
        if operand.number != 255:
            for i in range(words.shape[1]):
                self.registers["R"][operand.number + i][self.mask] = words[:, i]

    def get_bytes(self, operand: Operand, width: int) -> np.ndarray:
        words = [np.broadcast_to(self.raw(operand, i), self.threads)[self.mask] for i in range((width + 3) // 4)]
        return np.ascontiguousarray(np.stack(words, 1)).view(np.uint8)[:, :width]

    def count(self, what: str, address: np.ndarray, width: int) -> None:
        """As the emulator does (tests/cuda_emulator/counters.h)."""
        warps = int(self.mask.reshape(-1, WARP).any(1).sum())
        self.accesses[what + "s"] += warps
        total = int(address.sum(dtype=np.uint64)) * width
        self.accesses[what + "_addresses"] = (self.accesses[what + "_addresses"] + total) % (1 << 64)


def run_block(kernel: Kernel, launch: Launch, number: int, memory: Memory) -> Block:
    """Run one block to its end. Raises SassError for what is not known here."""
    return Block(kernel, launch, number, memory).run()


# ---- instructions ----

LEAVES = object()  # the group's threads are elsewhere now
Execute = Callable[[Block, Instruction], object]
EXECUTE: dict[str, Execute] = {}


def executes(*names: str):
    def register(function: Execute) -> Execute:
        EXECUTE.update(dict.fromkeys(names, function))
        return function

    return register


def _split(operands: list[Operand], results: int = 1) -> tuple[list[Operand], list[Operand], list[Operand]]:
    """(predicates behind the results that are results too, inputs, predicates at the end)"""
    inputs = operands[results:]
    first = 0
    while inputs[first].kind in ("P", "UP"):
        first += 1
    last = len(inputs)
    while inputs[last - 1].kind in ("P", "UP"):
        last -= 1
    return inputs[:first], inputs[first:last], inputs[last:]


def _sign_extended(x):
    return np.asarray(x).astype(np.uint32).view(np.int32).astype(np.int64).view(np.uint64)


@executes("MOV", "MOV32I")
def _(b, i):
    b.set(i.operands[0], b.u32(i.operands[1]))


@executes("IADD3", "VIADD", "IADD")
def _(b, i):
    carries_out, inputs, carries_in = _split(i.operands)
    total = b.carrying(inputs[0])
    for x in inputs[1:]:
        total = total + b.carrying(x)
    if i.has("X"):
        for x in carries_in:
            total = total + b.predicate(x)
    b.set(i.operands[0], total & np.uint64(0xFFFFFFFF))
    for n, x in enumerate(carries_out):
        b.set_predicate(x, (total >> np.uint64(32)) > n)


@executes("IMAD")
def _(b, i):
    carries_out, (x, y, z), carries_in = _split(i.operands)
    carry = b.predicate(carries_in[0]).astype(np.uint64) if i.has("X") else np.uint64(0)
    if not i.has("WIDE") and not i.has("HI"):
        product = np.asarray(b.u32(x)).astype(np.uint64) * np.asarray(b.u32(y)).astype(np.uint64)
        total = (product & np.uint64(0xFFFFFFFF)) + b.carrying(z) + carry
        b.set(i.operands[0], total & np.uint64(0xFFFFFFFF))
        for p in carries_out:
            b.set_predicate(p, total >> np.uint64(32) > 0)
        return
    if i.has("U32"):
        product = np.asarray(b.u32(x)).astype(np.uint64) * np.asarray(b.u32(y)).astype(np.uint64)
    else:
        product = _sign_extended(b.u32(x)) * _sign_extended(b.u32(y))
    addend = b.u64(z)
    total = product + addend + carry
    for p in carries_out:
        b.set_predicate(p, (total < product) | (total < addend))
    if i.has("HI"):
        b.set(i.operands[0], total >> np.uint64(32))
    else:
        b.set64(i.operands[0], total)


@executes("LEA")
def _(b, i):
    carries_out, inputs, carries_in = _split(i.operands)
    shift = np.uint64(inputs[-1].number)
    low = np.asarray(b.u32(inputs[0])).astype(np.uint64)
    if i.has("HI"):
        high = b.u32(inputs[2]) if not i.has("SX32") else _sign_extended(b.u32(inputs[0])) >> np.uint64(32)
        shifted = (np.asarray(high).astype(np.uint64) << np.uint64(32) | low) << shift >> np.uint64(32)
    else:
        shifted = low << shift & np.uint64(0xFFFFFFFF)
    total = shifted + b.carrying(inputs[1])
    if i.has("X"):
        total = total + b.predicate(carries_in[0])
    b.set(i.operands[0], total & np.uint64(0xFFFFFFFF))
    for p in carries_out:
        b.set_predicate(p, total >> np.uint64(32) > 0)


@executes("SHF")
def _(b, i):
    result, low, shift, high = i.operands
    value = np.asarray(b.u32(high)).astype(np.uint64) << np.uint64(32) | np.asarray(b.u32(low)).astype(np.uint64)
    by = np.asarray(b.u32(shift)).astype(np.uint64)
    by = by & np.uint64(31) if i.has("W") else np.minimum(by, np.uint64(63 if i.has("U64") or i.has("S64") else 32))
    if i.has("L"):
        value = value << by
    elif i.has("S32") or i.has("S64"):
        value = (value.view(np.int64) >> by.view(np.int64)).view(np.uint64)
    else:
        value = value >> by
    b.set(result, value >> np.uint64(32) if i.has("HI") else value & np.uint64(0xFFFFFFFF))


@executes("LOP3")
def _(b, i):
    to_predicate = i.operands[0].kind in ("P", "UP")
    operands = i.operands[1:] if to_predicate else i.operands
    x, y, z = (np.asarray(b.u32(x)) for x in operands[1:4])
    b.set(operands[0], result := _look_up(operands[4].number, x, y, z))
    if to_predicate:
        b.set_predicate(i.operands[0], (result != 0) | b.predicate(operands[5]))


@executes("PLOP3")
def _(b, i):
    x, y, z = (b.predicate(x) for x in i.operands[2:5])
    for result, table in zip(i.operands[:2], i.operands[5:7], strict=True):
        b.set_predicate(result, _look_up(table.number, x, y, z))


def _look_up(table: int, x, y, z):
    """A bitwise function of three inputs by its truth table."""
    result = x & ~x
    for row in range(8):
        if table >> row & 1:
            result = result | (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
    return result


@executes("SEL", "FSEL")
def _(b, i):
    result, x, y, choice = i.operands
    get = b.f32 if i.base == "FSEL" else b.u32
    b.set(result, np.where(b.predicate(choice), get(x), get(y)))


@executes("IMNMX", "VIMNMX", "VIADDMNMX")
def _(b, i):
    result, *inputs, least = i.operands
    get = b.u32 if i.has("U32") else b.s32
    x = np.asarray(get(inputs[0]) + get(inputs[1])) if i.base == "VIADDMNMX" else get(inputs[0])
    y = get(inputs[-1])
    b.set(result, np.where(b.predicate(least), np.minimum(x, y), np.maximum(x, y)).astype(np.int64))


@executes("IABS")
def _(b, i):
    b.set(i.operands[0], np.abs(b.s32(i.operands[1]).astype(np.int64)))


@executes("PRMT")
def _(b, i):
    result, x, selector, y = i.operands
    both = np.asarray(b.u32(y)).astype(np.uint64) << np.uint64(32) | np.asarray(b.u32(x)).astype(np.uint64)
    select = np.asarray(b.u32(selector)).astype(np.uint64)
    value = np.uint64(0)
    for n in range(4):
        nibble = select >> np.uint64(4 * n) & np.uint64(15)
        byte = both >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7) != 0, np.uint64(255), np.uint64(0))
        value = value | np.where(nibble >> np.uint64(3) != 0, sign, byte) << np.uint64(8 * n)
    b.set(result, value)


@executes("POPC")
def _(b, i):
    b.set(i.operands[0], np.bitwise_count(np.asarray(b.u32(i.operands[1]))))


COMPARE = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}


def _set_predicates(b: Block, i: Instruction, holds, other) -> None:
    other = b.predicate(other)
    for result, value in zip(i.operands[:2], (holds, ~holds), strict=True):
        combined = value & other if i.has("AND") else value | other if i.has("OR") else value ^ other
        b.set_predicate(result, combined)


@executes("ISETP")
def _(b, i):
    _, _, x, y, other, *lower = i.operands
    get = b.u32 if i.has("U32") else b.s32
    x, y = get(x), get(y)
    relation = i.modifiers[0]
    holds = np.broadcast_to(COMPARE[relation](x, y), b.threads)
    if i.has("EX"):  # the higher words of 64 bits, after the lower ones
        strictly = holds if relation == "NE" else COMPARE[relation.replace("E", "T")](x, y) if relation != "EQ" else False
        holds = strictly | (x == y) & b.predicate(lower[0])
    _set_predicates(b, i, holds, other)


@executes("FSETP")
def _(b, i):
    _, _, x, y, other = i.operands
    x, y = b.f32(x), b.f32(y)
    unordered = np.isnan(x) | np.isnan(y)
    relation = i.modifiers[0]
    if relation in ("NAN", "NUM"):
        holds = unordered if relation == "NAN" else ~unordered
    else:
        holds = COMPARE[relation[:2]](x, y) & ~unordered | (unordered if relation[2:] == "U" else False)
    _set_predicates(b, i, np.broadcast_to(holds, b.threads), other)


@executes("FADD")
def _(b, i):
    b.set(i.operands[0], b.f32(i.operands[1]) + b.f32(i.operands[2]))


@executes("FMUL")
def _(b, i):
    b.set(i.operands[0], b.f32(i.operands[1]) * b.f32(i.operands[2]))


@executes("FFMA")
def _(b, i):
    x, y, z = (b.f32(x).astype(np.float64) for x in i.operands[1:4])
    b.set(i.operands[0], x * y + z)


@executes("FMNMX")
def _(b, i):
    result, x, y, least = i.operands
    x, y = b.f32(x), b.f32(y)
    smallest, largest = (np.minimum, np.maximum) if i.has("NAN") else (np.fmin, np.fmax)
    b.set(result, np.where(b.predicate(least), smallest(x, y), largest(x, y)))


@executes("FCHK")
def _(b, i):
    """Whether a division needs more than the usual steps."""
    numerator, denominator = (np.abs(b.f32(x)) for x in i.operands[1:3])
    usual = (denominator > 2.0**-120) & (denominator < 2.0**120) & (numerator < 2.0**120)
    b.set_predicate(i.operands[0], ~(usual & ((numerator > 2.0**-100) | (numerator == 0))))


@executes("MUFU")
def _(b, i):
    x = b.f32(i.operands[1])
    function = {
        "RCP": lambda x: np.float32(1) / x,
        "EX2": np.exp2,
        "LG2": np.log2,
        "RSQ": lambda x: np.float32(1) / np.sqrt(x),
        "SQRT": np.sqrt,
    }
    b.set(i.operands[0], function[i.modifiers[0]](x))


@executes("I2F", "I2FP")
def _(b, i):
    x = i.operands[1]
    exact = b.u64(x) if i.has("U64") else b.u64(x).view(np.int64) if i.has("S64") else None
    if exact is None:
        exact = b.u32(x) if i.has("U32") else b.s32(x)
    exact = np.asarray(exact)
    rounded = exact.astype(np.float32)
    if i.has("RP"):
        below = rounded.astype(np.float64) < exact.astype(np.float64)
        rounded = np.where(below, np.nextafter(rounded, np.float32(np.inf)), rounded)
    b.set(i.operands[0], rounded)


@executes("F2I")
def _(b, i):
    x = np.trunc(b.f32(i.operands[1]).astype(np.float64))
    if not i.has("TRUNC"):
        raise SassError(f"{b.kernel.name}: {i.text} is not known here")
    if i.has("U64"):
        b.set64(i.operands[0], np.clip(np.nan_to_num(x), 0, 2.0**64 - 2048).astype(np.uint64))
    elif i.has("U32"):
        b.set(i.operands[0], np.clip(np.nan_to_num(x), 0, 2.0**32 - 1).astype(np.uint64))
    else:
        b.set(i.operands[0], np.clip(np.nan_to_num(x), -(2.0**31), 2.0**31 - 1).astype(np.int64))


@executes("F2FP")
def _(b, i):
    """Two numbers of 16 bits, the first in the upper half."""
    result, high, low = i.operands
    halves = []
    for x in (high, low):
        x = np.asarray(b.f32(x))
        if i.has("BF16"):
            bits = x.view(np.uint32).astype(np.uint64)
            rounded = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
            halves.append(np.where(np.isnan(x), np.uint64(0x7FFF), rounded & np.uint64(0xFFFF)))
        else:
            halves.append(x.astype(np.float16).view(np.uint16).astype(np.uint64))
    b.set(result, halves[0] << np.uint64(16) | halves[1])


@executes("HFMA2")
def _(b, i):
    """As compilers use it: two constants of 16 bits in one register."""
    result, *inputs, high, low = i.operands
    if any(x.number != 255 for x in inputs):
        raise SassError(f"{b.kernel.name}: {i.text} is not known here")
    high, low = (int(np.float16(float(x.text)).view(np.uint16)) for x in (high, low))
    b.set(result, np.uint32(high << 16 | low))


@executes("HADD2")
def _(b, i):
    """As compilers use it: float32 of one half."""
    result, zero, x = i.operands
    if not i.has("F32") or zero.number != 255:
        raise SassError(f"{b.kernel.name}: {i.text} is not known here")
    half = np.ascontiguousarray(b.raw(x)).view(np.float16).reshape(-1, 2)[:, int("H1" in x.text)].astype(np.float32)
    b.set(result, -half if x.negative else half)


@executes("CS2R")
def _(b, i):
    if i.operands[1].text != "SRZ":
        raise SassError(f"{b.kernel.name}: {i.text} is not known here")
    b.set(i.operands[0], np.uint32(0))
    if not i.has("32"):
        b.set(i.operands[0], np.uint32(0), 1)


@executes("S2R", "S2UR")
def _(b, i):
    thread = np.arange(b.threads, dtype=np.uint32)
    known = {"SR_TID.X": thread, "SR_LANEID": thread % WARP, "SR_CTAID.X": np.uint32(b.number)}
    known |= dict.fromkeys(("SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId"), np.uint32(0))
    if i.operands[1].text not in known:
        raise SassError(f"{b.kernel.name}: {i.text} is not known here")
    b.set(i.operands[0], known[i.operands[1].text])


@executes("R2UR")
def _(b, i):
    lanes = np.broadcast_to(b.raw(i.operands[1]), b.threads).reshape(-1, WARP)
    first = b.mask.reshape(-1, WARP).argmax(1)
    b.set(i.operands[0], np.repeat(lanes[np.arange(len(lanes)), first], WARP))


@executes("P2R")
def _(b, i):
    result, _, x, mask = i.operands
    bits = sum(b.predicates["P"][n].astype(np.uint32) << np.uint32(n) for n in range(7))
    b.set(result, b.u32(x) & np.uint32(~mask.number & 0xFFFFFFFF) | bits & np.uint32(mask.number))


@executes("R2P")
def _(b, i):
    _, x, mask = i.operands
    for n in range(7):
        if mask.number >> n & 1:
            np.copyto(b.predicates["P"][n], (b.u32(x) >> np.uint32(n) & np.uint32(1)) != 0, where=b.mask)


# -- memory --


@executes("LDC")
def _(b, i):
    result, place = i.operands
    offset = np.asarray(b.raw(Operand(f"R{place.number}" if place.number != 255 else "RZ", False)))
    at = (offset.astype(np.int64) + place.offset)[:, None] + np.arange(i.width())
    values = np.frombuffer(b.constants, np.uint8)[at]
    words = values.view(f"<u{min(i.width(), 4)}")
    for n in range(words.shape[1]):
        b.set(result, words[:, n], n)


@executes("LDG")
def _(b, i):
    address = b.address(i.operands[1], True)
    b.count("load", address, i.width())
    b.set_bytes(i.operands[0], b.memory.load(address, i.width()), i)


@executes("STG")
def _(b, i):
    address = b.address(i.operands[0], True)
    b.count("store", address, i.width())
    b.memory.store(address, b.get_bytes(i.operands[1], i.width()))


@executes("LDS")
def _(b, i):
    b.set_bytes(i.operands[0], b.load_shared(b.address(i.operands[1]), i.width()), i)


@executes("STS")
def _(b, i):
    b.store_shared(b.address(i.operands[0]), b.get_bytes(i.operands[1], i.width()))


@executes("LDGSTS")
def _(b, i):
    """An asynchronous copy, done at once; zeros where the last predicate, if there is one, does not hold."""
    to, from_, *valid = i.operands
    everyone = b.mask
    b.store_shared(b.address(to), np.zeros((int(everyone.sum()), i.width()), np.uint8))
    for x in valid:
        b.mask = b.mask & b.predicate(x)
    address = b.address(from_, True)
    b.count("load", address, i.width())
    b.store_shared(b.address(to), b.memory.load(address, i.width()))


@executes("LDSM")
def _(b, i):
    if not b.mask.reshape(-1, WARP).all(1).any() or not (i.has("M88") or i.has("MT88")):
        raise SassError(f"{b.kernel.name}: {i.text} is not known here")
    warps = int(b.mask.sum()) // WARP
    count = next((int(x) for x in i.modifiers if x in ("2", "4")), 1)
    rows = b.load_shared(b.address(i.operands[1]), 16).reshape(warps, 4, 8, 16)  # warp, matrix, row, bytes
    elements = np.ascontiguousarray(rows).view(np.uint16)
    if i.has("MT88"):
        elements = elements.swapaxes(2, 3)
    pairs = np.ascontiguousarray(elements).view(np.uint32).reshape(warps, 4, WARP)
    for matrix in range(count):
        b.registers["R"][i.operands[0].number + matrix][b.mask] = pairs[:, matrix].reshape(-1)


# -- between lanes --


@executes("SHFL")
def _(b, i):
    valid, result, x, lane, _ = i.operands
    lanes = np.arange(b.threads, dtype=np.int64) % WARP
    by = np.asarray(b.u32(lane)).astype(np.int64)
    from_ = {"BFLY": lanes ^ by, "IDX": lanes * 0 + by, "UP": lanes - by, "DOWN": lanes + by}[i.modifiers[0]]
    inside = (from_ >= 0) & (from_ < WARP)
    source = np.arange(b.threads) // WARP * WARP + np.where(inside, from_, lanes)
    b.set(result, np.broadcast_to(b.raw(x), b.threads)[source])
    b.set_predicate(valid, inside)


@executes("HMMA")
def _(b, i):
    if i.modifiers[:2] != ["16816", "F32"]:
        raise SassError(f"{b.kernel.name}: {i.text} is not known here")
    result, x, y, z = i.operands
    warps = b.threads // WARP

    def fragments(operand, count):  # [register, warp, lane / 4, lane % 4, element of a pair]
        bits = np.stack([b.raw(operand, n) for n in range(count)])
        if i.has("BF16"):
            halves = bits.view(np.uint16).reshape(*bits.shape, 2)
            numbers = (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            numbers = bits.view(np.float16).reshape(*bits.shape, 2).astype(np.float32)
        return numbers.reshape(count, warps, 8, 4, 2)

    left = fragments(x, 4).reshape(2, 2, warps, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 16)
    right = fragments(y, 2).transpose(1, 2, 0, 3, 4).reshape(warps, 8, 16)
    product = (left @ right.swapaxes(1, 2)).reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, b.threads)
    for n in range(4):
        b.set(result, np.asarray(b.raw(z, n)).view(np.float32) + product[n], n)


# -- control flow --


def _go(b: Block, place: int, threads: np.ndarray) -> None:
    if threads.any():
        b.groups.append(b._group(place, threads))


def _next(b: Block, i: Instruction) -> int:
    return b.kernel.code[b.index[i.place] + 1].place


@executes("BRA")
def _(b, i):
    taken = b.mask
    for x in i.operands[:-1]:
        if x.kind not in ("P", "UP"):
            raise SassError(f"{b.kernel.name}: {i.text} is not known here")
        taken = taken & b.predicate(x)
    if not taken.any():
        return None
    _go(b, i.operands[-1].number, taken)
    _go(b, _next(b, i), b.group.threads & ~taken)
    return LEAVES


@executes("CALL")
def _(b, i):
    if not i.has("REL"):
        raise SassError(f"{b.kernel.name}: {i.text} is not known here")
    return EXECUTE["BRA"](b, i)


@executes("RET")
def _(b, i):
    target = b.raw(Operand(i.operands[0].text.split()[0], False))
    for place in np.unique(target[b.mask]):
        _go(b, int(place), b.mask & (target == place))
    _go(b, _next(b, i), b.group.threads & ~b.mask)
    return LEAVES


@executes("EXIT")
def _(b, i):
    if not b.mask.any():
        return None
    b.live = b.live & ~b.mask
    _go(b, _next(b, i), b.group.threads & ~b.mask)
    _meet(b)
    _pass_barrier(b)
    return LEAVES


@executes("BSSY")
def _(b, i):
    register, _ = i.operands
    waits = b.meeting.setdefault(register.text, np.zeros(b.threads, bool))
    warps = np.repeat(b.group.threads.reshape(-1, WARP).any(1), WARP)
    np.copyto(waits, b.group.threads, where=warps)


@executes("BREAK")
def _(b, i):
    b.meeting[i.operands[-1].text] &= ~b.mask
    _meet(b)


@executes("BSYNC")
def _(b, i):
    if not b.mask.any():
        return None
    b.at_meeting.append((i.operands[0].text, Group(_next(b, i), b.mask, b._group(0, b.mask).warps)))
    _go(b, _next(b, i), b.group.threads & ~b.mask)
    _meet(b)
    return LEAVES


def _meet(b: Block) -> None:
    """Let the warps go on of which all threads that BSSY named, and that live, are at BSYNC."""
    for name in {name for name, _ in b.at_meeting}:
        groups = [group for other, group in b.at_meeting if other == name]
        here = np.logical_or.reduce([group.threads for group in groups])
        missing = (b.meeting[name] & b.live & ~here).reshape(-1, WARP).any(1)
        goes = here & ~np.repeat(missing, WARP)
        if goes.any():
            b.at_meeting = [x for x in b.at_meeting if x[0] != name]
            for place in {group.place for group in groups}:
                threads = np.logical_or.reduce([group.threads for group in groups if group.place == place])
                _go(b, place, threads & goes)
                if (stays := threads & ~goes).any():
                    b.at_meeting.append((name, b._group(place, stays)))


@executes("BAR")
def _(b, i):
    if not i.has("SYNC") or i.operands[0].number != 0 or b.mask is not b.group.threads:
        raise SassError(f"{b.kernel.name}: {i.text} is not known here")
    b.at_barrier.append(Group(_next(b, i), b.group.threads, b.group.warps))
    _pass_barrier(b)
    return LEAVES


def _pass_barrier(b: Block) -> None:
    if b.at_barrier and sum(int(group.threads.sum()) for group in b.at_barrier) == int(b.live.sum()):
        b.groups += b.at_barrier
        b.at_barrier = []


@executes("NOP", "LDGDEPBAR", "DEPBAR", "WARPSYNC", "YIELD", "ERRBAR", "CCTL", "MEMBAR", "ULDC_", "ENDCOLLECTIVE")
def _(b, i):
    pass


EXECUTE["LDCU"] = EXECUTE["LDC"]
