"""Memory traffic and tensor-core work of criss-cross attention on a GPU, counted without a GPU, beside other forms.

    python -m benchmarks.cuda_roofline [--cases 2x97x97 8x97x97 1x128x256]

These are counts, not times. No GPU is needed, but the packages of tests/requirements.txt and CUDA's headers are.
Counted for the network's channels (query and key 64, value 512), bfloat16, channels_last, forward and backward each:

- ours: the source of the CUDA kernels runs in the emulator (tests/cuda_emulator), on all images at full size. It counts
  the bytes that warps access in global memory (what several lanes of a warp access counts once), the 32-byte sectors
  that hold them, bank conflicts of shared memory, and mma.m16n8k16 instructions.
- fewest: every input read once and every output written once. Forward: query, key, value; out, and for each pixel the
  largest energy and the sum of the softmax (float32). Backward: these six and the gradient of out; three gradients.
- bmm: the usual form in plain PyTorch (benchmarks/criss_cross.py), run on tensors without data. Every ATen operator but
  views reads its inputs once and writes its outputs once, the least that this form can move. Copies inside an operator
  (bmm makes them of operands in which neither matrix dimension is dense) are not counted.
- fused axes: PyTorch's fused attention along rows and columns (benchmarks/fused_axes.py), counted in the same way.
- original: the scheme of CCNet's CUDA operators of 2018, float32 and NCHW (original_scheme.cu), with PyTorch's softmax
  and zeros. A few channels of one image are emulated. Bytes are proportional to channels and images, and sectors nearly
  so (images begin at different places of a sector). "As written": a thread reads and writes its element of the result
  in every step of its loop. nvcc 13 compiles some loops like that, and in others keeps the sum in a register and only
  writes; "sums in registers": all loops do so. Caches serve most of these accesses, so the counts say nothing about
  time; "every tensor once" is what the scheme moves with perfect caches.

The last table compares ours with the targets of this project.
"""

import ctypes
import importlib
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.criss_cross import CHANNELS, bmm_attention, print_table
from benchmarks.fused_axes import fused_axes_attention
from cc_attention import native
from utils.arguments import ArgumentParser

# The emulator belongs to the tests. It may register operators only once in a process, so the module must have the name
# that the tests import it by.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
emulation = importlib.import_module("emulation")

MMA_FLOPS = 2 * 16 * 8 * 16  # multiplications and additions of mma.m16n8k16
SECTOR = 32  # bytes
MOST_BYTES = {"forward": 2.5, "backward": 3.5}  # targets, over the fewest


class Gpu(NamedTuple):
    name: str
    bandwidth: float  # bytes/s
    bfloat16: float  # FLOP/s, dense, tensor cores with float32 sums
    float32: float  # FLOP/s, without tensor cores


GPUS = (
    Gpu("A100 SXM 80 GB", 2039e9, 312e12, 19.5e12),  # NVIDIA A100 datasheet
    Gpu("H100 SXM", 3350e9, 989.4e12, 66.9e12),  # NVIDIA H100 datasheet and Hopper architecture whitepaper
    Gpu("RTX 4090", 1008e9, 165.2e12, 82.6e12),  # NVIDIA Ada GPU architecture whitepaper
)


class Case(NamedTuple):
    images: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.images}x{CHANNELS[1]}x{self.height}x{self.width}"

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

    bytes: float
    flops: float  # multiplications and additions
    on_tensor_cores: bool = True
    launches: int | None = None  # of kernels; of plain PyTorch, operators
    sectors: float | None = None
    bank_conflicts: int | None = None
    ldmatrix_conflicts: int | None = None
    mma: int | None = None

    @property
    def sector_efficiency(self) -> float | None:
        return self.sectors and self.bytes / (SECTOR * self.sectors)


# ---- ours, and the fewest ----


def _as_counts(counters: ctypes.Structure) -> Counts:
    return Counts(
        bytes=counters.load_bytes + counters.store_bytes,
        flops=MMA_FLOPS * counters.mma,
        sectors=counters.load_sectors + counters.store_sectors,
        bank_conflicts=counters.shared_conflicts,
        ldmatrix_conflicts=counters.ldmatrix_conflicts,
        mma=counters.mma,
        launches=counters.launches,
    )


