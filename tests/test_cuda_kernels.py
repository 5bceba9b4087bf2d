"""The CUDA kernels in the emulator (cuda_emulator/): what only there can be chosen or seen. Their results are compared
with the reference by test_criss_cross_native.py, whose tests run them in the emulator too."""

import ctypes
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from attention import (
    DTYPES,
    TOLERANCE,
    assert_attention_as_reference,
    assert_close,
    assert_explicit_form_as_reference,
    assert_same_bits,
    everything,
    random_inputs,
    rounded_to_tf32,
    run,
    tf32,
)
from emulation import EMULATOR, ROOT, compile_with_emulator, emulated_gpu
from torch.utils._python_dispatch import TorchDispatchMode

from cc_attention import CrissCrossAttention, criss_cross_attention, native, reference
from libs import ABN

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not native.LOADED, reason="needs the native operators: pip install -e ."),
]

SIXTEEN_BITS = [torch.bfloat16, torch.float16]
DEVICES = {
    "sm_75": {"shared_bytes": 64 * 1024, "architecture": 75},
    "sm_80": {"shared_bytes": 163 * 1024},
    "sm_86": {"shared_bytes": 99 * 1024},
}


# ---- order of threads, devices, sizes ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_every_order_of_threads_and_blocks(dtype):
    inputs = {name: x.to(dtype) for name, x in random_inputs(1, 16, 40, 5, 33).items()}
    in_3d = {name: x.to(dtype) for name, x in random_inputs(1, 9, 33, 2, 3, 13).items()}
    results = []
    for order, seed in [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)]:
        with emulated_gpu(order=order, seed=seed):
            results.append(list(everything(inputs, in_3d)))
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 40, 20, 30), (3, 19, 7, 5)], ids=str)
def test_same_bits_of_batch_norm_in_every_order(shape, dtype):
    x, grad_z = torch.randn(2, *shape).to(dtype)
    numbers = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, *running = torch.randn(4, shape[1]).to(numbers)
    ops = torch.ops.ccnet
    results = []
    for order in ("forward", "reverse", "random"):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            laid_out_x, laid_out_grad = (tensor.contiguous(memory_format=memory_format) for tensor in (x, grad_z))
            with emulated_gpu(order=order):
                found = [ops.abn_statistics(laid_out_x)]
                updated = [statistics.abs() for statistics in running]
                normaliser = ops.abn_normaliser_of_batch_(laid_out_x, *updated, 0.1, 1e-5)
                for activation in ("leaky_relu", "relu"):
                    constants = (weight, bias, None, 1e-5, activation, 0.01)
                    z = ops.abn_forward(laid_out_x, normaliser, *constants)
                    kept = (laid_out_x, None) if activation == "relu" else (None, z)
                    kept = (*kept, laid_out_grad, normaliser)
                    found += [
                        z,
                        *ops.abn_backward_sums(*kept, *constants),
                        *ops.abn_backward_of_batch(*kept, *constants),
                    ]
            results.append(list(enumerate([*found, *updated, normaliser])))
    assert_same_bits(results[::2])
    assert_same_bits(results[1::2])


def batch_norm_layer(activation, training=True):
    """Forward and backward, with a residual, on an emulated GPU: the launches, and the operators that PyTorch ran."""
    module = ABN(40, activation=activation).train(training)
    images = [torch.randn(2, 40, 70, 70, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)] * 3
    x, residual, upstream = (tensor.clone().requires_grad_() for tensor in images)
    with emulated_gpu(counting=True) as take_launches, OperatorNames() as names:
        z = module(x, residual)
        torch.autograd.backward(z, upstream.detach(), inputs=[x, residual, *module.parameters()])
        return take_launches(), names.seen


class OperatorNames(TorchDispatchMode):
    """The operators that PyTorch runs, but for those that make tensors without touching their elements."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.name() != "aten::detach":
            self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["leaky_relu", "relu"])
def test_a_layer_of_batch_norm_is_five_launches(activation):
    """With running statistics and the gradients of the parameters; and no operator of PyTorch's own."""
    launches, names = batch_norm_layer(activation)
    assert names == ["ccnet::abn_normaliser_of_batch_", "ccnet::abn_forward", "ccnet::abn_backward_of_batch"]
    assert len(launches) == 5
    # x twice, the residual; x or z, grad_z and the other of z and the residual, twice: no more is read than that
    tensor = 2 * 40 * 70 * 70 * 2
    assert 9 * tensor < sum(launch.counters.load_bytes for launch in launches) < 9.5 * tensor
    assert 3 * tensor < sum(launch.counters.store_bytes for launch in launches) < 3.1 * tensor


