"""Machine code run on the CPU: code of known structure, and that of the built kernels beside their emulated source."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from attention import random_inputs
from emulation import emulated_gpu

from benchmarks import gpu_model, sass
from benchmarks.gpu_model import GPUS, check_block, issued_by_name, run_alone, run_launch
from cc_attention import native

LIBRARY = Path(native.__file__).with_name("_C_cuda.abi3.so")
A100 = GPUS[0]

needs_library = pytest.mark.skipif(
    not LIBRARY.exists() or not native.LOADED or not sass.disassembler(),
    reason="needs the CUDA kernels (pip install -e ., with nvcc) and cuobjdump",
)


def kernel(code: str, architecture: str = "sm_80") -> sass.Kernel:
    lines = (line.split("#")[0].strip() for line in code.strip().splitlines())
    text = "\n".join(f"        /*{16 * place:04x}*/ {line} ;" for place, line in enumerate(lines))
    return sass.Kernel("by hand", architecture, 32, lambda: text)


def run(code: sass.Kernel, blocks: int, threads: int, shared_bytes: int, memory: sass.Memory, *parameters: int):
    launch = sass.Launch(blocks, threads, shared_bytes, np.array(parameters, np.uint64).tobytes())
    return [sass.run_block(code, launch, number, memory) for number in range(blocks)]


# 64 threads. The first 48 count to 5, the others do not; all add 100 and store the sum at out[thread].
DIVERGENT = """
    S2R R0, SR_TID.X
    MOV R1, RZ
    ISETP.GE.AND P0, PT, R0, 0x30, PT
    BSSY B0, 0xa0
    @P0 BRA 0x80
    IADD3 R1, R1, 0x1, RZ                      # 0050
    ISETP.LT.AND P1, PT, R1, 0x5, PT
    @P1 BRA 0x50
    IADD3 R1, R1, 0x64, RZ                     # 0080
    BSYNC B0
    BAR.SYNC.DEFER_BLOCKING 0x0                # 00a0
    IMAD.WIDE R4, R0, 0x4, c[0x0][0x160]
    @!PT STG.E [R4.64+0x100], R0
    STG.E [R4.64], R1
    EXIT
"""


def test_a_divergent_loop_by_hand():
    out = torch.zeros(64, dtype=torch.int32)
    memory = sass.Memory([out])
    (block,) = run(kernel(DIVERGENT), 1, 64, 0, memory, out.data_ptr())
    assert memory.read(out).view(np.int32).tolist() == [105] * 48 + [100] * 16
    issued = issued_by_name(block)
    # Warp 0: 5 instructions, 5 rounds of 3, 2 and 5. Warp 1 has threads on both sides, so the 2 twice. The store that
    # is predicated off is issued all the same.
    assert issued.total() == (5 + 15 + 2 + 5) + (5 + 15 + 4 + 5)
    assert issued["STG"] == 4
    assert issued["BSYNC"] == 3
    assert issued["BAR"] == 2
    addresses = sum(4 * (out.data_ptr() + 4 * thread) for thread in range(64))
    assert block.accesses == {"loads": 0, "stores": 2, "load_addresses": 0, "store_addresses": addresses % (1 << 64)}


def test_what_is_not_known_is_an_error():
    with pytest.raises(sass.SassError, match=r"by hand on sm_80: FROB R1, R2 is not known here"):
        run(kernel("FROB R1, R2\nEXIT"), 1, 32, 0, sass.Memory([]))
    with pytest.raises(sass.SassError, match="wait for each other"):
        run(kernel("S2R R0, SR_TID.X\nISETP.GE.AND P0, PT, R0, 0x10, PT\nBSSY B0, 0x50\n@P0 BRA 0x50\nBSYNC B0\n"
                   "BAR.SYNC 0x0\nEXIT"), 1, 32, 0, sass.Memory([]))  # fmt: skip
    with pytest.raises(sass.SassError, match="reads past 64 bytes of shared memory"):
        run(kernel("LDS R0, [RZ+0x40]\nEXIT"), 1, 32, 64, sass.Memory([]))


TINY = r"""
extern "C" __global__ void sums(const int* x, int* out, int count) {
  extern __shared__ int shared[];
  int sum = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    sum += x[i * 64 + threadIdx.x];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = shared[threadIdx.x ^ 63] / 7 * (blockIdx.x + 1);
}

