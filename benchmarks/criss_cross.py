"""Time and memory of criss-cross attention on this machine, beside plain PyTorch and the machine's limit.

    python -m benchmarks.criss_cross [--device cuda] [--threads 1 2] [--dtypes float32 bfloat16] [--sizes 97x97] ...

All numbers of a row are measured in one process, in turns, and are medians in milliseconds. The contenders are: this
project's operator; the two usual forms in plain PyTorch, batched matrix products (CCNet's own pure PyTorch version) and
einsum (mmcv's), each also under torch.compile; batched products written for channels_last; PyTorch's fused attention
along rows and along columns (fused_axes.py), what one would choose today on a GPU, since it stores no map; and the
limit, the time of the same multiply-adds at the machine's peak rate. (It does not include that our backward pass
recomputes the energies.)

On the CPU the peak rate is that of the fastest run, in the same turns, of a loop that keeps all operands in registers
(peak.py); without a C++ compiler there is no limit. On a GPU, where times are taken between CUDA events, it is the rate
of a large matrix product or 1x1 convolution, and the limit is at least the time to move inputs and results once at the
rate of a large copy; no contender uses TF32. Full non-local attention, another function, is listed for its cost;
PyTorch has no fused kernel for it on the CPU if query and value have different channels.

If a result or gradient of a contender differs from ours, the run ends.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cc_attention import criss_cross_attention
from utils.arguments import ArgumentParser

from . import peak
from .fused_axes import fused_axes_attention
from .measuring import (
    DTYPES,
    Work,
    add_fresh_memory,
    begin,
    bytes_from_a_new_process,
    peak_bytes,
    print_machine,
    print_table,
    take_turns,
)

CHANNELS = (64, 512)  # of query and key, and of value: the network's
# Largest norm of the difference over the norm
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 4e-3}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- the contenders ----


def bmm_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Columns and rows as batches of matrices; in its column the pixel itself is masked with -inf."""
    n, _, h, w = query.shape

    def columns(x: Tensor) -> Tensor:  # [N*W, C, H]
        return x.permute(0, 3, 1, 2).reshape(n * w, -1, h)

    def rows(x: Tensor) -> Tensor:  # [N*H, C, W]
        return x.permute(0, 2, 1, 3).reshape(n * h, -1, w)

    self_mask = torch.diag(torch.full((h,), float("-inf"), dtype=query.dtype, device=query.device))
    column_energy = torch.bmm(columns(query).transpose(1, 2), columns(key)) + self_mask
    row_energy = torch.bmm(rows(query).transpose(1, 2), rows(key))
    energy = torch.cat([column_energy.view(n, w, h, h).permute(0, 2, 1, 3), row_energy.view(n, h, w, w)], dim=3)
    weight = energy.softmax(3)
    column_weight = weight[..., :h].permute(0, 2, 1, 3).reshape(n * w, h, h)
    row_weight = weight[..., h:].reshape(n * h, w, w)
    column_out = torch.bmm(columns(value), column_weight.transpose(1, 2)).view(n, w, -1, h).permute(0, 2, 3, 1)
    row_out = torch.bmm(rows(value), row_weight.transpose(1, 2)).view(n, h, -1, w).permute(0, 2, 1, 3)
    return column_out + row_out


def bmm_channels_last_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same for channels_last tensors: with a batch size of 1 no operand is copied."""
    n, _, h, w = query.shape

    def columns(x: Tensor) -> Tensor:  # [N*W, H, C]
        return x.permute(0, 3, 2, 1).reshape(n * w, h, -1)

    def rows(x: Tensor) -> Tensor:  # [N*H, W, C]
        return x.permute(0, 2, 3, 1).reshape(n * h, w, -1)

    self_mask = torch.diag(torch.full((h,), float("-inf"), dtype=query.dtype, device=query.device))
    column_energy = torch.bmm(columns(query), columns(key).transpose(1, 2)) + self_mask
    row_energy = torch.bmm(rows(query), rows(key).transpose(1, 2))
    energy = torch.cat([column_energy.view(n, w, h, h).transpose(1, 2), row_energy.view(n, h, w, w)], dim=3)
    weight = energy.softmax(3)
    column_weight = weight[..., :h].transpose(1, 2).reshape(n * w, h, h)
    row_weight = weight[..., h:].reshape(n * h, w, w)
    column_out = torch.bmm(column_weight, columns(value)).view(n, w, h, -1).permute(0, 3, 2, 1)
    return column_out + torch.bmm(row_weight, rows(value)).view(n, h, w, -1).permute(0, 3, 1, 2)


def einsum_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with einsum, without reshaping the images."""
    h = query.shape[2]
    self_mask = torch.diag(torch.full((h,), float("-inf"), dtype=query.dtype, device=query.device))
    column_energy = torch.einsum("nchw,nciw->nwhi", query, key) + self_mask
    row_energy = torch.einsum("nchw,nchj->nhwj", query, key)
    weight = torch.cat([column_energy.transpose(1, 2), row_energy], dim=3).softmax(3)
    out = torch.einsum("nciw,nhwi->nchw", value, weight[..., :h])
    return out + torch.einsum("nchj,nhwj->nchw", value, weight[..., h:])


