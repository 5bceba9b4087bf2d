"""What context costs: parameters, operations, memory and time of each head, and what the paper published.

    python -m benchmarks.cost [--device cuda]

The first table is of the part that gathers context alone, on a quarter of layer4's channels, as the paper counts it
(what it adds to the baseline, for an image of 769x769). The second is of whole heads on layer4's features, with the
convolutions around it and the classifying layers. Operations are counted by torch.utils.flop_counter, a
multiplication and an addition as two. Memory is the peak beyond the input, the weights and their gradients: of the
forward pass without gradients, and of a forward and a backward pass. On the CPU it is measured in processes of its own,
and full attention is left out where its weights would not fit. The plot shows the first table by the side of the image.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from cc_attention import CrissCrossAttention
from networks.heads import build_head
from networks.layers import Head
from networks.non_local import NonLocalBlock
from utils.arguments import ArgumentParser

from .measuring import (
    Case,
    Repeated,
    Work,
    add_fresh_memory,
    begin,
    bytes_from_a_new_process,
    peak_bytes,
    print_machine,
    print_table,
    take_turns,
)

FEATURES, CLASSES = 2048, 19
CONTEXTS = ("R=1", "R=2", "R=3", "nonlocal")
HEADS = ("none", *CONTEXTS, "psp", "aspp")
PASSES = ("forward", "forward+backward")
# GFLOPs and MB that the paper adds to its baseline.
PUBLISHED = {"R=1": ("8.3", "-"), "R=2": ("16.5", "127"), "nonlocal": ("108", "1411")}
_PLOTTED_SIDES = (33, 49, 65, 97, 129)
_COLOURS = {"R=1": "#7aa6d8", "R=2": "#1f5fa8", "nonlocal": "#c0392b"}  # of those plotted


def build(part: str, name: str, features: int) -> tuple[nn.Module, int]:
    """The module, and the channels of its input."""
    if part == "head":
        return named_head(name, features, CLASSES), features
    channels = features // 4
    if name == "nonlocal":
        return NonLocalBlock(channels), channels
    return Repeated(CrissCrossAttention(channels), int(name[2:])), channels


def named_head(name: str, in_channels: int, num_classes: int) -> Head:
    """A head by its name, or by R=... for that of criss-cross attention."""
    recurrence = int(name[2:]) if name.startswith("R=") else 0
    return build_head("rcca" if recurrence else name, in_channels, num_classes, recurrence)


def case_of(part: str, name: str, size: tuple[int, int], features: int, device: str) -> Case:
    with torch.device(device):
        torch.manual_seed(0)
        module, channels = build(part, name, features)
        x = torch.rand(1, channels, *size)
    return Case(module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))


def work_of(case: Case, which: str) -> Work:
    return case.forward if which == "forward" else case.forward_and_backward


def gflops(part: str, name: str, size: tuple[int, int], features: int) -> float:
    return case_of(part, name, size, features, "meta").gflops()


def peak_of(args: argparse.Namespace, part: str, name: str, size: tuple[int, int], which: str) -> int:
    """`peak_bytes` of a pass, the second one, so that the gradients of the weights are there."""
    work = work_of(case_of(part, name, size, args.features, args.device), which)
    work()
    return peak_bytes(args.device, work)


def megabytes(args: argparse.Namespace, part: str, name: str, size: tuple[int, int], which: str) -> float:
    if args.device == "cuda":
        return peak_of(args, part, name, size, which) / 1e6
    flags = ["--fresh-memory"] if args.fresh_memory else []
    arguments = [*("--features", args.features, "--threads", args.threads), *flags]
    memory_of = [part, name, *size, which]
    return bytes_from_a_new_process("benchmarks.cost", *arguments, "--memory-of", *memory_of) / 1e6


def fits(name: str, size: tuple[int, int], device: str) -> bool:
    """Whether the memory holds five tensors of the size of full attention's weights, which PyTorch on the CPU needs."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return name != "nonlocal" or device == "cuda" or 5 * 4 * (size[0] * size[1]) ** 2 < memory