def test_a_layer_with_frozen_statistics_is_five_launches():
    launches, names = batch_norm_layer("relu", training=False)
    assert names == [
        "ccnet::abn_normaliser_of_running",
        "ccnet::abn_forward",
        "ccnet::abn_backward_sums",
        "ccnet::abn_backward",
    ]
    assert len(launches) == 5


def test_synchronised_batch_norm_merges_in_one_launch():
    """What processes have gathered; the rest of a layer is as many launches as alone, and two for sums to exchange."""
    running = torch.zeros(2, 40).unbind()
    x = torch.randn(2, 40, 9, 9)
    with emulated_gpu(counting=True) as take_launches:
        own = torch.ops.ccnet.abn_statistics(x)
        assert len(take_launches()) == 2
        normaliser = torch.ops.ccnet.abn_normaliser_of_parts_(own.expand(8, 3, 40).contiguous(), *running, 0.1, 1e-5)
        assert len(take_launches()) == 1
        options = (None, None, None, 1e-5, "identity", 0.01)
        sums, *_ = torch.ops.ccnet.abn_backward_sums(None, x, x, normaliser, *options)
        assert len(take_launches()) == 2
        torch.ops.ccnet.abn_backward(None, x, x, normaliser, sums, *options)
        assert len(take_launches()) == 1


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("length", [97, 150])
def test_same_bits_in_every_order_where_a_block_has_a_long_line(dtype, length):
    inputs = {name: x.to(dtype) for name, x in random_inputs(1, 64, 72, 2, length).items()}
    upstream = torch.randn(inputs["value"].shape).to(dtype)
    results = []
    for order in ("forward", "reverse", "random"):
        with emulated_gpu(order=order):
            out, largest, sum_ = torch.ops.ccnet_emulated.criss_cross_attention(*inputs.values())
            gradients = torch.ops.ccnet_emulated.criss_cross_attention_backward(
                upstream, *inputs.values(), largest, sum_
            )
            results.append(list(enumerate([out, largest, sum_, *gradients])))
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_of_every_device(device, dtype):
    """How much shared memory there is, and whether tensor cores know bfloat16, chooses among kernels."""
    with emulated_gpu(**DEVICES[device]):
        assert_attention_as_reference(random_inputs(1, 64, 72, 2, 97, scale=0.4), dtype)
        assert_explicit_form_as_reference(random_inputs(1, 24, 40, 135, 2, scale=0.5), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_same_bits_on_every_device_of_a_kind(dtype):
    """How many images are worked on at a time, and how many blocks share a line's values, changes no result."""
    inputs = {name: x.to(dtype) for name, x in random_inputs(3, 8, 264, 5, 9, residual=True).items()}
    upstream = torch.randn(inputs["value"].shape).to(dtype)
    results = []
    for properties in ({}, {"cache_bytes": 1}, {"cache_bytes": 100_000}, {"multiprocessors": 1}):
        with emulated_gpu(**properties):
            results.append(list(run(criss_cross_attention, inputs, upstream).items()))
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 5, 29, 33, 97])
def test_lengths_off_the_tiles(length, dtype):
    for c, cv in ((8, 16), (7, 9)):  # rows of whole packs of 16 bytes, and not
        assert_attention_as_reference(random_inputs(1, c, cv, 2, length, scale=0.5), dtype)
        assert_explicit_form_as_reference(random_inputs(1, c, cv, length, 2, scale=0.5), dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize(
    ("c", "cv", "pixels"),
    [
        (64, 136, (3, 129)),  # one pixel beyond a tile, a slice of values and a part of one
        (64, 64, (256, 2)),  # the longest, as the second axis
        (8, 8, (2, 3, 200)),
        (72, 8, (2, 150)),  # more channels than are kept: the tiled kernel
        (60, 8, (2, 150)),  # rows that are not whole packs: the tiled kernel
        (64, 64, (2, 257)),  # longer than a whole line may be: the tiled kernel
    ],
)
def test_whole_lines_and_what_is_beyond_them(c, cv, pixels, dtype):
    assert_attention_as_reference(random_inputs(1, c, cv, *pixels, scale=0.4), dtype)


def test_offsets_beyond_two_to_the_31():
    """The last of so many images that the map has more elements than that; only its blocks run, the rest is virtual."""
    height, width, channels = 16, 8, 520
    images = 2**31 // (height * width * channels) + 2

    def batch(channels, scale):
        zeros = np.zeros((images, height, width, channels), dtype=np.int16)  # NumPy's take memory when they are written
        x = torch.from_numpy(zeros).view(torch.bfloat16).permute(0, 3, 1, 2)
        x[-1] = scale * torch.randn(channels, height, width)
        return x

    query, key, value, grad_out = batch(8, 0.4), batch(8, 0.4), batch(channels, 1), batch(channels, 1)
    assert value[-1].storage_offset() > 2**31
    ops = torch.ops.ccnet_emulated
    with emulated_gpu(last_blocks=16, cache_bytes=2**31 - 1):  # of rows and of columns, of two images
        out, *path = ops.criss_cross_attention(query, key, value)
        gradients = ops.criss_cross_attention_backward(grad_out, query, key, value, *path)[:3]
    last = {"query": query[-1:], "key": key[-1:], "value": value[-1:]}
    expected = run(reference.criss_cross_attention, {k: x.double() for k, x in last.items()}, grad_out[-1:].double())
    actual = dict(zip(expected, [out[-1:], *(x[-1:] for x in gradients)], strict=True))
    assert_close(actual, expected, TOLERANCE[torch.bfloat16])


# ---- float32 as TF32 ----


def test_tf32_is_used_where_it_is_allowed():
    """In all kernels, without bank conflicts. And otherwise every bit is as without it: on sm_75, in other dtypes."""
    inputs = random_inputs(1, 9, 8, 2, 9, scale=0.4)
    in_3d = random_inputs(1, 5, 4, 1, 2, 3)

    def results(dtype, allowed, architecture=80):
        tensors = [{name: x.to(dtype) for name, x in some.items()} for some in (inputs, in_3d)]
        setting = tf32("fp32_precision") if allowed else nullcontext()
        with emulated_gpu(architecture=architecture, counting=True) as take_launches, setting:
            return list(everything(*tensors)), [x.counters for x in take_launches() if "LineAttention" in x.kernel]

    plain, counters = results(torch.float32, allowed=False)
    assert all(x.mma == 0 for x in counters)
    _, counters = results(torch.float32, allowed=True)
    assert all(x.mma > 0 and x.shared_conflicts == x.ldmatrix_conflicts == 0 for x in counters)
    for dtype, architecture in ((torch.float32, 75), (torch.float64, 80), (torch.bfloat16, 80)):
        without = plain if dtype == torch.float32 else results(dtype, allowed=False)[0]
        assert_same_bits([results(dtype, True, architecture)[0], without])


def test_compiled_code_follows_the_setting_of_tf32_and_exported_code_keeps_it():
    module, x = CrissCrossAttention(16), torch.randn(1, 16, 3, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def uses_tf32(function):
        with emulated_gpu(counting=True) as take_launches:
            out = function(x)
            forward = sum(launch.counters.mma for launch in take_launches())
            out.sum().backward()
            backward = sum(launch.counters.mma for launch in take_launches())
        assert (forward > 0) == (backward > 0)
        return forward > 0

    assert not uses_tf32(compiled)
    without = torch.export.export(module, (x,)).module()
    with tf32("fp32_precision"):
        assert uses_tf32(compiled)
        within = torch.export.export(module, (x,)).module()
        assert not uses_tf32(without)
    assert not uses_tf32(compiled)
    assert uses_tf32(within)


def test_same_bits_of_tf32_in_every_order_of_threads_and_blocks():
    inputs = {name: x.float() for name, x in random_inputs(1, 9, 40, 2, 70).items()}
    in_3d = {name: x.float() for name, x in random_inputs(1, 5, 4, 1, 2, 3).items()}
    results = []
    for order in ("forward", "reverse", "random"):
        with emulated_gpu(order=order), tf32("fp32_precision"):
            results.append(list(everything(inputs, in_3d)))
    assert_same_bits(results)


# ---- the wrappers of tensor-core instructions, by the tables of the PTX ISA ----
# "Matrix Fragments for mma.m16n8k16 with floating point type", for sm_75 and TF32 "... for mma.m16n8k8"; "ldmatrix".
# Elements are numbered in their registers from the lower half of the first one on.


def a_fragment(lane, i):
    """(row, column) of the i-th of 8 elements of A."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_fragment(lane, i):
    """(row, column) of the i-th of 4 elements of B."""
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c_fragment(lane, i):
    """(row, column) of the i-th of 4 elements of C and D."""
    group, thread = lane >> 2, lane % 4
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def tf32_a_fragment(lane, i):
    """(row, column) of the i-th of 4 elements of A in TF32."""
    return (lane >> 2) + (8 if i in (1, 3) else 0), lane % 4 + (4 if i >= 2 else 0)


def tf32_b_fragment(lane, i):
    """(row, column) of the i-th of 2 elements of B in TF32."""
    return lane % 4 + 4 * i, lane >> 2


def in_registers(matrix, fragment, count):
    """What each lane has of a matrix: [32, count] elements."""
    elements = [[matrix[fragment(lane, i)] for i in range(count)] for lane in range(32)]
    return torch.stack([torch.stack(row) for row in elements]).contiguous()


@pytest.fixture(scope="module")
def fragments():
    return ctypes.CDLL(str(compile_with_emulator("fragments.so", [EMULATOR / "fragments.cpp"], link="-shared")))


def pointer(x):
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_mma_has_the_layout_of_the_isa(fragments, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    d = in_registers(c, c_fragment, 4)
    left, right = in_registers(a, a_fragment, 8), in_registers(b, b_fragment, 4)
    assert fragments.run_mma(int(dtype == torch.float16), pointer(left), pointer(right), pointer(d)) == 0
    expected = in_registers(a.float() @ b.float() + c, c_fragment, 4)
    torch.testing.assert_close(d, expected, atol=1e-5, rtol=1e-5)


def test_mma_of_tf32_has_the_layout_of_the_isa(fragments):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    d = in_registers(c, c_fragment, 4)
    left, right = in_registers(a, tf32_a_fragment, 4), in_registers(b, tf32_b_fragment, 2)
    assert fragments.run_mma_tf32(pointer(left), pointer(right), pointer(d)) == 0
    expected = in_registers(rounded_to_tf32(a) @ rounded_to_tf32(b) + c, c_fragment, 4)
    torch.testing.assert_close(d, expected, atol=1e-5, rtol=1e-5)


def test_two_halves_of_mma_on_sm_75_have_the_same_layout():
    """m16n8k8 has A as rows group, group, group + 8, group + 8 and B as rows thread * 2 + i: each half of ours."""
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for half in range(2):
            for i in range(4):
                expected = (group if i < 2 else group + 8, thread * 2 + (i & 1) + 8 * half)
                assert a_fragment(lane, 4 * half + i) == expected
            for i in range(2):
                assert b_fragment(lane, 2 * half + i) == (thread * 2 + i + 8 * half, group)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_has_the_layout_of_the_isa(fragments, transposed):
    """Lane l gives the address of row l % 8 of matrix l / 8, and gets of each row l / 4 the elements l % 4 * 2, + 1."""
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    x = torch.zeros(32, 4, 2, dtype=torch.int16)
    rows = torch.zeros(64, 8, dtype=torch.int16)
    rows = rows[(-rows.data_ptr() // 16) % 2 :][:32]  # whatever PyTorch aligns to, 16 bytes
    rows.copy_(matrices.view(32, 8))
    assert fragments.run_ldmatrix(int(transposed), pointer(rows), pointer(x)) == 0
    for lane in range(32):
        for matrix in range(4):
            source = matrices[matrix].T if transposed else matrices[matrix]
            assert x[lane, matrix].tolist() == source[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()


def test_operands_of_the_instructions_are_in_the_order_of_the_isa():
    """D, A, B, C; and of sm_75's halves, A's first two registers and B's first, then the others."""
    text = (ROOT / "libs/csrc/cuda/primitives.cuh").read_text()
    sums = ["d0", "d1", "d2", "d3"]
    whole = re.findall(r'"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(\w+)\.\1\.f32 ([^"]*)"\s*(:[^;]*);', text)
    assert [kind for kind, _, _ in whole] == ["f16", "bf16"]
    for _, operands, bound in whole:
        assert operands == "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        assert re.findall(r'"\+?[fr]"\((.*?)\)', bound) == [*sums, "a[0]", "a[1]", "a[2]", "a[3]", "b0", "b1"]
    halves = re.findall(r'"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.f16\.f16\.f32 ([^"]*)"\s*(:[^;]*);', text)
    assert [operands for operands, _ in halves] == ["{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"] * 2
    bound = [re.findall(r'"\+?[fr]"\((.*?)\)', part) for _, part in halves]
    assert bound == [[*sums, "a[0]", "a[1]", "b0"], [*sums, "a[2]", "a[3]", "b1"]]
    of_tf32 = re.findall(r'"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32 ([^"]*)"\s*(:[^;]*);', text)
    assert [operands for operands, _ in of_tf32] == ["{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"]
    assert re.findall(r'"\+?[fr]"\((.*?)\)', of_tf32[0][1]) == [*sums, "a[0]", "a[1]", "a[2]", "a[3]", "b0", "b1"]
    assert set(re.findall(r"ldmatrix\.\S+", text)) == {
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    }


def test_kernel_sources_keep_the_rules_of_the_emulator():
    """What it cannot run or would not see is only in primitives.cuh."""
    for path in [*(ROOT / "libs/csrc/cuda").iterdir(), *(ROOT / "cc_attention/csrc/cuda").iterdir()]:
        if path.name != "primitives.cuh":
            found = re.findall(r"\basm\b|__CUDA_ARCH__|<<<|__shared__|__activemask|\batomic\w+", path.read_text())
            assert not found, f"{path.name}: {found}"
