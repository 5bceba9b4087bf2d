"""Reading machine code: kernels, instructions and operands from what cuobjdump prints."""

import importlib.util
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path


class SassError(Exception):
    """The code has something that is not known here, or does not fit what was counted."""


@cache
def disassembler() -> str | None:
    """CUDA's cuobjdump: a toolkit's, or the one that comes with triton."""
    package = importlib.util.find_spec("triton")
    found = shutil.which("cuobjdump")
    if found is None and package is not None and package.origin is not None:
        found = shutil.which("cuobjdump", path=Path(package.origin).parent / "backends" / "nvidia" / "bin")
    return found


def cuobjdump(library: Path, *arguments: str) -> str:
    """What CUDA's disassembler prints about a library or cubin."""
    program = disassembler()
    if program is None:
        raise SassError("needs cuobjdump: CUDA's, or the one that comes with triton")
    # It warns of every part of the library that does not have the function that was asked for.
    return subprocess.run([program, *arguments, str(library)], check=True, text=True, capture_output=True).stdout


def short(name: str) -> str:
    """attention_kernel<TensorCores, half, 128> for what compilers call it."""
    name = name.split("(")[0].removeprefix("void ").replace("ccnet::", "").replace("__nv_", "").replace("__", "")
    return re.sub(r"<\w+<(.*?)> ?>", r"<\1>", name).strip()


class Operand:
    """A register, predicate, constant, immediate or address. R and UR by number, with RZ 255 and URZ 63."""

    def __init__(self, text: str, floating: str = ""):
        self.text = text = text.replace(".reuse", "").strip()
        self.negative, self.inverted, self.absolute = text[:1] in "-!" and text != "-", text[:1] == "~", "|" in text
        body = text.lstrip("-!~").strip("|")
        self.kind, self.number, self.offset, self.scale, self.wide = "", 0, 0, 1, False
        self.uniform: int | None = None
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
            self.kind, self.number = "i", int.from_bytes(struct.pack(floating, value), "little")
            self.negative = False
        elif re.fullmatch(r"0x[0-9a-f]+|\d+", body):
            self.kind, self.number = "i", int(body, 0)

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
        parts = re.fullmatch(r"(?:@(!?U?P\w+) )?(\S+)\s*(.*?)\s*", text)
        if parts is None:
            raise SassError(f"{text}: not as instructions are")
        guard, full_name, rest = parts.groups()
        self.guard = Operand(guard) if guard else None
        self.name: str
        self.modifiers: list[str]
        self.name, *self.modifiers = full_name.split(".")
        # The uniform datapath's instructions are the others', with registers that a warp's threads share.
        self.base = self.name.removeprefix("U")
        floats = ("FADD", "FMUL", "FFMA", "FSETP", "FSEL", "FMNMX", "FCHK", "MUFU", "FRND")
        floating = "<f" if self.base in floats else "<d" if self.base in ("DADD", "DMUL", "DFMA", "DSETP") else ""
        self.operands = [Operand(x, floating) for x in re.split(r",\s*", rest)] if rest else []

    @property
    def next(self) -> int:
        """The place behind it; an instruction has 16 bytes."""
        return self.place + 16

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers

    def width(self) -> int:
        """Bytes that a lane moves."""
        return next((WIDTHS[x] for x in self.modifiers if x in WIDTHS), 4)


WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


class Kernel:
    """Its machine code; lines are as cuobjdump -sass prints them."""

    def __init__(self, name: str, architecture: str, registers: int, read: Callable[[], str]):
        self.name, self.architecture, self.registers, self._read = name, architecture, registers, read
        self.generation = int(architecture.removeprefix("sm_")) // 10  # 8 for sm_80 to sm_89

    @cached_property
    def code(self) -> list[Instruction]:
        lines = (re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line) for line in self._read().splitlines())
        return [Instruction(int(line[1], 16), line[2]) for line in lines if line]


@cache
def kernels(library: Path, architecture: str) -> dict[str, Kernel]:
    """The kernels in a library or cubin, by short name; architecture is as "sm_80"."""
    mangled = re.findall(
        r"^\s*Function (\S+):\s*REG:(\d+)", cuobjdump(library, "-res-usage", "-arch", architecture), re.MULTILINE
    )
    if not mangled:
        raise SassError(f"{library.name} has no code for {architecture}")
    text = "\n".join(name for name, _ in mangled)
    names = subprocess.run(["c++filt"], input=text, check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()
    return {
        short(name): Kernel(
            short(name),
            architecture,
            int(registers),
            partial(cuobjdump, library, "-sass", "-arch", architecture, "-fun", m),
        )
        for name, (m, registers) in zip(names, mangled, strict=True)
    }
