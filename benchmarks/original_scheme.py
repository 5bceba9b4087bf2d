"""The scheme of CCNet's CUDA operators of 2018 (original_scheme.cu), float32 and NCHW: what it asks of memory.

With PyTorch's softmax and zeros. A few channels of one image are emulated: bytes are proportional to channels and
images, and sectors nearly so (images begin at different places of a sector). "As written": a thread reads and writes
its element of the result in every step of its loop. Caches serve most of these accesses, so the counts say nothing
about time; "every tensor once" is what the scheme moves with perfect caches.
"""

import ctypes
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.traffic import SECTOR, Case, Counts, Passes, TensorTraffic, emulation, tensor_bytes

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
            return Counts(self.bytes + bytes_, self.flops, False, self.operators, sectors=whole)

        return {
            "original, as written": counts(self.loads + self.stores, self.load_sectors + self.store_sectors),
            "original, every tensor once": counts(self.once),
        }


def count_original(case: Case) -> dict[str, Passes]:
    query, key, value = case.tensors(torch.float32, torch.contiguous_format, "meta")
    with OriginalTraffic(case.height, case.width) as traffic:
        out, weight = original_forward(traffic.run, query, key, value)
        forward = traffic.counts()
        traffic.begin()
        original_backward(traffic.run, out, query, key, value, weight)
        backward = traffic.counts()
    return {name: {"forward": forward[name], "backward": backward[name]} for name in forward}
