"""Memory traffic, instructions and time of criss-cross attention on a GPU, counted and modelled without a GPU.

    python -m benchmarks.cuda_roofline [--cases 2x97x97 8x97x97 1x128x256] [--gpus A100 H100 4090]

No GPU is needed, but the packages of tests/requirements.txt, CUDA's headers, and for instructions and times the built
CUDA kernels and cuobjdump, which triton brings. Counted for the network's channels (query and key 64, value 512),
bfloat16, channels_last, forward and backward each:

- ours: the source of the CUDA kernels runs in the emulator (tests/cuda_emulator), on all images at full size. It counts
  the bytes that warps access in global memory (what several lanes of a warp access counts once), the 32-byte sectors
  that hold them, bank conflicts of shared memory, and mma.m16n8k16 instructions. What passes an L2 cache is counted
  with the size that each GPU has, fully associative, where the line goes first that was used least recently. It begins
  empty, and in the end all that was stored is written. Blocks come one after the other, on a GPU a hundred at a time.
- fewest: every input read once and every output written once. Forward: query, key, value; out, and for each pixel the
  largest energy and the sum of the softmax (float32). Backward: these but out, and its gradient; three gradients.
- bmm: the usual form in plain PyTorch (benchmarks/criss_cross.py), run on tensors without data. Every ATen operator but
  views reads its inputs once and writes its outputs once, the least that this form can move. Copies inside an operator
  (bmm makes them of operands in which neither matrix dimension is dense) are not counted.
- fused axes: PyTorch's fused attention along rows and columns (benchmarks/fused_axes.py), counted in the same way.
- original: the scheme of CCNet's own CUDA operators (benchmarks/original_scheme.py).

Instructions are those of the machine code that was built, run on the CPU (benchmarks/sass). Times are a model
(benchmarks/gpu_model.py): expect +-40%. The last table compares ours with the targets of this project.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.criss_cross import CHANNELS, bmm_attention, print_table
from benchmarks.fused_axes import fused_axes_attention
from benchmarks.gpu_model import GPUS, LAUNCH, Gpu, LaunchModel, model_launches
from benchmarks.original_scheme import count_original
from benchmarks.sass import disassembler
from benchmarks.traffic import Case, Counts, Passes, count_ours, count_plain, emulation, fewest
from cc_attention import native
from utils.arguments import ArgumentParser

LIBRARY = Path(native.__file__).with_name("_C_cuda.abi3.so")
MOST_BYTES = {"forward": 1.4, "backward": 1.6}  # targets, of what passes the L2 cache of the first GPU, over the fewest

Results = dict[tuple[Case, str], dict[str, Counts]]  # of a case and a pass: contenders by name
Models = dict[tuple[Case, str], dict[Gpu, list[LaunchModel]]]  # of our launches


def count(cases: Iterable[Case], gpus: Sequence[Gpu], library: Path | None = None) -> tuple[Results, Models]:
    """The models need the library of CUDA kernels; without it there are none."""
    results: Results = {}
    models: Models = {}
    caches = [gpu.l2_bytes for gpu in gpus]
    for case in cases:
        ours: dict[str, list[Counts]] = {what: [] for what in MOST_BYTES}
        for gpu in gpus:
            passes, tensors = count_ours(case, **gpu.properties())
            for what, counts in passes.items():
                ours[what].append(counts)
                if library:
                    of_gpus = models.setdefault((case, what), {})
                    of_gpus[gpu] = model_launches(gpu, counts.counted, library, tensors)
        contenders: dict[str, Passes] = {
            "fewest": fewest(case),
            "bmm": count_plain(bmm_attention, case, caches),
            "fused axes": count_plain(fused_axes_attention, case, caches),
            **count_original(case),
        }
        for what in MOST_BYTES:
            results[case, what] = {
                "ours": _on_several(ours[what]),
                **{name: passes[what] for name, passes in contenders.items()},
            }
    return results, models


def _on_several(counts: list[Counts]) -> Counts:
    """Counts on the first GPU, with the bytes that pass the caches of all. Which kernels there are may depend on it."""
    return replace(counts[0], memory=tuple(bytes_ for x in counts for bytes_ in x.memory))


# ---- the tables ----


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
                *(f"{bytes_ / 1e6:,.1f}" for bytes_ in x.memory),
                *("-" for _ in contenders["ours"].memory[len(x.memory) :]),
                _or_dash(x.sector_efficiency, ".1%"),
                *(_or_dash(number) for number in (x.bank_conflicts, x.ldmatrix_conflicts, x.mma, x.launches)),
            ]


def instruction_rows(models: Models) -> Iterable[list[str]]:
    """A row for each GPU and kind of launch."""
    for (case, what), of_gpus in models.items():
        for gpu, launches in of_gpus.items():
            for alike in _kinds(launches):
                kind, warps = alike[0], alike[0].blocks * alike[0].warps
                yield [
                    f"{case} {what}",
                    gpu.architecture,
                    f"{len(alike)} x {kind.kernel}" if len(alike) > 1 else kind.kernel,
                    f"{kind.blocks} x {kind.warps}",
                    str(kind.at_once),
                    f"{kind.issued.total() / warps:,.0f}",
                    f"{kind.issued.total() / 1e6:,.2f}",
                    f"{kind.issued['HMMA'] / kind.issued.total():.1%}",
                    *(f"{number:,.0f}" for number in kind.waits),
                    ", ".join(f"{count:,} {name}" for name, count in kind.left_out.items()),
                ]
            total = sum(launch.issued.total() for launch in launches)
            yield [f"{case} {what}", gpu.architecture, f"a line: {total / case.lines:,.0f}", *["-"] * 13]


def _kinds(launches: list[LaunchModel]) -> list[list[LaunchModel]]:
    """Launches of one kernel that issue as much, together"""
    kinds: dict[tuple, list[LaunchModel]] = {}
    for launch in launches:
        kinds.setdefault((launch.kernel, launch.blocks, launch.issued.total()), []).append(launch)
    return list(kinds.values())


def launch_rows(models: Models) -> Iterable[list[str]]:
    for (case, what), of_gpus in models.items():
        for gpu, launches in of_gpus.items():
            for x in launches:
                yield [
                    f"{case} {what}",
                    gpu.name,
                    x.kernel,
                    *(f"{1e6 * seconds:.1f}" for seconds in (*x.terms().values(), x.time)),
                ]


def floor(gpu: Gpu, number: int, counts: Counts) -> float:
    """Seconds to move the bytes that pass the cache or to multiply, at full rates, and to launch."""
    bytes_ = counts.memory[number] if counts.memory else counts.bytes
    products = counts.flops / (gpu.bfloat16 if counts.on_tensor_cores else gpu.float32)
    return max(bytes_ / gpu.bandwidth, products) + LAUNCH * (counts.launches or 0)


def time_rows(results: Results, models: Models, gpus: Sequence[Gpu]) -> Iterable[list[str]]:
    for (case, what), contenders in results.items():
        for name in ("fewest", "ours", "bmm", "fused axes", "original, every tensor once"):
            times = [1e6 * floor(gpu, number, contenders[name]) for number, gpu in enumerate(gpus)]
            if name == "ours" and models:
                times = [1e6 * sum(launch.time for launch in models[case, what][gpu]) for gpu in gpus]
            yield [f"{case} {what}", name, *(f"{time:,.1f}" for time in times)]


def reached_rows(results: Results) -> Iterable[list[str]]:
    for (case, what), contenders in results.items():
        ours, limit = contenders["ours"], MOST_BYTES[what]
        bytes_ = ours.memory[0] / contenders["fewest"].bytes
        bmm = contenders["bmm"].memory[0] / ours.memory[0]
        efficiency, conflicts = ours.sector_efficiency or 0, (ours.bank_conflicts, ours.ldmatrix_conflicts)
        for target, counted, reached in (
            (f"past L2: bytes / fewest <= {limit}", f"{bytes_:.3f}", bytes_ <= limit),
            ("sector efficiency >= 90 %", f"{efficiency:.1%}", efficiency >= 0.9),
            ("conflicts: banks 0, ldmatrix 0", f"{conflicts[0]:,}, {conflicts[1]:,}", conflicts == (0, 0)),
            ("past L2: bytes of bmm / ours >= 4", f"{bmm:.2f}", bmm >= 4),
        ):
            yield [f"{case} {what}", target, counted, "yes" if reached else "no"]


def case_of(text: str) -> Case:
    images, height, width = text.split("x")
    return Case(int(images), int(height), int(width))


def main() -> None:
    parser = ArgumentParser("What criss-cross attention asks of a GPU, counted without one.")
    default = [Case(2, 97, 97), Case(8, 97, 97), Case(1, 128, 256)]
    parser.add_argument("--cases", type=case_of, nargs="+", default=default, metavar="NxHxW")
    names = {gpu.name.split()[gpu.name.startswith("RTX")]: gpu for gpu in GPUS}
    parser.add_argument("--gpus", choices=names, nargs="+", default=list(names))
    args = parser.parse_args()
    gpus = [names[name] for name in args.gpus]
    if not native.LOADED:
        raise SystemExit("the native operators, whose schemas the emulated ones have, are not built: pip install -e .")
    if emulation.cuda_headers() is None:
        raise SystemExit("needs CUDA's headers: a toolkit, or pip install nvidia-cuda-runtime")
    c, cv = CHANNELS
    print("Counts, and times of a model (+-40%): no GPU was used. ", end="")
    print(
        f"Query and key of {c} channels, value of {cv}; bfloat16, channels_last (original: float32, NCHW)", flush=True
    )
    library = LIBRARY if LIBRARY.exists() and disassembler() else None
    if library is None:
        print(f"No instructions and times of ours: there is no {LIBRARY.name}, or no cuobjdump.")
    results, models = count(args.cases, gpus, library)
    print_table(
        "What warps ask for (ours; original as written), or what tensors have; and MB that pass the L2 cache.",
        ["", "", "MB", "/ fewest", "/ ours", *(f"{gpu.l2_bytes >> 20} MB of {gpu.name}" for gpu in gpus)]
        + ["sector efficiency", "bank conflicts", "ldmatrix conflicts", "mma", "launches"],
        count_rows(results),
    )
    if models:
        print_table(
            "Instructions issued: by a warp, and millions by a launch. Cycles of a block by itself, and for how many\n"
            "its slowest warp waits for loads, copies, shared memory, tensor cores and barriers; how often for loads.\n"
            "Left out is what the compiler saw no use of, of what the source does.",
            ["", "code", "kernel", "blocks x warps", "at once", "a warp", "all, M", "HMMA", "cycles"]
            + ["loads", "copies", "shared", "mma", "barriers", "waiting", "left out"],
            instruction_rows(models),
        )
        print_table(
            f"Microseconds of launches, by the model: the longest of the four and {1e6 * LAUNCH} to launch.",
            ["", "", "kernel", "memory", "mma", "issue", "latency", "all"],
            launch_rows(models),
        )
    print_table(
        "Microseconds: ours by the model; of the others the bytes that pass the cache, or the products if they take\n"
        f"longer, at full rates, and {1e6 * LAUNCH} for each operator. The fewest are a floor for everybody.",
        ["", "", *(gpu.name for gpu in gpus)],
        time_rows(results, models, gpus),
    )
    print_table("Targets.", ["", "", "counted", "reached"], reached_rows(results))


if __name__ == "__main__":
    main()