extern "C" __global__ void ratios(const float* x, const double* y, double* out, int which) {
  double all[8];  // in local memory
  for (int i = 0; i < 8; ++i) {
    all[i] = (floorf(x[threadIdx.x]) - .5) / y[threadIdx.x ^ i] + expf(x[i]);
  }
  out[threadIdx.x] = all[threadIdx.x % 8 ^ which];
}
"""


@pytest.fixture(params=["sm_80", "sm_90"])
def tiny(request, tmp_path) -> dict[str, sass.Kernel]:
    if not shutil.which("nvcc") or not sass.disassembler():
        pytest.skip("needs nvcc and cuobjdump")
    source, cubin = tmp_path / "tiny.cu", tmp_path / "tiny.cubin"
    source.write_text(TINY)
    subprocess.run(["nvcc", f"-arch={request.param}", "-cubin", "-o", cubin, source], check=True)
    return sass.kernels(cubin, request.param)


def test_functions_of_real_numbers(tiny):
    x, y, out = torch.randn(32), torch.randn(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    memory = sass.Memory([x, y, out])
    (block,) = run(tiny["ratios"], 1, 32, 0, memory, x.data_ptr(), y.data_ptr(), out.data_ptr(), 5)
    i = torch.arange(32) % 8 ^ 5
    expected = (x.floor().double() - 0.5) / y[torch.arange(32) ^ i] + x[i].exp().double()
    torch.testing.assert_close(torch.from_numpy(memory.read(out).view(np.float64)), expected, rtol=1e-7, atol=1e-6)
    assert issued_by_name(block)["LDL"] > 0


def test_a_loop_that_nvcc_compiled(tiny):
    code = tiny["sums"]
    # Everything up to EXIT is in line but for one loop, whose end goes back to its beginning; after EXIT is padding.
    back = [i for i in code.code if i.name == "BRA" and i.operands[-1].number < i.place]
    end = next(n for n, i in enumerate(code.code) if i.name == "EXIT" and i.guard is None) + 1
    assert len(back) == 1
    loop = (back[0].place - back[0].operands[-1].number) // 16 + 1
    x, out = torch.randint(1000, (5, 64), dtype=torch.int32), torch.zeros(2, 64, dtype=torch.int32)
    for count in (1, 2, 5):
        memory = sass.Memory([x, out])
        blocks = run(code, 2, 64, 256, memory, x.data_ptr(), out.data_ptr(), count)
        expected = x[:count].sum(0).flip(0) // 7 * torch.tensor([[1], [2]])
        assert memory.read(out).view(np.int32).tolist() == expected.flatten().tolist()
        for block in blocks:
            issued = issued_by_name(block)
            assert issued.total() == 2 * (end - loop + count * loop)
            assert (issued["LDG"], issued["STG"], issued["BAR"]) == (2 * count, 2, 2)


# ---- the built kernels ----


def passes(inputs, take_launches):
    """Forward and backward: launches, tensors that they read, and those that they write."""
    operators = torch.ops.ccnet_emulated
    results = operators.criss_cross_attention(*inputs)
    yield take_launches(), inputs, results
    upstream = torch.randn_like(results[0])
    gradients = operators.criss_cross_attention_backward(upstream, *inputs, *results[1:])
    yield take_launches(), [upstream, *inputs, *results[1:]], gradients


@needs_library
@pytest.mark.parametrize(
    ("dtype", "shape", "architecture"),
    [
        (torch.bfloat16, (1, 2, 3), "sm_80"),  # small tiles, two axes
        (torch.bfloat16, (1, 1, 70), "sm_90"),  # a large tile
        (torch.half, (1, 2, 3), "sm_89"),
        (torch.float32, (1, 2, 3), "sm_80"),
    ],
    ids=str,
)
def test_machine_code_has_the_results_of_the_emulated_source(dtype, shape, architecture):
    images, height, width = shape
    inputs = [x.to(dtype) for x in random_inputs(images, 24, 72, height, width).values()]
    inputs = [x.to(memory_format=torch.channels_last) for x in inputs]
    kernels = sass.kernels(LIBRARY, architecture)
    with emulated_gpu(counting=True) as take_launches:
        for launches, read, written in passes(inputs, take_launches):
            memory = sass.Memory([*read, *written])
            for x in written:
                memory.fill(x, 0xFF)
            for launch in launches:
                code, counted = kernels[sass.short(launch.kernel)], {x.first: x.counters for x in launch.alike}
                given = sass.Launch(launch.blocks, launch.threads, launch.shared_bytes, launch.parameters)
                for number in range(launch.blocks):
                    block = sass.run_block(code, given, number, memory)
                    if number in counted:
                        check_block(block, counted[number])
            for x in written:  # exp2 and 1/x are not of the same last bit
                found = torch.frombuffer(bytearray(memory.read(x)), dtype=x.dtype).as_strided(x.shape, x.stride())
                assert (found == x).double().mean() > 0.98 or x.dtype == torch.float32
                allowed = (2 if x.dtype == dtype != torch.float32 else 64) * torch.finfo(x.dtype).eps * x.abs().max()
                assert torch.allclose(found, x, rtol=0, atol=float(allowed)), (found - x).abs().max() / allowed


@needs_library
def test_machine_code_that_does_not_do_what_was_counted_is_an_error():
    inputs = [x.bfloat16() for x in random_inputs(1, 8, 8, 2, 3).values()]
    inputs = [x.to(memory_format=torch.channels_last) for x in inputs]
    with emulated_gpu(counting=True) as take_launches:
        (_, launch), _, results = next(passes(inputs, take_launches))  # of the second axis, which loads numbers too
    code = sass.kernels(LIBRARY, "sm_80")[sass.short(launch.kernel)]
    memory = sass.Memory([*inputs, *results])
    run_launch(launch, code, memory)
    for name in (*gpu_model.MARKERS, "loads", "stores", "load_addresses", "store_addresses"):
        counters, wrong = launch.alike[0].counters, 1
        if name in gpu_model.MAY_BE_LEFT_OUT:
            wrong = -1
            setattr(counters, name, getattr(counters, name) + 1)
            (one,) = run_launch(launch, code, memory)
            assert one.left_out == {name: 1}
            setattr(counters, name, getattr(counters, name) - 1)
        setattr(counters, name, getattr(counters, name) + wrong)
        with pytest.raises(sass.SassError, match=f"{name} is .* in its machine code, but the emulator counted"):
            run_launch(launch, code, memory)
        setattr(counters, name, getattr(counters, name) - wrong)


# ---- the model ----


def waits(code: str, from_memory: float = 1, threads: int = 32) -> gpu_model.Waits:
    (block,) = run(kernel(code), 1, threads, 64, sass.Memory([]), 1 << 20)
    return run_alone(block, A100, from_memory)


def test_a_warp_by_itself_by_hand():
    chain = "IADD3 R1, R1, 0x1, RZ\n"
    assert waits(chain * 10 + "EXIT").cycles == 1 + 9 * 4 + 1
    independent = "".join(f"IADD3 R{n}, R{n}, 0x1, RZ\n" for n in range(10))
    assert waits(independent + "EXIT").cycles == 1 + 9 * 2 + 1  # the unit takes 2 cycles for a warp
    load = "MOV R2, c[0x0][0x160]\nMOV R3, RZ\nLDG.E R4, [R2.64]\nIADD3 R5, R4, 0x1, RZ\nEXIT"
    alone = waits(load)
    assert alone.global_loads == A100.memory_latency - 1
    assert alone.exposed == 1
    assert waits(load, from_memory=0).global_loads == A100.l2_latency - 1
    off = waits(load.replace("LDG", "@!PT LDG"))
    assert (off.global_loads, off.exposed) == (0, 0)
    late = load.replace("IADD3", "NOP\n" * 100 + "IADD3")
    assert waits(late).global_loads == A100.memory_latency - 101
    copies = "LDGSTS.E.BYPASS.128 [RZ], [R2.64]\nLDGDEPBAR\nDEPBAR.LE SB0, 0x0\nEXIT"
    assert waits(copies).copies == A100.memory_latency - 2
    assert waits(copies.replace("0x0", "0x1")).copies == 0  # one group may be under way


def test_warps_wait_for_the_slowest_at_a_barrier():
    code = "S2R R0, SR_TID.X\nISETP.GE.AND P0, PT, R0, 0x20, PT\n@P0 BRA 0x60\n" + "NOP\n" * 3
    alone = waits(code + "BAR.SYNC 0x0\nEXIT", threads=64)
    by_one = waits(code + "BAR.SYNC 0x0\nEXIT")
    assert alone.cycles == by_one.cycles
    assert by_one.barriers == gpu_model.BARRIER


def test_blocks_on_a_multiprocessor():
    # 256 threads with 128 registers: two by registers; 80 KB of shared memory: two of 164 KB, one of 100 KB
    assert [gpu_model.blocks_at_once(gpu, 256, 80 << 10, 128) for gpu in GPUS] == [2, 2, 1]
    assert [gpu_model.blocks_at_once(gpu, 256, 0, 32) for gpu in GPUS] == [8, 8, 6]  # by warps
    assert [gpu_model.blocks_at_once(gpu, 32, 0, 16) for gpu in GPUS] == [32, 32, 24]
