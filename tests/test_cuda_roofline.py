"""The roofline by counting counts what it says, on little data."""

import ctypes
import itertools
import random
import sys

import pytest
import torch
from attention import assert_close, random_inputs
from emulation import emulated_library

from benchmarks import cuda_roofline, original_scheme
from benchmarks.criss_cross import bmm_attention
from benchmarks.fused_axes import fused_axes_attention
from benchmarks.gpu_model import GPUS
from benchmarks.original_scheme import ORIGINAL_KERNELS, OriginalTraffic
from benchmarks.traffic import Case, TensorTraffic, count_ours, count_plain, fewest
from cc_attention import native, reference

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not native.LOADED, reason="needs the native operators: pip install -e ."),
]


def on_emulator(kernel, a, b, out):
    original_scheme.emulate_original(kernel, a, b, out)
    return out


@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 40), (1, 2, 3, 33, 4), (1, 1, 2, 1, 5)], ids=str)
def test_the_original_scheme_is_the_reference(shape):
    inputs = {name: x.float() for name, x in random_inputs(*shape).items()}
    upstream = torch.randn_like(inputs["value"])
    out, weight = original_scheme.original_forward(on_emulator, **inputs)
    gradients = original_scheme.original_backward(on_emulator, upstream, **inputs, weight=weight)
    exact = {name: x.double().requires_grad_() for name, x in inputs.items()}
    expected = reference.criss_cross_attention(**exact)
    expected_gradients = torch.autograd.grad(expected, list(exact.values()), upstream.double())
    names = ("out", *(f"gradient of {name}" for name in inputs))
    assert_close(
        dict(zip(names, (out, *gradients), strict=True)),
        dict(zip(names, (expected.detach(), *expected_gradients), strict=True)),
        tolerance=1e-5,
    )


@pytest.mark.parametrize("kernel", ORIGINAL_KERNELS)
def test_bytes_of_the_original_are_linear_in_channels_and_images(kernel):
    height, width = 5, 37

    def count(images, channels):
        image = torch.zeros(images, channels, height, width)
        map_ = torch.zeros(images, height + width - 1, height, width)
        a, out = (image, map_) if kernel == "affinity" else (map_, image.clone())
        return original_scheme.emulate_original(kernel, a, image, out)

    one = count(1, 1)
    for images, channels in [(1, 2), (1, 3), (1, 8), (2, 1), (3, 2)]:
        counted = count(images, channels)
        assert counted.load_bytes == images * channels * one.load_bytes
        assert counted.store_bytes == images * channels * one.store_bytes
    eight, sixteen = count(1, 8), count(1, 16)  # 8 planes end with a sector
    assert sixteen.load_sectors == 2 * eight.load_sectors
    assert sixteen.store_sectors == 2 * eight.store_sectors
    # A step reads two operands and the result and writes that; what lanes have in common is read once.
    steps = height * width * (height + width - 1)
    assert one.store_bytes == 4 * steps
    assert 2 * 4 * steps < one.load_bytes < 3 * 4 * steps


def test_counts_of_the_original_are_those_of_all_its_channels_and_images():
    query, key, value = torch.zeros(2, 3, 5, 33), torch.zeros(2, 3, 5, 33), torch.zeros(2, 11, 5, 33)
    asked = []

    def run(kernel, a, b, out):
        asked.append(original_scheme.emulate_original(kernel, a, b, out))
        return out

    out, weight = original_scheme.original_forward(run, query, key, value)
    original_scheme.original_backward(run, out, query, key, value, weight)
    tensors = [x.to("meta") for x in (query, key, value)]
    with OriginalTraffic(5, 33) as traffic:
        out, weight = original_scheme.original_forward(traffic.run, *tensors)
        original_scheme.original_backward(traffic.run, out, *tensors, weight)
    assert traffic.loads == sum(x.load_bytes for x in asked)
    assert traffic.stores == sum(x.store_bytes for x in asked)
    assert traffic.load_sectors == pytest.approx(sum(x.load_sectors for x in asked), rel=0.01)
    # softmax reads and writes the map, its backward reads two and writes one; zeros for every result
    map_, images = 4 * 2 * (5 + 33 - 1) * 5 * 33, 4 * 2 * 5 * 33
    assert traffic.bytes == (2 + 3) * map_ + 2 * map_ + (2 * 3 + 2 * 11) * images


def test_tensor_traffic_by_hand():
    x, y = torch.empty(2, 3, device="meta"), torch.empty(3, 1, device="meta")

    def moved(function):
        with TensorTraffic() as traffic:
            function()
        return traffic.bytes

    assert moved(lambda: x.t()[1:].unsqueeze(0).detach()) == 0
    assert moved(lambda: torch.empty_like(x)) == 0
    assert moved(lambda: x + 1) == 24 + 24
    assert moved(lambda: x.add_(x.t().reshape(2, 3))) == (24 + 24) + (24 + 24 + 24)  # a copy, then in place
    assert moved(lambda: x.to(torch.bfloat16)) == 24 + 12
    assert moved(lambda: y.expand(3, 4).clone()) == 12 + 48
    assert moved(lambda: x @ y) == 24 + 12 + 8
    assert moved(lambda: torch.cat([x, x[:, :1]], 1)) == 24 + 8 + 32
    z = x.requires_grad_().softmax(1)
    assert moved(lambda: torch.autograd.grad(z, x, x.detach())) == 24 + 24 + 24


