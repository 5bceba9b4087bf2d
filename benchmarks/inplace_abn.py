"""Time and memory of in-place activated batch norm on this machine, beside plain PyTorch and the machine's limit.

    python -m benchmarks.inplace_abn [--threads 1 2] [--dtypes float32 bfloat16] [--sizes 2x512x97x97 ...]

All numbers of a row are measured in one process, in turns, and are medians in milliseconds, in training, with weight
and bias. The contenders are: InPlaceABN with leaky_relu; nn.BatchNorm2d followed by F.leaky_relu, the same with the
activation in place, and the first under torch.compile; and the limit, the time to copy as many bytes as must be moved:
forward, x is read and z written; backward, z and its gradient are read and that of x is written. (It does not include
that in each direction statistics need another pass over tensors larger than the cache.) Before each run x, which
stands for the output of a convolution, is filled again, which is not timed. If a result or gradient of a contender
differs from ours, the run ends.

Memory is what the forward pass keeps for the backward pass, counted by torch.autograd.graph.saved_tensors_hooks.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libs import ABN, InPlaceABN, to_batchnorm
from networks import BACKBONE_ACTIVATIONS, build_model
from utils.arguments import ArgumentParser

from .measuring import DTYPES, add_fresh_memory, begin, print_machine, print_table, take_turns

# Largest norm of the difference over the norm. It comes from few elements, for which y is so near to 0 that rounding
# decides over its sign and thus the derivative.
AGREEMENT = {torch.float32: 3e-3, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 1e-2}
Size = tuple[int, int, int, int]


# ---- the contenders ----


class BatchNormLeakyRelu(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.01)


class BatchNormLeakyReluInPlace(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu_(super().forward(x), 0.01)


CONTENDERS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d, leaky_relu": BatchNormLeakyRelu,
    "BatchNorm2d, leaky_relu in place": BatchNormLeakyReluInPlace,
}


# ---- time ----


class _Source(torch.autograd.Function):
    """Returns x like the result of an operation: it is not a leaf, and may be overwritten."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, case: "Case") -> Tensor:
        ctx.case = case
        return case.x.detach()

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[None, None]:
        ctx.case.grad_x = grad_x
        return None, None


class Case:
    """Inputs of one row of the table."""

    def __init__(self, size: Size, dtype: torch.dtype, layout: str):
        torch.manual_seed(0)
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

        def images() -> Tensor:
            return torch.randn(size).to(dtype).contiguous(memory_format=memory_format)

        self.original, self.upstream = images(), images()
        self.x, self.copied = self.original.clone(), self.original.clone()
        self.grad_x: Tensor | None = None
        self.number = torch.zeros((), requires_grad=True)
        self.parameters = torch.randn(2, size[1])

    def norm(self, kind: Callable[[int], nn.Module]) -> nn.Module:
        """A batch norm of that kind with the bias and the positive weight of the case."""
        norm = kind(self.x.shape[1])
        added = norm.eps if isinstance(norm, ABN) else 0.0
        with torch.no_grad():
            norm.weight.copy_(1 + self.parameters[0].abs() - added)  # type: ignore[operator]
            norm.bias.copy_(self.parameters[1])  # type: ignore[operator]
        return norm

    def prepare(self) -> None:
        self.x.copy_(self.original)
        self.grad_x = None

    def forward(self, norm: Callable[[Tensor], Tensor]) -> Tensor:
        return norm(_Source.apply(self.number, self))

    def forward_and_backward(self, norm: nn.Module, run: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        z = self.forward(run)
        gradients = torch.autograd.grad(z, [*norm.parameters(), self.number], self.upstream, allow_unused=True)
        assert self.grad_x is not None
        return (z, self.grad_x, *(g for g in gradients if g is not None))

    def work(self, what: str, norm: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        if what == "forward":
            return lambda: self.forward(run)
        return lambda: self.forward_and_backward(norm, run)

    def check(self, contenders: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]], dtype: torch.dtype) -> None:
        """End the run unless the results and gradients of all contenders agree with those of the first."""
        results = {}
        for name, (norm, run) in contenders.items():
            self.prepare()
            results[name] = [x.double() for x in self.forward_and_backward(norm, run)]
        expected = next(iter(results.values()))
        what = ("result", "gradient of x", "gradient of weight", "gradient of bias")
        for contender, actual in results.items():
            for name, x, y in zip(what, actual, expected, strict=True):
                difference = ((x - y).norm() / y.norm()).item()
                if not difference <= AGREEMENT[dtype]:
                    raise SystemExit(f"{contender}: {name} differs by {difference:.1e}: no times are printed")


COPIES = {"forward": 1.0, "forward+backward": 2.5}  # of a tensor, each of which reads one and writes one


