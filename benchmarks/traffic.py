"""What criss-cross attention moves and multiplies, counted without a GPU: by the CUDA kernels, and in plain PyTorch."""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.criss_cross import CHANNELS

# The emulator belongs to the tests. It may register operators only once in a process, so the module must have the name
# that the tests import it by.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
emulation = importlib.import_module("emulation")

MMA_FLOPS = 2 * 16 * 8 * 16  # multiplications and additions of mma.m16n8k16
SECTOR = 32  # bytes


class Case(NamedTuple):
    images: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.images}x{CHANNELS[1]}x{self.height}x{self.width}"

    @property
    def lines(self) -> int:
        return self.images * (self.height + self.width)

    def tensors(self, dtype: torch.dtype, layout: torch.memory_format, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value; zeros, since counts do not depend on the numbers."""
        c, cv = CHANNELS
        query, key, value = (
            torch.zeros(self.images, channels, self.height, self.width, dtype=dtype, device=device)
            for channels in (c, c, cv)
        )
        return query.to(memory_format=layout), key.to(memory_format=layout), value.to(memory_format=layout)


@dataclass(frozen=True)
class Counts:
    """Counts of one pass; None if not counted, or not applicable."""

    bytes: float  # that warps ask for, or that tensors have
    flops: float  # multiplications and additions
    on_tensor_cores: bool = True
    launches: int | None = None  # of kernels; of plain PyTorch, operators
    memory: tuple[float, ...] = ()  # bytes that pass L2 caches of some sizes
    sectors: float | None = None
    bank_conflicts: int | None = None
    ldmatrix_conflicts: int | None = None
    mma: int | None = None
    counted: list = field(default_factory=list)  # emulation.CountedLaunch

    @property
    def sector_efficiency(self) -> float | None:
        return self.sectors and self.bytes / (SECTOR * self.sectors)


Passes = dict[str, Counts]  # "forward" and "backward"

# ---- ours, and the fewest ----


def _of_launches(launches: list) -> Counts:
    counters = sum((launch.counters for launch in launches), emulation.Counters())
    return Counts(
        bytes=counters.load_bytes + counters.store_bytes,
        flops=MMA_FLOPS * counters.mma,
        launches=counters.launches,
        memory=(SECTOR * (counters.memory_loads + counters.memory_stores),),
        sectors=counters.load_sectors + counters.store_sectors,
        bank_conflicts=counters.shared_conflicts,
        ldmatrix_conflicts=counters.ldmatrix_conflicts,
        mma=counters.mma,
        counted=launches,
    )


def count_ours(case: Case, **properties: int) -> tuple[Passes, list[Tensor]]:
    """Counts by pass, and the tensors that the kernels' machine code needs to run again: all others are zeros.

    The properties of the GPU are those of emulation.emulated_gpu.
    """
    query, key, value = case.tensors(torch.bfloat16, torch.channels_last, "cpu")
    with emulation.emulated_gpu(counting=True, **properties) as take_launches:
        operators = torch.ops.ccnet_emulated
        out, largest, total = operators.criss_cross_attention(query, key, value)
        forward = _of_launches(take_launches())
        upstream = torch.zeros_like(out)  # not out itself, which caches would have
        operators.criss_cross_attention_backward(upstream, query, key, value, largest, total)
        return {"forward": forward, "backward": _of_launches(take_launches())}, [largest, total]


def fewest(case: Case) -> Passes:
    """The least that any implementation moves, and the multiplications of the definition.

    The backward pass is given neither the weights nor the result, and computes the energies again.
    """
    c, cv = CHANNELS
    pixels, path = case.images * case.height * case.width, case.height + case.width - 1
    softmax = 2 * 4  # bytes of the largest energy and the sum
    return {
        "forward": Counts(pixels * (2 * (2 * c + 2 * cv) + softmax), 2 * pixels * path * (c + cv)),
        "backward": Counts(pixels * (2 * (4 * c + 3 * cv) + softmax), 2 * pixels * path * (3 * c + 2 * cv)),
    }


# ---- plain PyTorch, tensor by tensor ----


def tensor_bytes(x: Tensor) -> int:
    """Bytes of x in memory, where an expanded dimension counts once."""
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


class TensorTraffic(TorchDispatchMode):
    """Bytes that ATen's operators move: each reads its inputs once and writes its outputs once; views move nothing.

    `memory` are those that pass L2 caches of some sizes. An input is in the cache if it and all that was used since its
    last use are no larger than that; what is written leaves the cache in the end.
    """

    def __init__(self, l2_bytes: Sequence[int] = ()) -> None:
        super().__init__()
        self.bytes = self.operators = 0
        self.l2_bytes, self.memory = l2_bytes, [0.0] * len(l2_bytes)
        self.used: dict[int, int] = {}  # bytes of storages, the one used last at the end
        self.alive: list = []  # so that no two storages have the same number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        storages = {x.untyped_storage()._cdata for x in inputs}
        is_view = not func._schema.is_mutable and all(x.untyped_storage()._cdata in storages for x in outputs)
        if not is_view and "empty" not in func.name():
            self.add(inputs, outputs)
        return result

    def add(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.bytes += sum(map(tensor_bytes, (*inputs, *outputs)))
        self.operators += 1
        for x in (*inputs, *outputs):
            is_read, size, storage = any(x is y for y in inputs), tensor_bytes(x), x.untyped_storage()
            since = self._used_since(storage._cdata) + size
            for n, capacity in enumerate(self.l2_bytes):
                self.memory[n] += size if not is_read or since > capacity else 0
            self.used.pop(storage._cdata, None)
            self.used[storage._cdata] = size
            self.alive.append(storage)

    def _used_since(self, storage: int) -> float:
        total = 0
        for other, size in reversed(self.used.items()):
            if other == storage:
                return total
            total += size
        return math.inf


def _sdpa_backward_flops(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def _sdpa_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


FLOPS = {  # that PyTorch's counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flops,
}


def count_plain(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case, l2_bytes: Sequence[int] = ()
) -> Passes:
    inputs = [x.requires_grad_() for x in case.tensors(torch.bfloat16, torch.channels_last, "meta")]
    upstream = torch.empty_like(inputs[-1])
    passes = {}
    out = upstream
    for name in ("forward", "backward"):
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as products, TensorTraffic(l2_bytes) as traffic:
            if name == "forward":
                out = attention(*inputs)
            else:
                torch.autograd.grad(out, inputs, upstream)
        passes[name] = Counts(
            traffic.bytes, products.get_total_flops(), launches=traffic.operators, memory=tuple(traffic.memory)
        )
    return passes
