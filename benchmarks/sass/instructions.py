"""What the instructions do. Those that no kernel here has are missing, and an error where they would be needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.sass.code import Instruction, Operand

if TYPE_CHECKING:
    from benchmarks.sass.block import Block

WARP = 32
LEAVES = object()  # the group's threads are elsewhere now
Execute = Callable[["Block", Instruction], object]
EXECUTE: dict[str, Execute] = {}


def executes(*names: str):
    def register(function: Execute) -> Execute:
        EXECUTE.update(dict.fromkeys(names, function))
        return function

    return register


def per_warp(function: Callable, threads: np.ndarray) -> np.ndarray:
    """np.any or np.all of a warp's threads, for each of them."""
    return np.repeat(function(threads.reshape(-1, WARP), 1), WARP)


def _split(operands: list[Operand]) -> tuple[list[Operand], list[Operand], list[Operand]]:
    """Behind the result: (predicates that are results too, inputs, predicates at the end)"""
    inputs = operands[1:]
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
    value: np.ndarray | np.uint64 = np.uint64(0)
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
        strictly = (
            holds if relation == "NE" else COMPARE[relation.replace("E", "T")](x, y) if relation != "EQ" else False
        )
        holds = strictly | (x == y) & b.predicate(lower[0])
    _set_predicates(b, i, holds, other)


@executes("FSETP", "DSETP")
def _(b, i):
    _, _, x, y, other = i.operands
    get = b.f32 if i.base == "FSETP" else b.f64
    x, y = get(x), get(y)
    unordered = np.isnan(x) | np.isnan(y)
    relation = i.modifiers[0]
    if relation in ("NAN", "NUM"):
        holds = unordered if relation == "NAN" else ~unordered
    elif relation[:2] in COMPARE:
        holds = COMPARE[relation[:2]](x, y) & ~unordered | (unordered if relation[2:] == "U" else False)
    else:
        raise b.unknown(i)
    _set_predicates(b, i, np.broadcast_to(holds, b.threads), other)


@executes("FADD", "FMUL", "FFMA")
def _(b, i):
    x, y, *z = (b.f32(x).astype(np.float64) for x in i.operands[1:])
    exact = x + y if i.base == "FADD" else x * y + (z[0] if z else 0)
    rounded = exact.astype(np.float32)
    if i.has("RM") or i.has("RZ") or i.has("RP"):
        down = i.has("RM") | (i.has("RZ") & (exact > 0))
        wrong = rounded > exact if i.has("RM") else rounded < exact if i.has("RP") else np.abs(rounded) > np.abs(exact)
        rounded = np.where(wrong, np.nextafter(rounded, np.where(down, -np.inf, np.inf).astype(np.float32)), rounded)
    b.set(i.operands[0], np.fmax(0, np.fmin(1, rounded)) if i.has("SAT") else rounded)


@executes("DADD", "DMUL")
def _(b, i):
    b.set64(i.operands[0], (np.add if i.base == "DADD" else np.multiply)(b.f64(i.operands[1]), b.f64(i.operands[2])))