def count_ours(case: Case) -> dict[str, Counts]:
    query, key, value = case.tensors(torch.bfloat16, torch.channels_last, "cpu")
    with emulation.emulated_gpu(counting=True) as take_counters:
        operators = torch.ops.ccnet_emulated
        out, largest, total = operators.criss_cross_attention(query, key, value)
        forward = _as_counts(take_counters())
        operators.criss_cross_attention_backward(out, query, key, value, out, largest, total)
        return {"forward": forward, "backward": _as_counts(take_counters())}


def fewest(case: Case) -> dict[str, Counts]:
    """The least that any implementation moves, and the multiplications of the definition.

    The backward pass is not given the weights, and computes the energies again.
    """
    c, cv = CHANNELS
    pixels, path = case.images * case.height * case.width, case.height + case.width - 1
    softmax = 2 * 4  # bytes of the largest energy and the sum
    return {
        "forward": Counts(pixels * (2 * (2 * c + 2 * cv) + softmax), 2 * pixels * path * (c + cv)),
        "backward": Counts(pixels * (2 * (4 * c + 4 * cv) + softmax), 2 * pixels * path * (3 * c + 2 * cv)),
    }


# ---- plain PyTorch, tensor by tensor ----


def tensor_bytes(x: Tensor) -> int:
    """Bytes of x in memory, where an expanded dimension counts once."""
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


