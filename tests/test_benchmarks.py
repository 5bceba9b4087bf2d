"""The benchmarks do what they say, on little data."""

import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from programs import ROOT
from targets import ALL_CAPABILITIES, best_capability, capability, running_on

from benchmarks import context, cost, criss_cross, fused_axes, inplace_abn, loading, measuring, peak, train_step, volume
from cc_attention import reference
from dataset import IGNORE_LABEL
from dataset.scenes import make_scene
from libs import InPlaceABN


def test_the_loaders_compared_give_the_same_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loading", "--images", "1", "--epochs", "1"])
    loading.main()
    assert capsys.readouterr().out.count("x |") == 3

    def other(item, key):
        return np.zeros((3, 769, 769), np.float32), np.zeros((769, 769), np.uint8)

    items = loading.generate(tmp_path, 1)
    with pytest.raises(SystemExit, match="other gives other samples than ours"):
        loading.check_same({"ours": loading.crop_first(items), "other": other}, items)


def test_benchmarks_of_the_operators_need_pytorch_alone():
    """Not the packages of training: the operators are used, tested and measured without them."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['PIL', 'cv2', 'torchvision', 'tensorboardX', 'tqdm']))\n"
        "import benchmarks.criss_cross, benchmarks.cuda_roofline, benchmarks.fused_axes, benchmarks.inplace_abn"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_turns_begin_with_each_in_turn():
    order: list[str] = []
    works = {name: lambda name=name: order.append(name) for name in "abc"}
    assert measuring.take_turns(works, repeats=3, seconds=1).keys() == works.keys()
    assert "".join(order) == "bca" + "cab" + "abc" + "bca"  # the first warms up


@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
def test_the_attentions_compared_agree(layout):
    case = criss_cross.Case((5, 7), torch.float32, layout)
    assert case.value.is_contiguous() == (layout == "NCHW")
    case.check(criss_cross.CONTENDERS, torch.float32)
    with pytest.raises(SystemExit, match=r"other: result differs by .*: no times are printed"):
        case.check({"other": criss_cross.non_local_attention}, torch.float32)


@pytest.mark.parametrize("size", [(2, 5, 7), (1, 1, 9), (1, 9, 1), (1, 33, 40)], ids=str)
def test_fused_axes_are_the_definition(size):
    n, height, width = size
    inputs = {
        name: torch.randn(n, channels, height, width, dtype=torch.float64, requires_grad=True)
        for name, channels in {"query": 8, "key": 8, "value": 32}.items()
    }
    upstream = torch.randn(n, 32, height, width, dtype=torch.float64)
    out, expected = (
        attention(*inputs.values()) for attention in (fused_axes.fused_axes_attention, reference.criss_cross_attention)
    )
    torch.testing.assert_close(out, expected)
    gradients = (torch.autograd.grad(x, list(inputs.values()), upstream) for x in (out, expected))
    for name, actual, right in zip(inputs, *gradients, strict=True):
        torch.testing.assert_close(actual, right, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("name", ALL_CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_loop_of_the_peak_makes_the_multiply_adds_that_it_counts(name, dtype):
    vector_bytes = {"baseline": 16, "avx2": 32}.get(name, 64)
    sums = 24 if vector_bytes == 64 else 12
    numbers = 2 if name == "avx512_bf16" and dtype == torch.bfloat16 else 1
    lanes = vector_bytes // (8 if dtype == torch.float64 else 4)
    with running_on(name):
        loop = peak.Peak(dtype, iterations=1000)
        loop()
    assert loop.multiply_adds == torch.get_num_threads() * 1000 * sums * lanes * numbers
    assert loop.rate > 0


def test_the_limit_is_the_count_at_the_peak():
    case, loop = criss_cross.Case((5, 7), torch.float32, "NCHW"), peak.Peak(torch.float32, iterations=1)
    loop.rate = 1e6
    flops = 2 * 35 * 11 * (64 + 512)  # pixels, path, channels
    assert criss_cross.limit_in_ms(case, "forward", {}, loop, {}, {}) == pytest.approx(1e3 * flops / 2e6)
    assert criss_cross.limit_in_ms(case, "forward", {}, None, {}, {}) is None


def test_loops_of_all_instruction_sets_are_compiled():
    for name in ALL_CAPABILITIES[:3] if platform.machine() == "x86_64" else ["baseline"]:
        assert hasattr(peak.library(), f"peak_{name}_float32")
        assert hasattr(peak.library(), f"peak_{name}_float64")
    assert hasattr(peak.library(), "peak_avx512_bf16_bfloat16") == (platform.machine() == "x86_64")


def test_the_peak_of_an_instruction_set_that_the_cpu_lacks_is_refused():
    if best_capability() == ALL_CAPABILITIES[-1]:
        pytest.skip("this CPU has them all")
    with capability(ALL_CAPABILITIES[-1]), pytest.raises(RuntimeError, match="this CPU has no more than"):
        peak.Peak(torch.float32)


def test_without_a_compiler_there_is_no_limit(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(peak, "library", peak.library.__wrapped__)  # as if it had not been compiled
    with pytest.raises(peak.NoCompiler, match="there is no program no-such-compiler"):
        peak.library()
    assert criss_cross.cpu_peak(torch.float32, "cpu") is None


@pytest.fixture
def output_of(monkeypatch, capsys):
    """Runs a benchmark with the given flags in this process, whose memory stays as it is; returns what it prints."""
    monkeypatch.setattr(measuring, "keep_freed_memory", lambda: None)
    threads = torch.get_num_threads()

    def run(benchmark, flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, *flags.split()])
        benchmark.main()
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_benchmark_of_attention_runs(output_of, monkeypatch):
    """And its operator keeps less memory than one attention map."""
    measured = {"ours": criss_cross.criss_cross_attention, "bmm": criss_cross.bmm_attention}  # each in a process
    monkeypatch.setattr(criss_cross, "ATTENTIONS", measured)
    flags = "--sizes 33x40 --dtypes float32 --layouts channels_last --threads 1 --repeats 1 --no-compile --scaling 8"
    out = output_of(criss_cross, flags)
    assert out.count("| 33x40 float32") == 3
    row = next(line for line in out.splitlines() if line.startswith("| 33x40 float32 | channels_last"))
    one_map, ours, *others = (float(cell) for cell in row.split("|")[3:-1])
    assert ours < one_map < min(others)


@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
def test_the_batch_norms_compared_agree(layout):
    case = inplace_abn.Case((2, 5, 7, 6), torch.float32, layout)
    norms = {name: case.norm(kind) for name, kind in {"ours": InPlaceABN, **inplace_abn.CONTENDERS}.items()}
    case.check({name: (norm, norm) for name, norm in norms.items()}, torch.float32)
    other = case.norm(torch.nn.BatchNorm2d)
    with pytest.raises(SystemExit, match=r"other: result differs by .*: no times are printed"):
        case.check({"ours": (norms["ours"], norms["ours"]), "other": (other, other)}, torch.float32)


@pytest.mark.slow
def test_the_benchmark_of_batch_norm_runs(output_of):
    flags = "--sizes 2x16x9x9 --dtypes float32 --threads 1 --repeats 1 --no-compile --network-side 33"
    out = output_of(inplace_abn, flags)
    assert out.count("| 2x16x9x9 float32") == 4
    assert out.count("| CCNet-101, 2x3x33x33 |") == 3


@pytest.mark.slow
def test_the_benchmark_of_training_and_evaluation_runs(output_of, monkeypatch):
    in_new_processes = []
    measure = train_step.bytes_from_a_new_process
    monkeypatch.setattr(train_step, "bytes_from_a_new_process", lambda *rest: in_new_processes.append(rest) or 1e6)
    flags = (
        "--backbone resnet18 --crops 65 --batch-size 2 --dtypes float32 --image 65x97 --tile 65 --ohem --ohem-crops 65 "
        "--threads 1 --repeats 1 --seconds 0.1"
    )
    out = output_of(train_step, flags)
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if "| float32 |" in line}
    assert rows.keys() == {"2x3x65x65", "65x97", "2x19x65x65"}
    assert re.fullmatch(r" [\d.]+ \([\d.]+x\) ", rows["2x19x65x65"][-1])  # of the table that is last
    for name in ("2x3x65x65", "65x97"):
        assert all(float(cell.strip().rstrip("x")) > 0 for cell in rows[name][1:]), rows[name]
    assert [arguments[2:4] for arguments in in_new_processes] == [
        (part, kind) for part in ("step", "evaluation") for kind in train_step.KINDS
    ]
    assert measure(*in_new_processes[1]) > 1e6


def test_a_contender_that_differs_is_refused():
    arguments = SimpleNamespace(backbone="resnet18", recurrence=2, batch_size=2, device="cpu", ohem=False)
    plain, ours = (train_step.Training(arguments, kind, 65, torch.float32) for kind in train_step.KINDS)
    expected = plain.results()
    train_step.check("ours", ours.results(), expected, torch.float32)
    with torch.no_grad():
        ours.network.head.cca.gamma.fill_(1)
    with pytest.raises(SystemExit, match=r"ours: main logits differs by .*: no times are printed"):
        train_step.check("ours", ours.results(), {"main logits": expected["main logits"]}, torch.float32)


def test_the_plain_form_is_of_pytorchs_own_modules():
    network = train_step.plain_network("resnet18", 2)
    assert {type(m).__module__.split(".")[0] for m in network.modules() if not list(m.children())} == {"torch"}
    assert all(p.is_contiguous() for p in network.parameters())
    assert not any(p.stride() == (c := p.shape[1], 1, c, c) and c > 1 for p in network.parameters() if p.dim() == 4)


def test_without_attention_the_cue_is_out_of_reach():
    """No derivative of a counted pixel's logits at the cue, which a head without context cannot see."""
    reach = context.reach_without_attention()
    network = context.ShallowNetwork("none").eval()
    for number in range(5):
        scene = make_scene(96, 96, np.random.default_rng(number))
        counted = torch.from_numpy(context.out_of_reach(scene, reach))
        assert counted.any()
        image = torch.rand(1, 3, 96, 96, requires_grad=True)
        (gradient,) = torch.autograd.grad((network(image)[0] * counted).abs().sum(), image)
        cue = scene.cue
        assert (gradient[0, :, cue.top : cue.bottom, cue.left : cue.right] == 0).all()
        assert (gradient != 0).any()


