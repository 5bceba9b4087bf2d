"""Criss-cross attention in a volume: how far R passes reach, and what they cost beside full attention.

    python -m benchmarks.volume [--sizes 8x16x16 8x24x24]

A position attends to those that differ from it in one of the coordinates (depth, row, column), so that each pass adds
one coordinate that may differ. The first table counts it: the positions at which the derivative of the result at the
middle of a volume is not 0. That is exact, since a position that is not reached has a derivative of exactly 0.

The second table has the operations of R passes with their convolutions, counted by torch.utils.flop_counter (a
multiplication and an addition as two), the memory that the weights of one pass would take, and the time. Full attention
is PyTorch's fused one; like ours it does not store the weights.
"""

import argparse
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cc_attention import CrissCrossAttention3d
from networks.non_local import NonLocalBlock
from utils.arguments import ArgumentParser

from .measuring import Case, Repeated, Work, add_fresh_memory, begin, print_machine, print_table, take_turns

PASSES = (1, 2, 3)
CHANNELS = 64
Size = tuple[int, int, int]


def influence(size: Size, recurrence: int, position: Size) -> Tensor:
    """Whether each position of a volume, [D, H, W], reaches the given one in that many passes."""
    torch.manual_seed(0)
    attention = CrissCrossAttention3d(8).double()
    nn.init.constant_(attention.gamma, 1)
    x = torch.randn(1, 8, *size, dtype=torch.float64, requires_grad=True)
    out = x
    for _ in range(recurrence):
        out = attention(out)
    (gradient,) = torch.autograd.grad(out[(0, slice(None), *position)].sum(), x)
    return (gradient[0] != 0).any(0)


def reach_rows(sizes: list[Size]) -> Iterable[list[str]]:
    for depth, height, width in sizes:
        size = (depth, height, width)
        middle = (depth // 2, height // 2, width // 2)
        reached = [int(influence(size, recurrence, middle).sum()) for recurrence in PASSES]
        total = math.prod(size)
        yield [name_of(size), f"{total}", *(f"{count} ({100 * count / total:.1f}%)" for count in reached)]


def case_of(size: Size, recurrence: int | None, device: str) -> Case:
    """R passes of criss-cross attention over a volume, or full attention for R = None."""
    with torch.device(device):
        torch.manual_seed(0)
        module: nn.Module = NonLocalBlock(CHANNELS) if recurrence is None else CrissCrossAttention3d(CHANNELS)
        x = torch.rand(1, CHANNELS, *size)
    if recurrence is None:  # all positions in one plane, whose shape does not matter
        form, x = torch.channels_last, x.flatten(2, 3)
    else:
        form, module = torch.channels_last_3d, Repeated(module, recurrence)
    return Case(module.to(memory_format=form), x.to(memory_format=form))


def gflops(size: Size, recurrence: int | None) -> float:
    return case_of(size, recurrence, "meta").gflops()


def weights_of(size: Size, recurrence: int | None) -> int:
    """Numbers of one attention map: a weight for each position of each path."""
    positions = math.prod(size)
    return positions * (positions if recurrence is None else sum(size) - 2)


def cost_rows(args: argparse.Namespace) -> Iterable[list[str]]:
    for size in args.sizes:
        cases = {recurrence: case_of(size, recurrence, args.device) for recurrence in (*PASSES, None)}
        works: dict[str, Work] = {}
        for recurrence, case in cases.items():
            works |= {f"{recurrence} forward": case.forward, f"{recurrence} both": case.forward_and_backward}
        ms = take_turns(works, args.repeats, args.seconds, args.device)
        for recurrence in cases:
            yield [
                name_of(size),
                "full" if recurrence is None else f"R={recurrence}",
                f"{gflops(size, recurrence):.2f}",
                f"{4 * weights_of(size, recurrence) / 1e6:.1f}",
                *(f"{ms[f'{recurrence} {which}']:.1f}" for which in ("forward", "both")),
            ]


def name_of(size: Size) -> str:
    return "x".join(map(str, size))


def volume(text: str) -> Size:
    depth, height, width = map(int, text.split("x"))
    return depth, height, width


def main() -> None:
    parser = ArgumentParser("Criss-cross attention in a volume: its reach and its cost beside full attention.")
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--sizes", type=volume, nargs="+", default=[(4, 16, 16), (8, 24, 24), (8, 48, 48)], metavar="DxHxW")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--repeats", type=int, default=3)
    add("--seconds", type=float, default=3, help="an attention that took longer in total is not measured again")
    add_fresh_memory(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin(args.device, args.fresh_memory)
    print_machine(args.device, f"{args.threads} threads, float32, {CHANNELS} channels")
    title = "Positions whose values reach the middle of the volume, after R passes."
    print_table(title, ["", "positions", *(f"R={recurrence}" for recurrence in PASSES)], reach_rows(args.sizes))
    header = ["", "", "GFLOPs", "weights of a pass, MB", "forward, ms", "forward+backward, ms"]
    print_table("Cost beside full attention.", header, cost_rows(args))


if __name__ == "__main__":
    main()