class TensorTraffic(TorchDispatchMode):
    """Bytes that ATen's operators move: each reads its inputs once and writes its outputs once; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        storages = {x.untyped_storage()._cdata for x in inputs}
        is_view = not func._schema.is_mutable and all(x.untyped_storage()._cdata in storages for x in outputs)
        if not is_view and "empty" not in func.name():
            self.add(*inputs, *outputs)
        return result

    def add(self, *tensors: Tensor) -> None:
        self.bytes += sum(map(tensor_bytes, tensors))
        self.operators += 1


def _sdpa_backward_flops(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def _sdpa_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


FLOPS = {  # that PyTorch's counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flops,
}


def count_plain(attention: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case) -> dict[str, Counts]:
    inputs = [x.requires_grad_() for x in case.tensors(torch.bfloat16, torch.channels_last, "meta")]
    upstream = torch.empty_like(inputs[-1])
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as products, TensorTraffic() as traffic:
        out = attention(*inputs)
    forward = Counts(traffic.bytes, products.get_total_flops(), launches=traffic.operators)
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as products, TensorTraffic() as traffic:
        torch.autograd.grad(out, inputs, upstream)
    return {
        "forward": forward,
        "backward": Counts(traffic.bytes, products.get_total_flops(), launches=traffic.operators),
    }


# ---- the original's scheme ----

ORIGINAL_KERNELS = ("affinity", "aggregation", "transposed_aggregation")  # numbers in original_scheme.cu
RunKernel = Callable[[str, Tensor, Tensor, Tensor], Tensor]  # name, a, b, out


@cache
def _original_library() -> ctypes.CDLL:
    source = Path(__file__).with_name("original_scheme.cu")
    return ctypes.CDLL(
        str(emulation.compile_with_emulator("original.so", [source], "", "-fvisibility=hidden", "-shared"))
    )


def emulate_original(kernel: str, a: Tensor, b: Tensor, out: Tensor) -> ctypes.Structure:
    """Run a kernel in the emulator, which adds its result to out. Returns counters. Tensors: float32, contiguous."""
    counters = emulation.Counters()
    number = ORIGINAL_KERNELS.index(kernel)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (a, b, out))
    error = _original_library().run_original_kernel(number, *b.shape, *pointers, ctypes.byref(counters))
    assert error == 0, f"{kernel}: error {error}"
    return counters


def _zeros(*shape: int, like: Tensor) -> Tensor:
    return torch.zeros(shape, device=like.device)


def original_forward(run: RunKernel, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """out, and the weights [N, H+W-1, H, W] that the backward pass needs."""
    n, _, h, w = query.shape
    weight = run("affinity", query, key, _zeros(n, h + w - 1, h, w, like=query)).softmax(1)
    return run("aggregation", weight, value, _zeros(*value.shape, like=value)), weight


def original_backward(
    run: RunKernel, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    grad_weight = run("affinity", grad_out, value, _zeros(*weight.shape, like=weight))
    grad_value = run("transposed_aggregation", weight, grad_out, _zeros(*value.shape, like=value))
    grad_energy = torch.ops.aten._softmax_backward_data(grad_weight, weight, 1, torch.float32)
    grad_query = run("aggregation", grad_energy, key, _zeros(*query.shape, like=query))
    grad_key = run("transposed_aggregation", grad_energy, query, _zeros(*key.shape, like=key))
    return grad_query, grad_key, grad_value


class OriginalTraffic(TensorTraffic):
    """TensorTraffic of the original's scheme: what PyTorch's operators move and what the warps of its kernels access.

    Its kernels are emulated once, for one image; their counts are multiplied by the numbers of images and channels.
    """

    def __init__(self, height: int, width: int):
        super().__init__()
        self.channels = SECTOR // 4 // math.gcd(SECTOR // 4, height * width)  # that end with a whole sector
        images, map_ = torch.zeros(1, self.channels, height, width), torch.zeros(1, height + width - 1, height, width)
        self.one_image = {
            "affinity": emulate_original("affinity", images, images, map_),
            "aggregation": emulate_original("aggregation", map_, images, images.clone()),
            "transposed_aggregation": emulate_original("transposed_aggregation", map_, images, images.clone()),
        }
        self.begin()

    def begin(self) -> None:
        self.bytes = self.operators = 0
        self.loads = self.stores = self.load_sectors = self.store_sectors = 0.0
        self.once = self.flops = 0

    def run(self, kernel: str, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        images, channels, height, width = b.shape
        counted, times = self.one_image[kernel], images * channels / self.channels
        self.loads += times * counted.load_bytes
        self.stores += times * counted.store_bytes
        self.load_sectors += times * counted.load_sectors
        self.store_sectors += times * counted.store_sectors
        self.flops += 2 * b.numel() * (height + width - 1)
        self.once += sum(map(tensor_bytes, (a, b, out)))
        self.operators += 1
        return out

    def counts(self) -> dict[str, Counts]:
        def counts(bytes_: float, sectors: float | None = None) -> Counts:
            whole = None if sectors is None else sectors + self.bytes / SECTOR
            return Counts(self.bytes + bytes_, self.flops, False, self.operators, whole)

        # There are as many stores as loads of the result. With sums in registers there are none of the latter, so loads
        # and stores together are as many as all loads as written.
        return {
            "original, as written": counts(self.loads + self.stores, self.load_sectors + self.store_sectors),
            "original, sums in registers": counts(self.loads, self.load_sectors),
            "original, every tensor once": counts(self.once),
        }


def count_original(case: Case) -> dict[str, dict[str, Counts]]:
    query, key, value = case.tensors(torch.float32, torch.contiguous_format, "meta")
    with OriginalTraffic(case.height, case.width) as traffic:
        out, weight = original_forward(traffic.run, query, key, value)
        forward = traffic.counts()
        traffic.begin()
        original_backward(traffic.run, out, query, key, value, weight)
        return {"forward": forward, "backward": traffic.counts()}


# ---- the tables ----

Results = dict[tuple[Case, str], dict[str, Counts]]  # of a case and a pass: contenders by name


def count(cases: Iterable[Case]) -> Results:
    results = {}
    for case in cases:
        counts = {
            "fewest": fewest(case),
            "ours": count_ours(case),
            "bmm": count_plain(bmm_attention, case),
            "fused axes": count_plain(fused_axes_attention, case),
        }
        original = count_original(case)
        for what in MOST_BYTES:
            results[case, what] = {name: passes[what] for name, passes in counts.items()} | original[what]
    return results


def _or_dash(number: float | None, form: str = ",") -> str:
    return "-" if number is None else format(number, form)


def count_rows(results: Results) -> Iterable[list[str]]:
    for (case, what), contenders in results.items():
        for name, x in contenders.items():
            yield [
                f"{case} {what}",
                name,
                f"{x.bytes / 1e6:,.1f}",
                f"{x.bytes / contenders['fewest'].bytes:.3f}",
                f"{x.bytes / contenders['ours'].bytes:.2f}",
                _or_dash(x.sector_efficiency, ".1%"),
                *(_or_dash(number) for number in (x.bank_conflicts, x.ldmatrix_conflicts, x.mma, x.launches)),
            ]


def floor(gpu: Gpu, counts: Counts) -> str:
    """Microseconds to move the bytes or to multiply at the GPU's full rates, whichever is longer."""
    memory = 1e6 * counts.bytes / gpu.bandwidth
    products = 1e6 * counts.flops / (gpu.bfloat16 if counts.on_tensor_cores else gpu.float32)
    return f"{max(memory, products):,.1f} ({'bytes' if memory > products else 'products'})"