def test_bmm_multiplies_what_the_definition_does_and_the_pixel_itself_once_more():
    case = Case(2, 5, 7)
    bmm, least = count_plain(bmm_attention, case), fewest(case)
    assert bmm["forward"].flops == least["forward"].flops * (5 + 7) / (5 + 7 - 1)
    assert bmm["backward"].flops == 2 * bmm["forward"].flops


def test_fused_axes_multiply_queries_and_keys_in_every_head():
    case = Case(2, 5, 7)
    counts = count_plain(fused_axes_attention, case)
    pairs = 2 * 5 * 7 * (5 + 7)
    assert counts["forward"].flops == 2 * pairs * 8 * (64 + 64)  # values of 512 channels are 8 heads
    assert counts["backward"].flops == 2 * pairs * 8 * (3 * 64 + 2 * 64)


# The kernels that 97x97 and 128x256 launch, with few lines of each. What passes the cache is a matter of whole maps,
# and what the table says of it is printed, not asserted.
@pytest.mark.parametrize("case", [Case(1, 97, 5), Case(1, 5, 97), Case(1, 3, 256), Case(1, 128, 3)], ids=str)
def test_targets(case):
    results, _ = cuda_roofline.count([case], GPUS[:1])
    rows = list(cuda_roofline.reached_rows(results))
    assert len(rows) == 8
    for _, target, counted, reached in rows:
        assert reached == "yes" or "past L2" in target, f"{target}: {counted}"
    for contenders in results.values():
        assert contenders["fewest"].bytes <= contenders["ours"].memory[0] < contenders["bmm"].memory[0]
        assert contenders["bmm"].bytes < contenders["original, as written"].bytes


# Sectors that come from memory and go there, by an LRU list that is searched from end to end
def naive_cache(lines: int, sectors: list[int], stores: list[bool]) -> tuple[int, int]:
    cache: list[tuple[int, set, set]] = []  # line, valid and changed sectors; the one used last at the end
    loads = written = 0
    for sector, stored in zip(sectors, stores, strict=True):
        found = [entry for entry in cache if entry[0] == sector // 4]
        entry = found[0] if found else (sector // 4, set(), set())
        cache = [other for other in cache if other is not entry]
        if len(cache) == lines:
            written += len(cache.pop(0)[2])
        cache.append(entry)
        loads += not stored and sector not in entry[1]
        entry[1].add(sector)
        if stored:
            entry[2].add(sector)
    return loads, written + sum(len(changed) for _, _, changed in cache)


def cache(lines: int, sectors: list[int], stores: list[bool]) -> tuple[int, int]:
    result = (ctypes.c_uint64 * 2)()
    count = ctypes.c_int64(len(sectors))
    emulated_library().l2_run(
        ctypes.c_int64(128 * lines), (ctypes.c_uint64 * len(sectors))(*sectors), bytes(stores), count, result
    )
    return result[0], result[1]


def test_the_cache_is_the_naive_one():
    generator = random.Random(5)
    for lines, spread in itertools.product((1, 2, 7, 32), (4, 40, 400)):
        sectors = [min(int(generator.expovariate(1 / spread)), 3 * spread) for _ in range(500)]
        stores = [generator.random() < 0.4 for _ in sectors]
        assert cache(lines, sectors, stores) == naive_cache(lines, sectors, stores), (lines, spread)


def test_the_cache_by_hand():
    loads = [False] * 6
    assert cache(2, [0, 4, 0, 4, 1, 5], loads) == (4, 0)  # two lines fit; sectors are fetched one by one
    assert cache(2, [0, 4, 8, 0, 4, 8], loads) == (6, 0)  # three do not
    assert cache(2, [0, 0, 1, 4, 8], [True, False, True, False, False]) == (2, 2)  # what is stored is not fetched


def test_a_cache_that_holds_all_leaves_the_fewest_bytes():
    case = Case(1, 2, 33)
    large, small = (count_ours(case, cache_bytes=cache_bytes)[0] for cache_bytes in (1 << 30, 128))
    for what, least in fewest(case).items():
        (everything,), (almost_nothing,) = large[what].memory, small[what].memory
        # Written in the end: two numbers a pixel for the second axis; delta, its parts, and dP of whole fragments.
        scratch = 2 * 33 * (4 + 2 * 4) + 4 * 16 * 64 * (2 * 3 + 33 * 1) if what == "backward" else 2 * 33 * 2 * 4
        ends = 32 * 12  # tensors need not begin with a sector
        assert least.bytes <= everything <= least.bytes + scratch + ends
        assert almost_nothing > 2 * least.bytes


def test_tensors_through_a_cache_by_hand():
    x, y = torch.empty(100, device="meta"), torch.empty(200, device="meta")
    with TensorTraffic([1199, 1200, 5000]) as traffic:
        y + 1  # reads y: since then 800 bytes of the result and y itself
        y.sum()
    assert traffic.memory == [800 + 800 + 800 + 4, 800 + 800 + 800 + 4, 800 + 800 + 4]
    with TensorTraffic([1199, 1200]) as traffic:
        x.neg_()
        y.sum()
        x.sum()  # since then y, the sum of it and x itself: 400 + 800 + 4 + 400
    assert traffic.memory[0] == traffic.memory[1]


def test_the_command_prints_all_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cuda_roofline", "--cases", "1x2x3", "--gpus", "A100"])
    cuda_roofline.main()
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| 1x512x2x3 backward")]
    launches = 0 if "No instructions and times of ours" in printed else 4
    # counts, instructions by launch and by line, times of launches, times, targets
    assert len(rows) == 6 + (launches + (launches > 0)) + launches + 5 + 4
    assert "| original, as written |" in printed