@pytest.mark.slow
def test_two_passes_learn_what_none_can():
    _, images, labels = context.make_scenes(0, 400)
    _, test_images, test_labels = context.make_scenes(1, 50)
    counted = test_labels != IGNORE_LABEL
    accuracy = {}
    for head, steps in (("none", 10), ("R=2", 90)):  # that none cannot is proven above, whatever it is trained
        torch.manual_seed(0)
        network = context.ShallowNetwork(head)
        context.train(network, images, labels, steps, batch_size=16)
        accuracy[head] = context.accuracy(network, test_images, test_labels, counted)
    assert accuracy["R=2"] > 0.9
    assert 0.35 < accuracy["none"] < 0.65


def test_the_papers_operations_are_counted():
    """Published in GFLOPs for an image of 769x769; of two numbers for a pixel and its own row, one is not needed."""
    for name, published in (("R=1", 8.3), ("R=2", 16.5), ("nonlocal", 108)):
        assert cost.gflops("context", name, (97, 97), 2048) == pytest.approx(published, abs=0.5)


@pytest.mark.slow
def test_the_benchmark_of_cost_runs(output_of, tmp_path, monkeypatch):
    in_new_processes = []
    measure = cost.bytes_from_a_new_process
    monkeypatch.setattr(cost, "bytes_from_a_new_process", lambda *rest: in_new_processes.append(rest) or 1e6)
    names = ["R=1", "nonlocal", "none"]
    flags = f"--sizes 5x6 --features 128 --repeats 1 --plotted-sides 3 --output {tmp_path / 'cost.png'}"
    context_alone, heads = output_of(cost, f"--names {' '.join(names)} {flags}").split("whole heads, 1x128x5x6")
    assert "context alone, 1x32x5x6" in context_alone
    assert re.findall(r"^\| (\S+) \|(?= \d)", context_alone, re.MULTILINE) == ["R=1", "nonlocal"]
    assert re.findall(r"^\| (\S+) \|(?= \d)", heads, re.MULTILINE) == names
    assert (tmp_path / "cost.png").exists()
    memory_of = [rest[rest.index("--memory-of") + 1 :] for rest in in_new_processes]
    tables = [("context", name) for name in ("R=1", "nonlocal")] + [("head", name) for name in names]
    expected = [(*each, 5, 6, which) for each in tables for which in cost.PASSES]
    assert memory_of == expected + [("context", name, 3, 3, "forward+backward") for name in ("R=1", "nonlocal")]
    for number in (1, 8):  # of a criss-cross, and a plain head
        assert measure(*in_new_processes[number]) > 0