@executes("DFMA")
def _(b, i):
    x, y, z = (b.f64(x).astype(np.longdouble) for x in i.operands[1:4])
    b.set64(i.operands[0], (x * y + z).astype(np.float64))


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
    if i.has("RCP64H") or i.has("RSQ64H"):  # from and to the upper half of a float64
        x = (np.asarray(b.raw(i.operands[1])).astype(np.uint64) << np.uint64(32)).view(np.float64)
        result = 1 / x if i.has("RCP64H") else 1 / np.sqrt(x)
        b.set(i.operands[0], result.view(np.uint64) >> np.uint64(32))
        return
    x = b.f32(i.operands[1])
    function: dict[str, Callable] = {
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
    if i.has("F64"):
        b.set64(i.operands[0], exact.astype(np.float64))
        return
    rounded = exact.astype(np.float32)
    if i.has("RP"):
        below = rounded.astype(np.float64) < exact.astype(np.float64)
        rounded = np.where(below, np.nextafter(rounded, np.float32(np.inf)), rounded)
    b.set(i.operands[0], rounded)


@executes("F2F")
def _(b, i):
    if i.modifiers[:2] == ["F64", "F32"]:
        b.set64(i.operands[0], b.f32(i.operands[1]).astype(np.float64))
    elif i.modifiers[:2] == ["F32", "F64"]:
        b.set(i.operands[0], b.f64(i.operands[1]).astype(np.float32))
    else:
        raise b.unknown(i)


@executes("FRND")
def _(b, i):
    function = {"FLOOR": np.floor, "CEIL": np.ceil, "TRUNC": np.trunc}
    b.set(i.operands[0], function.get((i.modifiers or [""])[0], np.rint)(b.f32(i.operands[1])))


@executes("F2I")
def _(b, i):
    x = np.trunc(b.f32(i.operands[1]).astype(np.float64))
    if not i.has("TRUNC"):
        raise b.unknown(i)
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
        raise b.unknown(i)
    high, low = (int(np.float16(float(x.text)).view(np.uint16)) for x in (high, low))
    b.set(result, np.uint32(high << 16 | low))


@executes("HADD2")
def _(b, i):
    """As compilers use it: float32 of one half."""
    result, zero, x = i.operands
    if not i.has("F32") or zero.number != 255:
        raise b.unknown(i)
    half = np.ascontiguousarray(b.raw(x)).view(np.float16).reshape(-1, 2)[:, int("H1" in x.text)].astype(np.float32)
    b.set(result, -half if x.negative else half)


@executes("CS2R")
def _(b, i):
    if i.operands[1].text != "SRZ":
        raise b.unknown(i)
    b.set(i.operands[0], np.uint32(0))
    if not i.has("32"):
        b.set(i.operands[0], np.uint32(0), 1)


@executes("S2R", "S2UR")
def _(b, i):
    thread = np.arange(b.threads, dtype=np.uint32)
    known = {"SR_TID.X": thread, "SR_LANEID": thread % WARP, "SR_CTAID.X": np.uint32(b.number)}
    nought = (
        "SR_TID.Y",
        "SR_TID.Z",
        "SR_CTAID.Y",
        "SR_CTAID.Z",
        "SR_CgaCtaId",
        "SR_SWINHI",
    )  # that: shared memory at 0
    known |= dict.fromkeys(nought, np.uint32(0))
    if i.operands[1].text not in known:
        raise b.unknown(i)
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


# ---- memory ----


@executes("LDC")
def _(b, i):
    result, place = i.operands
    offset = np.asarray(b.raw(Operand(f"R{place.number}" if place.number != 255 else "RZ")))
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


@executes("LDL", "STL")
def _(b, i):
    loads = i.base == "LDL"
    address = b.address(i.operands[loads]).astype(np.int64)
    place = (address[:, None] + np.arange(i.width())) % b.local.shape[1]
    thread = np.flatnonzero(b.mask)[:, None]
    if loads:
        b.set_bytes(i.operands[0], b.local[thread, place], i)
    else:
        b.local[thread, place] = b.get_bytes(i.operands[1], i.width())


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
        raise b.unknown(i)
    warps = int(b.mask.sum()) // WARP
    count = next((int(x) for x in i.modifiers if x in ("2", "4")), 1)
    rows = b.load_shared(b.address(i.operands[1]), 16).reshape(warps, 4, 8, 16)  # warp, matrix, row, bytes
    elements = np.ascontiguousarray(rows).view(np.uint16)
    if i.has("MT88"):
        elements = elements.swapaxes(2, 3)
    pairs = np.ascontiguousarray(elements).view(np.uint32).reshape(warps, 4, WARP)
    for matrix in range(count):
        b.registers["R"][i.operands[0].number + matrix][b.mask] = pairs[:, matrix].reshape(-1)


# ---- between lanes ----


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
        raise b.unknown(i)
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


# ---- control flow ----


@executes("BRA", "CALL")
def _(b, i):
    taken, conditions = b.mask, i.operands[:-1]
    if i.has("CONV") or i.has("DIV"):  # if all of a warp's threads are here, or if not
        if np.any(np.broadcast_to(b.u32(conditions[0]), b.threads)[b.mask] != 0xFFFFFFFF):
            raise b.unknown(i)
        whole = per_warp(np.all, taken)
        taken, conditions = whole if i.has("CONV") else taken & ~whole, []
    for x in conditions:
        if x.kind not in ("P", "UP"):
            raise b.unknown(i)
        taken = taken & b.predicate(x)
    if (i.base == "CALL" and not i.has("REL")) or i.operands[-1].kind != "i":
        raise b.unknown(i)
    if taken.any():
        b.go(i.operands[-1].number, taken)
        b.go(i.next, b.group.threads & ~taken)
        return LEAVES


@executes("RET")
def _(b, i):
    target = b.raw(Operand(i.operands[0].text.split()[0]))
    for place in np.unique(target[b.mask]):
        b.go(int(place), b.mask & (target == place))
    b.go(i.next, b.group.threads & ~b.mask)
    return LEAVES


@executes("EXIT")
def _(b, i):
    if b.mask.any():
        b.live = b.live & ~b.mask
        b.go(i.next, b.group.threads & ~b.mask)
        b.meet()
        b.pass_barrier()
        return LEAVES


@executes("BSSY")
def _(b, i):
    """The warps' threads that are here will meet at the BSYNC of this register."""
    meets = b.meets.setdefault(i.operands[0].text, np.zeros(b.threads, bool))
    np.copyto(meets, b.group.threads, where=per_warp(np.any, b.group.threads))


@executes("VOTEU")
def _(b, i):
    if len(i.operands) != 2 or not (i.has("ALL") or i.has("ANY")):
        raise b.unknown(i)
    holds = b.predicate(i.operands[1])
    vote = ~per_warp(np.any, b.mask & ~holds) if i.has("ALL") else per_warp(np.any, b.mask & holds)
    b.set_predicate(i.operands[0], vote)


@executes("BREAK")
def _(b, i):
    b.meets[i.operands[-1].text] &= ~b.mask
    b.meet()


@executes("BSYNC", "WARPSYNC")
def _(b, i):
    if b.mask.any():
        if i.base == "BSYNC":
            where = i.operands[0].text
        else:  # of all that live
            if i.operands and np.any(b.u32(i.operands[0]) != 0xFFFFFFFF):
                raise b.unknown(i)
            where = f"WARPSYNC {i.place}"
            b.meets[where] = np.ones(b.threads, bool)
        b.at_meeting.setdefault(where, []).append(b.group_of(i.next, b.mask))
        b.go(i.next, b.group.threads & ~b.mask)
        b.meet()
        return LEAVES


@executes("BAR")
def _(b, i):
    if not i.has("SYNC") or i.operands[0].number != 0 or len(i.operands) > 1 or b.mask is not b.group.threads:
        raise b.unknown(i)
    b.at_barrier.append(b.group_of(i.next, b.mask))
    b.pass_barrier()
    return LEAVES


@executes("NOP", "LDGDEPBAR", "DEPBAR")
def _(b, i):
    pass
