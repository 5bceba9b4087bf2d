"""A block that runs: its registers, memory, and which of its threads are where."""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.sass.code import Instruction, Kernel, Operand, SassError
from benchmarks.sass.instructions import EXECUTE, LEAVES, WARP, per_warp

PARAMETERS = {8: 0x160, 9: 0x210}  # where they begin in constant bank 0, by the architecture's generation
LOCAL = 1 << 12  # bytes of local memory that a thread can have
RESERVED_SHARED = {8: 0, 9: 1024}  # bytes of shared memory before the kernel's own


class Launch(NamedTuple):
    """What a kernel is launched with."""

    blocks: int
    threads: int
    shared_bytes: int
    parameters: bytes  # as they lie in the constant bank


class Memory:
    """Global memory: copies of tensors at their addresses, and zeros everywhere else."""

    CHUNK = 1 << 20

    def __init__(self, tensors: Iterable[Tensor]):
        self.regions: list[tuple[int, np.ndarray]] = []
        for x in tensors:
            data = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
            self.regions.append((data.data_ptr(), data.numpy().copy()))
        self._sort()

    def _sort(self) -> None:
        self.regions.sort(key=lambda region: region[0])
        self.begins = np.array([begin for begin, _ in self.regions], np.uint64)

    def _each(self, address: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
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

    def fill(self, x: Tensor, byte: int) -> None:
        self.store(np.array([x.data_ptr()]), np.full((1, x.numel() * x.element_size()), byte, np.uint8))

    def read(self, x: Tensor) -> np.ndarray:
        """The bytes at a tensor's place."""
        return self.load(np.array([x.data_ptr()]), x.numel() * x.element_size())[0]


def warps_of(threads: np.ndarray) -> int:
    """A bit for each warp that has some of the threads"""
    return int.from_bytes(np.packbits(threads.reshape(-1, WARP).any(1), bitorder="little").tobytes(), "little")


class Group(NamedTuple):
    """Threads of a block at one instruction, at most one such group of a warp's."""

    place: int
    threads: np.ndarray  # bool [threads]
    warps: int  # a bit for each that has some


class Issue(NamedTuple):
    """Warps, a bit for each, that issue an instruction; and those of them in which it is not predicated off."""

    number: int  # of the instruction
    warps: int
    acting: int


class Block:
    """Its state, and what it did: `trace`, and `accesses` of global memory, counted as the emulator does."""

    def __init__(self, kernel: Kernel, launch: Launch, number: int, memory: Memory):
        threads = launch.threads
        if kernel.generation not in PARAMETERS:
            raise SassError(f"{kernel.name}: {kernel.architecture} is not known here")
        self.kernel, self.memory, self.threads, self.number = kernel, memory, threads, number
        self.registers = {"R": np.zeros((256, threads), np.uint32), "UR": np.zeros((64, threads), np.uint32)}
        self.predicates = {"P": np.zeros((8, threads), bool), "UP": np.zeros((8, threads), bool)}
        for predicates in self.predicates.values():
            predicates[7] = True
        self.local = np.zeros((threads, LOCAL), np.uint8)
        self.shared = np.zeros(RESERVED_SHARED[kernel.generation] + launch.shared_bytes, np.uint8)
        begin = PARAMETERS[kernel.generation]
        self.constants = bytearray(begin + len(launch.parameters) + 8)
        self.constants[0:24] = struct.pack("<6I", threads, 1, 1, launch.blocks, 1, 1)
        self.constants[begin : begin + len(launch.parameters)] = launch.parameters
        self.trace: list[Issue] = []
        self.accesses = {"loads": 0, "stores": 0, "load_addresses": 0, "store_addresses": 0}
        self.live = np.ones(threads, bool)
        self.groups = [self.group_of(0, self.live)]  # that can go on
        self.at_barrier: list[Group] = []
        self.meets: dict[str, np.ndarray] = {}  # by BSSY's register: the threads that are to meet
        self.at_meeting: dict[str, list[Group]] = {}  # those that are there already
        self.index = {instruction.place: i for i, instruction in enumerate(kernel.code)}
        self.group = self.groups[0]  # that runs now,
        self.mask = self.live  # and its threads in which the instruction is not predicated off

    def run(self) -> "Block":
        with np.errstate(all="ignore"):
            while self.live.any():
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
        self.groups, self.group = rest, Group(place, threads, warps)
        limit = min((group.place for group in rest if group.place > place), default=None)
        i = self.index[place]
        while self.kernel.code[i].place != limit:
            instruction = self.kernel.code[i]
            if instruction.guard is None:
                self.mask, acting = threads, warps
            else:
                self.mask = threads & self.predicate(instruction.guard)
                acting = warps_of(self.mask)
            self.trace.append(Issue(i, warps, acting))
            execute = EXECUTE.get(instruction.base)
            if execute is None:
                raise self.unknown(instruction)
            if execute(self, instruction) is LEAVES:
                return
            i += 1
        self.groups.append(Group(limit, threads, warps))

    def unknown(self, instruction: Instruction) -> SassError:
        return SassError(f"{self.kernel.name} on {self.kernel.architecture}: {instruction.text} is not known here")

    # -- who is where --

    def group_of(self, place: int, threads: np.ndarray) -> Group:
        return Group(place, threads, warps_of(threads))

    def go(self, place: int, threads: np.ndarray) -> None:
        if threads.any():
            self.groups.append(self.group_of(place, threads))

    def meet(self) -> None:
        """Let those warps go on from BSYNC of which all threads that are to meet, and live, are there."""
        for register, groups in self.at_meeting.items():
            here = np.logical_or.reduce([group.threads for group in groups])
            complete = ~per_warp(np.any, self.meets[register] & self.live & ~here)
            for place in {group.place for group in groups}:
                threads = np.logical_or.reduce([group.threads for group in groups if group.place == place])
                self.go(place, threads & complete)
            stay = [self.group_of(group.place, group.threads & ~complete) for group in groups]
            self.at_meeting[register] = [group for group in stay if group.warps]
        self.at_meeting = {register: groups for register, groups in self.at_meeting.items() if groups}

    def pass_barrier(self) -> None:
        """Let all go on if every living thread is at the block's barrier."""
        if self.at_barrier and sum(int(group.threads.sum()) for group in self.at_barrier) == int(self.live.sum()):
            self.groups += self.at_barrier
            self.at_barrier = []

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
            return np.uint32(operand.number >> 32 * which & 0xFFFFFFFF)
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

    def _pair(self, operand: Operand) -> np.ndarray:
        low, high = (np.asarray(self.raw(operand, which)).astype(np.uint64) for which in range(2))
        return np.asarray(low | high << np.uint64(32))

    def u64(self, operand: Operand):
        value = self._pair(operand)
        return ~value if operand.inverted else (~value + np.uint64(1)) if operand.negative else value

    def f32(self, operand: Operand):
        value = np.asarray(self.raw(operand)).view(np.float32)
        value = np.abs(value) if operand.absolute else value
        return -value if operand.negative else value

    def f64(self, operand: Operand):
        value = self._pair(operand).view(np.float64)
        value = np.abs(value) if operand.absolute else value
        return -value if operand.negative else value

    # -- results --

    def _written(self, kind: str) -> np.ndarray:
        """The threads whose registers of that kind are written: of uniform ones a warp has one for all."""
        return per_warp(np.any, self.mask) if kind[0] == "U" else self.mask

    def set(self, operand: Operand, value, which: int = 0) -> None:
        kind = operand.kind
        if operand.number == (255 if kind == "R" else 63):
            return
        value = np.asarray(value)
        if value.dtype.kind == "f":
            value = value.astype(np.float32).view(np.uint32)
        np.copyto(self.registers[kind][operand.number + which], value.astype(np.uint32), where=self._written(kind))

    def set64(self, operand: Operand, value) -> None:
        value = np.asarray(value).view(np.uint64)
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
        self.accesses[what + "s"] += warps_of(self.mask).bit_count()
        total = int(address.sum(dtype=np.uint64)) * width
        self.accesses[what + "_addresses"] = (self.accesses[what + "_addresses"] + total) % (1 << 64)


def run_block(kernel: Kernel, launch: Launch, number: int, memory: Memory) -> Block:
    """Run one block to its end. Raises SassError for what is not known here."""
    return Block(kernel, launch, number, memory).run()