@pytest.mark.parametrize("position", [(0, 0, 0), (1, 3, 2)])
@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_each_pass_reaches_one_coordinate_more(recurrence, position):
    reached = volume.influence((3, 4, 5), recurrence, position)
    differing = sum(
        (torch.arange(length) != own).reshape([-1 if axis == i else 1 for i in range(3)]).long()
        for axis, (length, own) in enumerate(zip((3, 4, 5), position, strict=True))
    )
    assert torch.equal(reached, differing <= recurrence)


def test_the_benchmark_of_a_volume_runs(output_of):
    out = output_of(volume, "--sizes 3x4x5 --repeats 1 --threads 1")
    assert "| 3x4x5 | 60 | 10 (16.7%) | 36 (60.0%) | 60 (100.0%) |" in out
    assert all(f"\n| 3x4x5 | {name} | 0.00 | 0.0 | " in out for name in ("R=1", "R=2", "R=3", "full"))
    assert volume.weights_of((3, 4, 5), 3) == 60 * 10
    assert volume.weights_of((3, 4, 5), None) == 60 * 60


def test_the_operations_in_a_volume_are_counted():
    size, channels = (3, 4, 5), volume.CHANNELS
    convolutions = 2 * 60 * channels * (channels + 2 * channels // 8)
    products = 2 * 60 * (channels + channels // 8)
    assert volume.gflops(size, 2) == pytest.approx(2e-9 * (convolutions + products * (3 + 4 + 5)))
    assert volume.gflops(size, None) == pytest.approx(1e-9 * (convolutions + products * 60))