def floor_rows(results: Results) -> Iterable[list[str]]:
    for (case, what), contenders in results.items():
        for name in ("fewest", "ours", "bmm", "fused axes", "original, every tensor once"):
            yield [f"{case} {what}", name, *(floor(gpu, contenders[name]) for gpu in GPUS)]


def reached_rows(results: Results) -> Iterable[list[str]]:
    for (case, what), contenders in results.items():
        ours, limit = contenders["ours"], MOST_BYTES[what]
        bytes_, bmm = ours.bytes / contenders["fewest"].bytes, contenders["bmm"].bytes / ours.bytes
        efficiency, conflicts = ours.sector_efficiency or 0, (ours.bank_conflicts, ours.ldmatrix_conflicts)
        for target, counted, reached in (
            (f"bytes / fewest <= {limit}", f"{bytes_:.3f}", bytes_ <= limit),
            ("sector efficiency >= 90 %", f"{efficiency:.1%}", efficiency >= 0.9),
            ("conflicts: banks 0, ldmatrix 0", f"{conflicts[0]:,}, {conflicts[1]:,}", conflicts == (0, 0)),
            ("bytes of bmm / ours >= 4", f"{bmm:.2f}", bmm >= 4),
        ):
            yield [f"{case} {what}", target, counted, "yes" if reached else "no"]


def case_of(text: str) -> Case:
    images, height, width = text.split("x")
    return Case(int(images), int(height), int(width))


def main() -> None:
    parser = ArgumentParser("What criss-cross attention asks of a GPU, counted without one.")
    default = [Case(2, 97, 97), Case(8, 97, 97), Case(1, 128, 256)]
    parser.add_argument("--cases", type=case_of, nargs="+", default=default, metavar="NxHxW")
    args = parser.parse_args()
    if not native.LOADED:
        raise SystemExit("the native operators, whose schemas the emulated ones have, are not built: pip install -e .")
    if emulation.cuda_headers() is None:
        raise SystemExit("needs CUDA's headers: a toolkit, or pip install nvidia-cuda-runtime")
    c, cv = CHANNELS
    print("Counts, not times: no GPU was used. ", end="")
    print(
        f"Query and key of {c} channels, value of {cv}; bfloat16, channels_last (original: float32, NCHW)", flush=True
    )
    results = count(args.cases)
    counted = ["MB", "/ fewest", "/ ours", "sector efficiency"]
    counted += ["bank conflicts", "ldmatrix conflicts", "mma", "launches"]
    print_table(
        "What warps ask for (ours; original as written and with sums in registers), or what tensors have.",
        ["", "", *counted],
        count_rows(results),
    )
    print_table(
        "Microseconds of these bytes at the memory's full bandwidth, or of the products at the full rate if longer.\n"
        "The fewest are a floor for everybody; the others' own floor is lower where the L2 cache keeps bytes.",
        ["", "", *(gpu.name for gpu in GPUS)],
        floor_rows(results),
    )
    print_table("Targets.", ["", "", "counted", "reached"], reached_rows(results))


if __name__ == "__main__":
    main()
