"""Information for a bug report, and a check of the operators on this machine.

    python -m cc_attention

prints versions, devices and the native code that is loaded. Then it compares every operator and its gradients with the
definition, on every device and in every dtype, and times it beside plain PyTorch. The exit status is 1 if anything is
wrong.
"""

import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import cc_attention

from . import native, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHECKED_SIZE = (2, 40, 13, 18)  # batch size, channels, height, width
TIMED_SIZES = {"cpu": (1, 128, 49, 49), "cuda": (2, 512, 97, 97)}
REPEATS = 3


@dataclass
class Operator:
    """An operator and its definition, functions of tensors with the given shapes for a size (N, C, H, W)."""

    name: str
    own: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: Callable[[int, int, int, int], dict[str, list[int]]]


def attention_operators() -> list[Operator]:
    shapes: dict[str, Callable[[int, int, int, int], dict[str, list[int]]]] = {
        "criss_cross_attention": lambda n, c, h, w: {
            "query": [n, c // 8, h, w],
            "key": [n, c // 8, h, w],
            "value": [n, c, h, w],
        },
        "ca_weight": lambda n, c, h, w: {"query": [n, c // 8, h, w], "key": [n, c // 8, h, w]},
        "ca_map": lambda n, c, h, w: {"weight": [n, h + w - 1, h, w], "value": [n, c, h, w]},
    }
    return [Operator(name, getattr(cc_attention, name), getattr(reference, name), of) for name, of in shapes.items()]


def batch_norm_operators() -> list[Operator]:
    """In-place batch norm, if the package `libs` that Python finds is this project's: others have one too."""
    spec = importlib.util.find_spec("libs")
    definition = Path(spec.origin).with_name("reference.py") if spec and spec.origin else Path("nowhere")
    if not definition.exists() or "def activated_batch_norm(" not in definition.read_text():
        return []
    import libs
    import libs.reference

    def normalise(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, **more: bool) -> Tensor:
        running_mean, running_var = torch.zeros_like(weight.detach()), torch.ones_like(weight.detach())
        return function(x, weight, bias, running_mean, running_var, True, 0.1, 1e-5, "leaky_relu", 0.01, **more)

    return [
        Operator(
            "in-place batch norm",
            lambda x, weight, bias: normalise(libs.activated_batch_norm, x.clone(), weight, bias, in_place=True),
            lambda x, weight, bias: normalise(libs.reference.activated_batch_norm, x, weight, bias),
            lambda n, c, h, w: {"x": [n, c, h, w], "weight": [c], "bias": [c]},
        )
    ]


# ---- the report ----


def package_version() -> str:
    try:
        return importlib.metadata.version("criss-cross-attention")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def nvcc_release() -> str:
    home = os.environ.get("CUDA_HOME", os.environ.get("CUDA_PATH"))
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        return "none"
    output = subprocess.run([nvcc, "--version"], text=True, capture_output=True).stdout
    release = re.search(r"release ([\d.]+)", output)
    return f"{release[1] if release else 'unknown'} ({nvcc})"


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def native_code(device_type: str) -> str:
    """The native code that is loaded for a device type, or the reason why there is none."""
    why_not = native.WHY_NOT[device_type]
    if why_not is not None:
        return f"none: {why_not}"
    if device_type == "cpu":
        compiler, best = torch.ops.ccnet.cpu_build().split("; ")
        return f"{native.library('_C')}, {native.cpu_capability()}, built by {compiler} up to {best}"
    # The architectures of the PTX, of which the code for newer ones is made as well
    release, _, architectures = torch.ops.ccnet.cuda_build().partition("; ")
    names = ", ".join(f"compute_{int(number) // 10}" for number in architectures.split(","))
    return f"{native.library('_C_cuda')}, built by {release} from {names}"


def describe_gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    runs = native.gpu_architecture(index) if native.WHY_NOT["cuda"] is None else 0
    code = f"runs the code from compute_{runs}" if runs else "runs plain PyTorch"
    return f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 20} MiB; {code}"


def print_report() -> None:
    cpu = f"{platform.machine()}, {cpu_model()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    lines = {
        "package": f"{package_version()}, in {Path(__file__).parent}",
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "nvcc": nvcc_release(),
        "CPU": cpu,
        **{f"cuda:{index}": describe_gpu(index) for index in range(torch.cuda.device_count())},
        "native CPU": native_code("cpu"),
        "native CUDA": native_code("cuda"),
        "environment": ", ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("CCNET_")),
    }
    for name, text in lines.items():
        print(f"{name:12} {text or 'nothing'}")


# ---- checks ----


def make_inputs(operator: Operator, size: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Random inputs that require gradients, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for shape in operator.shapes(*size).values():
        numbers = torch.randn(shape, generator=generator)
        if len(shape) == 1:  # weights of a batch norm, by which its backward pass divides
            numbers = 1 + numbers.sigmoid()
        inputs.append(numbers.to(device, dtype).requires_grad_())
    return inputs


def result_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    result = function(*inputs)
    grad = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape)
    gradients = torch.autograd.grad(result, inputs, grad.to(result.device, result.dtype))
    return [result.detach(), *gradients]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """For each tensor the largest difference, relative to the largest exact number."""
    return [
        float((x.double() - y).abs().max() / y.abs().max().clamp(min=1e-300)) for x, y in zip(found, exact, strict=True)
    ]


def check(operator: Operator, device: str, dtype: torch.dtype) -> tuple[float, list[str]]:
    """The largest error, and descriptions of errors more than twice plain PyTorch's and beyond rounding."""
    inputs = make_inputs(operator, CHECKED_SIZE, device, dtype)
    exact = result_and_gradients(operator.plain, [x.detach().double().requires_grad_() for x in inputs])
    plain = errors(result_and_gradients(operator.plain, inputs), exact)
    own = errors(result_and_gradients(operator.own, inputs), exact)
    rounding = torch.finfo(dtype).eps * (4 if dtype.itemsize == 2 else 100)
    names = ["result", *(f"gradient of {name}" for name in operator.shapes(*CHECKED_SIZE))]
    wrong = [
        f"{name} differs from the definition by {error:.1e} (plain PyTorch: {of_plain:.1e})"
        for name, error, of_plain in zip(names, own, plain, strict=True)
        if not error <= max(2 * of_plain, rounding)  # also if it is NaN
    ]
    return max(own), wrong


def milliseconds(function: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Median time of forward and backward."""
    on_gpu = inputs[0].device.type == "cuda"
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        torch.autograd.grad(function(*inputs).sum(), inputs)
        if on_gpu:
            torch.cuda.synchronize(inputs[0].device)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])  # the first warms up


def check_and_time(operator: Operator, device: str, dtype: torch.dtype) -> bool:
    """Check and time the operator, and print a line of results. Returns whether it is right."""
    title = f"{operator.name:22} {device:7} {str(dtype).removeprefix('torch.'):9}"
    try:
        error, wrong = check(operator, device, dtype)
        inputs = make_inputs(operator, TIMED_SIZES[device.split(":")[0]], device, dtype)
        own, plain = (milliseconds(function, inputs) for function in (operator.own, operator.plain))
    except Exception as problem:  # report it, and continue with the other checks
        print(f"{title} WRONG: {type(problem).__name__}: {problem}", flush=True)
        return False
    times = f"{own:8.2f} ms, plain PyTorch {plain:8.2f} ms ({plain / own:4.1f}x)"
    print(f"{title} {'WRONG' if wrong else 'right'}, error {error:.0e}, {times}", flush=True)
    for line in wrong:
        print(f"    {line}", flush=True)
    return not wrong


def main() -> int:
    """Print the report and check everything; returns the exit status."""
    print_report()
    operators = [*attention_operators(), *batch_norm_operators()]
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    sizes = ", ".join(f"{list(size)} on {device}" for device, size in TIMED_SIZES.items())
    print(f"\nForward and backward; times of [N, C, H, W] = {sizes}:")
    right = [check_and_time(*case) for case in itertools.product(operators, devices, DTYPES)]
    print("\nAll right." if all(right) else f"\nWRONG: {right.count(False)} of {len(right)}.")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