def times(
    args: argparse.Namespace, part: str, names: Sequence[str], size: tuple[int, int]
) -> dict[tuple[str, str], float]:
    """Milliseconds of each pass of each module, in turns."""
    cases = {name: case_of(part, name, size, args.features, args.device) for name in names}
    works = {f"{name} {which}": work_of(cases[name], which) for name in names for which in PASSES}
    ms = take_turns(works, args.repeats, args.seconds, args.device)
    return {(name, which): ms[f"{name} {which}"] for name in names for which in PASSES}


def rows(args: argparse.Namespace, part: str, names: Sequence[str], size: tuple[int, int]) -> Iterable[list[str]]:
    ms = times(args, part, [name for name in names if fits(name, size, args.device)], size)
    for name in names:
        module, _ = build(part, name, args.features)
        parameters = sum(parameter.numel() for parameter in module.parameters()) / 1e6
        row = [name, f"{parameters:.2f}", f"{gflops(part, name, size, args.features):.1f}"]
        memory = [f"{megabytes(args, part, name, size, which):.0f}" if (name, which) in ms else "-" for which in PASSES]
        milliseconds = [f"{ms[name, which]:.1f}" if (name, which) in ms else "-" for which in PASSES]
        published = PUBLISHED.get(name, ("-", "-")) if size == (97, 97) else ("-", "-")
        if part == "context":
            yield [*row, published[0], *memory, published[1], *milliseconds]
        else:
            yield [*row, *memory, *milliseconds]


def plot(args: argparse.Namespace) -> None:
    """Operations and memory against the side of the image, of one and two passes and full attention."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    images = [8 * (side - 1) + 1 for side in args.plotted_sides]
    for name in (name for name in _COLOURS if name in args.names):
        sizes = [(side, side) for side in args.plotted_sides]
        operations = [gflops("context", name, size, args.features) for size in sizes]
        left.plot(images, operations, "o-", color=_COLOURS[name], label=name)
        sizes = [size for size in sizes if fits(name, size, args.device)]
        memory = [megabytes(args, "context", name, size, "forward+backward") for size in sizes]
        right.plot(images[: len(sizes)], memory, "o-", color=_COLOURS[name], label=name)
    for axes, title in ((left, "GFLOPs, forward"), (right, "memory, MB, forward and backward")):
        axes.set(xlabel="side of the image, pixels", title=title, yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=130)


def main() -> None:
    parser = ArgumentParser("What context costs: parameters, operations, memory and time of each head.")
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--names", nargs="+", default=HEADS, choices=HEADS, help="of what is measured, in both tables and the plot")
    add("--sizes", nargs="+", default=["97x97", "128x256"], help="of the features, height x width")
    add("--features", type=int, default=FEATURES, help="channels of the features")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--repeats", type=int, default=5)
    add("--seconds", type=float, default=20, help="a module that took longer in total is not measured again")
    add("--plotted-sides", type=int, nargs="+", default=_PLOTTED_SIDES, help="of the features")
    add("--output", type=Path, default=Path("benchmarks/results/cost.png"), help="the plot")
    add("--memory-of", nargs=5, help=argparse.SUPPRESS)
    add_fresh_memory(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin(args.device, args.fresh_memory)
    if args.memory_of:
        part, name, height, width, which = args.memory_of
        print(peak_of(args, part, name, (int(height), int(width)), which))
        return

    print_machine(args.device, f"{args.threads} threads, float32")
    costs = ["memory forward, MB", "forward+backward, MB", "forward, ms", "forward+backward, ms"]
    for text in args.sizes:
        height, width = map(int, text.split("x"))
        header = ["", "parameters, M", "GFLOPs", "paper", *costs[:2], "paper", *costs[2:]]
        title = f"context alone, 1x{args.features // 4}x{text}"
        contexts = [name for name in args.names if name in CONTEXTS]
        print_table(title, header, rows(args, "context", contexts, (height, width)))
        header = ["", "parameters, M", "GFLOPs", *costs]
        print_table(f"whole heads, 1x{args.features}x{text}", header, rows(args, "head", args.names, (height, width)))
    plot(args)
    print(f"\nplot: {args.output}")


if __name__ == "__main__":
    main()