def non_local_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every pixel attends to every pixel."""
    q, k, v = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return out.squeeze(1).transpose(1, 2).reshape(value.shape)


CONTENDERS: dict[str, Attention] = {
    "bmm": bmm_attention,
    "einsum": einsum_attention,
    "bmm for channels_last": bmm_channels_last_attention,
    "fused axes": fused_axes_attention,
}
COMPILED = ("bmm", "einsum")
ATTENTIONS: dict[str, Attention] = {"ours": criss_cross_attention, **CONTENDERS}


# ---- measuring ----


class Case:
    """Inputs of one row of the table."""

    def __init__(self, size: tuple[int, int], dtype: torch.dtype, layout: str, device: str = "cpu"):
        torch.manual_seed(0)
        self.device = device
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

        def images(channels: int, scale: float) -> Tensor:
            image = (scale * torch.randn(1, channels, *size)).to(device, dtype)
            return image.contiguous(memory_format=memory_format)

        c, cv = CHANNELS
        self.query, self.key, self.value = images(c, 0.35), images(c, 0.35), images(cv, 1.0)
        self.upstream = images(cv, 1.0)
        pixels, path = size[0] * size[1], size[0] + size[1] - 1
        self.map_bytes = pixels * path * 4
        # Multiplications and additions. Forward: energies, weighted values. Backward: gradients of both factors of each
        self.flops = {"forward": 2 * pixels * path * (c + cv), "forward+backward": 6 * pixels * path * (c + cv)}
        # Inputs read once and results written once: backward, twice as many as forward
        once = 2 * pixels * (c + cv) * dtype.itemsize
        self.fewest_bytes = {"forward": once, "forward+backward": 3 * once}

    def forward(self, attention: Attention) -> Tensor:
        return attention(self.query, self.key, self.value)

    def forward_and_backward(self, attention: Attention) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (self.query, self.key, self.value)]
        out = attention(*inputs)
        return (out, *torch.autograd.grad(out, inputs, self.upstream))

    def work(self, what: str, attention: Attention) -> Work:
        if what == "forward":
            return lambda: self.forward(attention)
        return lambda: self.forward_and_backward(attention)

    def check(self, contenders: dict[str, Attention], dtype: torch.dtype) -> None:
        """End the run unless the results and gradients of all contenders agree."""
        names = ("result", "gradient of query", "gradient of key", "gradient of value")
        expected = self.forward_and_backward(criss_cross_attention)
        for contender, attention in contenders.items():
            for name, x, y in zip(names, self.forward_and_backward(attention), expected, strict=True):
                difference = ((x.double() - y.double()).norm() / y.double().norm()).item()
                if not difference <= AGREEMENT[dtype]:
                    raise SystemExit(f"{contender}: {name} differs by {difference:.1e}: no times are printed")


def matrix_products(dtype: torch.dtype, device: str) -> dict[str, tuple[Work, int]]:
    """Works that measure a GPU's peak rate, with their numbers of multiplications and additions."""
    if device == "cpu":
        return {}
    image = torch.randn(1, 576, 97, 97).to(device, dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(576, 576, 1, 1).to(device, dtype).contiguous(memory_format=torch.channels_last)
    n = 8192
    a, b = torch.randn(2, n, n).to(device, dtype)
    return {
        "1x1 convolution": (lambda: F.conv2d(image, kernel), 2 * 97 * 97 * 576 * 576),
        "matrix product": (lambda: a @ b, 2 * n**3),
    }


def large_copies(device: str) -> dict[str, tuple[Work, int]]:
    """Works that measure a GPU's memory bandwidth, with the bytes that they read and write."""
    if device == "cpu":
        return {}
    x = torch.zeros(2**28, dtype=torch.uint8, device=device)
    return {"copy": (x.clone, 2 * x.numel())}


def cpu_peak(dtype: torch.dtype, device: str) -> peak.Peak | None:
    """The work that measures a CPU's peak rate. None on a GPU, and without a compiler, which main() reports."""
    if device != "cpu":
        return None
    try:
        return peak.Peak(dtype)
    except peak.NoCompiler:
        return None


def limit_in_ms(
    case: Case,
    what: str,
    ms: dict[str, float],
    loop: peak.Peak | None,
    products: dict[str, tuple[Work, int]],
    copies: dict[str, tuple[Work, int]],
) -> float | None:
    """The limit at the measured rates; `ms` has the times of products and copies. None if nothing was measured."""
    if loop is not None:
        return 1e3 * case.flops[what] / (2 * loop.rate)
    times = [case.flops[what] / max(flops / ms[name] for name, (_, flops) in products.items())] if products else []
    times += [case.fewest_bytes[what] * ms[name] / moved for name, (_, moved) in copies.items()]
    return max(times, default=None)


# ---- memory ----


def peak_extra_bytes(case: Case, attention: Attention) -> int:
    """Peak memory of forward and backward beyond inputs, result and gradients. On the CPU, call it once per process."""
    results: list[Tensor] = []
    peak = peak_bytes(case.device, lambda: results.extend(case.forward_and_backward(attention)))
    return peak - sum(x.numel() * x.element_size() for x in results)


def peak_extra_in_a_new_process(
    name: str, size: tuple[int, int], dtype_name: str, layout: str, fresh_memory: bool
) -> int:
    arguments = ["--memory-of", name, "--sizes", "x".join(map(str, size)), "--dtypes", dtype_name, "--layouts", layout]
    arguments += ["--fresh-memory"] if fresh_memory else []
    return bytes_from_a_new_process("benchmarks.criss_cross", *arguments)


# ---- the tables ----


def time_non_local(case: Case, what: str, seconds: float) -> str:
    """Milliseconds, or "-" if its map of all pairs of pixels exceeds 2 GB (it is in memory several times)."""
    pixels = case.value.shape[2] * case.value.shape[3]
    if pixels**2 * case.value.element_size() > 2e9:
        return "-"
    return f"{take_turns({'': case.work(what, non_local_attention)}, 3, seconds, case.device)['']:.1f}"


def time_rows(args: argparse.Namespace) -> Iterable[list[str]]:
    for size, dtype_name, layout, threads in itertools.product(args.sizes, args.dtypes, args.layouts, args.threads):
        torch.set_num_threads(threads)
        torch._dynamo.reset()  # code is compiled for one number of threads and one shape
        dtype = DTYPES[dtype_name]
        case = Case(size, dtype, layout, args.device)
        contenders = dict(CONTENDERS)
        if args.compile:
            for name in COMPILED:
                contenders[f"{name}, compiled"] = torch.compile(CONTENDERS[name], dynamic=False)
        case.check(contenders, dtype)
        on = "GPU" if args.device == "cuda" else f"{threads} thread{'s' if threads > 1 else ''}"
        products, copies = matrix_products(dtype, args.device), large_copies(args.device)
        for what in ("forward", "forward+backward"):
            works = {"ours": case.work(what, criss_cross_attention)}
            works |= {name: case.work(what, attention) for name, attention in contenders.items()}
            works |= {name: work for name, (work, _) in (products | copies).items()}
            loop = cpu_peak(dtype, args.device)
            if loop is not None:
                works["peak"] = loop
            ms = take_turns(works, args.repeats, args.seconds, args.device)
            limit = limit_in_ms(case, what, ms, loop, products, copies)
            yield [
                f"{size[0]}x{size[1]} {dtype_name} {layout}",
                f"{what}, {on}",
                f"{ms['ours']:.2f}",
                "-" if limit is None else f"{limit:.2f}",
                "-" if limit is None else f"{ms['ours'] / limit:.2f}",
                *(f"{ms[name]:.2f} ({ms[name] / ms['ours']:.1f}x)" for name in contenders),
                time_non_local(case, what, args.seconds) if args.non_local else "-",
            ]


def memory_rows(args: argparse.Namespace) -> Iterable[list[str]]:
    for size, dtype_name, layout in itertools.product(args.sizes, args.dtypes, args.layouts):
        case = Case(size, DTYPES[dtype_name], layout, args.device)
        if args.device == "cuda":
            extra = {name: peak_extra_bytes(case, attention) for name, attention in ATTENTIONS.items()}
        else:
            extra = {
                name: peak_extra_in_a_new_process(name, size, dtype_name, layout, args.fresh_memory)
                for name in ATTENTIONS
            }
        yield [
            f"{size[0]}x{size[1]} {dtype_name}",
            layout,
            f"{case.map_bytes / 1e6:.1f}",
            *(f"{bytes_ / 1e6:.1f}" for bytes_ in extra.values()),
        ]


def scaling_rows(args: argparse.Namespace) -> Iterable[list[str]]:
    torch.set_num_threads(max(args.threads))
    for side in args.scaling:
        case = Case((side, side), torch.float32, "channels_last", args.device)
        ms = take_turns(
            {what: case.work(what, criss_cross_attention) for what in ("forward", "forward+backward")},
            args.repeats,
            args.seconds,
            args.device,
        )
        non_local = time_non_local(case, "forward", args.seconds)
        steps, pairs = side * side * (2 * side), side**4
        yield [
            f"{side}x{side}",
            f"{steps:,}",
            f"{ms['forward']:.1f}",
            f"{1e6 * ms['forward'] / steps:.2f}",
            f"{ms['forward+backward']:.1f}",
            non_local,
            "-" if non_local == "-" else f"{1e6 * float(non_local) / pairs:.2f}",
        ]


def sides(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def main() -> None:
    parser = ArgumentParser("Criss-cross attention beside plain PyTorch and the machine's limit.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sizes", type=sides, nargs="+", default=[(97, 97), (128, 256)], metavar="HxW")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--layouts", nargs="+", default=["channels_last", "NCHW"], choices=["channels_last", "NCHW"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=4, help="limit for one contender, which runs at least once")
    add_fresh_memory(parser)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--no-non-local", dest="non_local", action="store_false", help="leave out non-local attention")
    parser.add_argument("--scaling", type=int, nargs="*", default=[32, 64, 96, 128, 192, 256], help="sides of squares")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # measure one contender and print the bytes
    args = parser.parse_args()
    begin(args.device, args.fresh_memory)
    if args.memory_of:
        case = Case(args.sizes[0], DTYPES[args.dtypes[0]], args.layouts[0])
        attention = ATTENTIONS[args.memory_of]
        Case((5, 5), torch.float32, "NCHW").forward_and_backward(attention)  # what is loaded only once
        print(peak_extra_bytes(case, attention))
        return
    if args.device == "cuda":
        args.threads = args.threads[:1]
    print_machine(args.device, f"query and key of {CHANNELS[0]} channels, value of {CHANNELS[1]}")
    if args.device == "cpu":
        try:
            peak.library()
        except peak.NoCompiler as reason:
            print(reason)
    names = [*CONTENDERS, *(f"{name}, compiled" for name in COMPILED if args.compile)]
    print_table(
        "Median milliseconds; in brackets, how many times ours that is.",
        ["batch of 1", "", "ours", "limit", "ours / limit", *names, "non-local"],
        time_rows(args),
    )
    print_table(
        "Peak memory of forward and backward beyond inputs, result and gradients, in MB.",
        ["batch of 1", "", "one attention map", "ours", *CONTENDERS],
        memory_rows(args),
    )
    print_table(
        "Cost by size, float32, channels_last: milliseconds, and nanoseconds a step of the growth that is expected.",
        ["", "HW(H+W)", "forward", "/ HW(H+W)", "forward+backward", "non-local forward", "/ (HW)^2"],
        scaling_rows(args),
    )


if __name__ == "__main__":
    main()