def time_rows(args: argparse.Namespace) -> Iterable[list[str]]:
    for size, dtype_name, layout, threads in itertools.product(args.sizes, args.dtypes, args.layouts, args.threads):
        torch.set_num_threads(threads)
        torch._dynamo.reset()  # code is compiled for one number of threads and one shape
        case = Case(size, DTYPES[dtype_name], layout)
        contenders: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {}
        for name, kind in {"ours": InPlaceABN, **CONTENDERS}.items():
            norm = case.norm(kind)
            contenders[name] = (norm, norm)
        if args.compile:
            norm = case.norm(BatchNormLeakyRelu)
            contenders["compiled"] = (norm, torch.compile(norm, dynamic=False))
        case.check(contenders, DTYPES[dtype_name])
        for what, copies in COPIES.items():
            works = {name: case.work(what, norm, run) for name, (norm, run) in contenders.items()}
            works["copy"] = partial(case.copied.copy_, case.x)
            ms = take_turns(works, args.repeats, args.seconds, prepare=case.prepare)
            limit = copies * ms["copy"]
            yield [
                f"{'x'.join(map(str, size))} {dtype_name} {layout}",
                f"{what}, {threads} thread{'s' if threads > 1 else ''}",
                f"{ms['ours']:.1f}",
                f"{limit:.1f}",
                f"{ms['ours'] / limit:.2f}",
                *(f"{ms[name]:.1f} ({ms[name] / ms['ours']:.1f}x)" for name in contenders if name != "ours"),
            ]


# ---- memory ----


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, without parameters and x; shared memory counts once."""
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)  # keeps what is saved alive until the end, so that no memory is reused
    del out
    return sum(saved.values())


def with_plain_norms(network: nn.Module) -> nn.Module:
    """A copy of the network with BatchNorm2d and activations in place."""
    plain = to_batchnorm(network)
    for module in plain.modules():
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.inplace = True
    return plain


def block(*norm: nn.Module) -> nn.Sequential:
    """convolution, batch norm and activation, convolution"""
    return nn.Sequential(nn.Conv2d(64, 256, 1), *norm, nn.Conv2d(256, 64, 1))


def memory_rows(side: int) -> Iterable[list[str]]:
    x = torch.randn(2, 64, 97, 97)
    of_block = {
        "BatchNorm2d, leaky_relu": saved_bytes(block(nn.BatchNorm2d(256), nn.LeakyReLU(0.01)), x),
        "BatchNorm2d, leaky_relu in place": saved_bytes(block(nn.BatchNorm2d(256), nn.LeakyReLU(0.01, True)), x),
        "ABN": saved_bytes(block(ABN(256)), x),
        "InPlaceABN": saved_bytes(block(InPlaceABN(256)), x),
    }
    images = torch.randn(2, 3, side, side).contiguous(memory_format=torch.channels_last)
    faithful, fused = (
        build_model(backbone_activation=activation).to(memory_format=torch.channels_last)
        for activation in BACKBONE_ACTIVATIONS
    )
    of_network = {
        "BatchNorm2d, ReLU in place": saved_bytes(with_plain_norms(faithful), images),
        "--backbone-activation identity": saved_bytes(faithful, images),
        "--backbone-activation leaky_relu": saved_bytes(fused, images),
    }
    for where, numbers in (
        ("convolution, norm, convolution; 256 channels", of_block),
        (f"CCNet-101, 2x3x{side}x{side}", of_network),
    ):
        first = next(iter(numbers.values()))
        for name, number in numbers.items():
            yield [where, name, f"{number / 1e6:.1f}", f"{number / first:.3f}"]


def size(text: str) -> Size:
    n, c, h, w = (int(part) for part in text.split("x"))
    return n, c, h, w


def main() -> None:
    parser = ArgumentParser("In-place activated batch norm beside plain PyTorch and the limit.")
    sizes = [(2, 512, 97, 97), (2, 256, 193, 193)]
    parser.add_argument("--sizes", type=size, nargs="+", default=sizes, metavar="NxCxHxW")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--layouts", nargs="+", default=["channels_last", "NCHW"], choices=["channels_last", "NCHW"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=4, help="limit for one contender, which runs at least once")
    add_fresh_memory(parser)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--network-side", type=int, default=385, help="side of the images for the network's memory")
    args = parser.parse_args()
    begin("cpu", args.fresh_memory)
    print_machine("cpu", "InPlaceABN, leaky_relu")
    names = [*CONTENDERS, *(["BatchNorm2d, leaky_relu, compiled"] if args.compile else [])]
    print_table(
        "Median milliseconds; in brackets, how many times ours that is.",
        ["", "", "ours", "limit", "ours / limit", *names],
        time_rows(args),
    )
    print_table(
        "Kept for the backward pass, in MB, parameters and input left out; and as a part of the first.",
        ["", "", "MB", "of the first"],
        memory_rows(args.network_side),
    )


if __name__ == "__main__":
    main()
