"""Runs of several real processes, over gloo: what they compute together, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import ROOT, run_script, script_program
from test_train import events

import train
from dataset import scan
from networks import build_model
from utils import launch as launching
from utils.checkpoint import training_steps
from utils.commandline import CommandError
from utils.distributed import World
from utils.launch import find_devices, launch

SMALL = ["--device", "cpu", "--backbone", "resnet18", "--num-workers", 0]
TRAIN = [*SMALL, "--input-size", "24,32", "--batch-size", 6, "--random-mirror", "--random-scale"]
# In float64 rounding does not grow, over the steps, to where one could not tell it from a fault.
IN_FLOAT64 = """
torch.set_default_dtype(torch.float64)
real_sample = train.TrainingSet.__getitem__
def sample_in_float64(self, key):
    sample = real_sample(self, key)
    return sample | {"image": sample["image"].double()}
train.TrainingSet.__getitem__ = sample_in_float64
"""


def at_step(step, action, rank=1):
    """Code that does `action` in the process of that rank when it begins the step."""
    return f"""
real_rate = train.poly_learning_rate
def acting(base, now, *rest):
    if now == {step} and (dist.get_rank() if dist.is_initialized() else 0) == {rank}:
        {action}
    return real_rate(base, now, *rest)
train.poly_learning_rate = acting
"""


def training(tmp_path, scenes, name, flags, code=""):
    return run_script("train", in_folder(tmp_path, scenes, name, flags), code=code)


def trainings(tmp_path, scenes, runs, code=""):
    """Several runs by name, until one fails; that of one process has to be the last."""
    flags = (in_folder(tmp_path, scenes, str(name), flags) for name, flags in runs.items())
    return run_script("train", *flags, code=code)


def in_new_processes(tmp_path, script, flags, code="", torchrun=0):
    """As a user starts it: in a new process, which starts new ones by --procs, or in those of torchrun."""
    path = tmp_path / "program.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + script_program(script, (flags,), code))
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    return subprocess.run(
        [*(runner if torchrun else [sys.executable]), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        timeout=300,
    )


def in_folder(tmp_path, scenes, name, flags):
    return [*TRAIN, "--data-dir", scenes, "--snapshot-dir", tmp_path / name, *flags]


def weights(folder, step):
    return torch.load(folder / f"CS_scenes_{step}.pth", weights_only=True)


def assert_same_weights(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: name + text)


def losses(folder):
    return {
        event.step: value.simple_value
        for event in events(folder)
        for value in event.summary.value
        if value.tag == "loss/total"
    }


def no_process_is_left(tmp_path):
    """No process runs the test's program any more, or was started by one that did."""
    mine = str(tmp_path / "program.py")
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            left = f"CCNET_TEST_RUN={mine}" in path.read_text() or mine in path.with_name("cmdline").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        assert not left, path


# ---- learning ----


@pytest.mark.slow
def test_learning_is_the_same_in_1_and_2_processes(scenes, tmp_path):
    """Over 8 steps, with OHEM, class weights, --ccl, dropout and a clipped gradient; the two have 1 and 2 images."""
    flags = ["--num-steps", 8, "--print-frequency", 1, "--ohem", "--ohem-keep", 640, "--batch-size", 3]
    flags += ["--clip-grad-norm", 1, "--class-weights", "balanced", "--ccl"]
    runs = {procs: [*flags, "--procs", procs] for procs in (2, 1)}
    done = trainings(tmp_path, scenes, runs, IN_FLOAT64)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("class weights: road ") == 2  # once a run
    expected = losses(tmp_path / "1")
    assert len(expected) == 8
    assert losses(tmp_path / "2") == pytest.approx(expected, rel=1e-6)  # the log is in float32
    assert_same_weights(weights(tmp_path / "2", 8), weights(tmp_path / "1", 8))


@pytest.mark.slow
def test_accumulation_is_the_same_in_3_processes(scenes, tmp_path):
    """And without attention, whose parameters are there and get no gradient."""
    flags = ["--num-steps", 3, "--accumulate", 2, "--recurrence", 0, "--ohem", "--ohem-keep", 640]
    flags += ["--class-weights", "balanced", "--ccl"]
    runs = {procs: [*flags, "--procs", procs] for procs in (3, 1)}
    done = trainings(tmp_path, scenes, runs, IN_FLOAT64)
    assert done.returncode == 0, done.stderr
    assert_same_weights(weights(tmp_path / "3", 3), weights(tmp_path / "1", 3))


@pytest.mark.slow
def test_resumed_with_other_numbers_of_processes(scenes, tmp_path):
    """From 2 processes to 1, and to 3, each time after a SIGTERM to one of them."""
    flags = ["--num-steps", 6, "--save-pred-every", 100, "--batch-size", 3, "--resume"]
    assert training(tmp_path, scenes, "through", flags, IN_FLOAT64).returncode == 0
    code = IN_FLOAT64 + at_step(1, _TERMINATE, rank=1)
    first = training(tmp_path, scenes, "cut", [*flags, "--procs", 2], code)
    assert first.returncode == 128 + signal.SIGTERM, first.stderr
    assert "stopped by SIGTERM at step 2; resume it with --resume" in first.stdout
    assert "rror" not in first.stderr
    second = training(tmp_path, scenes, "cut", flags, IN_FLOAT64 + at_step(3, _TERMINATE, rank=0))
    assert "stopped by SIGTERM at step 4" in second.stdout, second.stderr
    third = training(tmp_path, scenes, "cut", [*flags, "--procs", 3], IN_FLOAT64)
    assert third.returncode == 0, third.stderr
    assert "on 3 processes: 6 images, steps 4 to 6" in third.stdout
    assert_same_weights(weights(tmp_path / "cut", 6), weights(tmp_path / "through", 6))


_TERMINATE = "os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.slow
def test_mixed_precision_and_compiled(scenes, tmp_path):
    """bfloat16 learns what float32 does, to its accuracy; so does the compiler's graph, which is only captured here.

    Without dropout: PyTorch compiles a DistributedDataParallel in pieces, which draw in another order.
    """
    no_dropout = "import networks\nnetworks.BatchDropout2d.forward = lambda self, x: x\n"
    as_graph = "torch.nn.Module.compile = lambda self: setattr(self, 'forward', torch.compile(self.forward, "
    as_graph += "backend='eager', fullgraph=True))"
    flags = ["--num-steps", 1, "--procs", 2]
    runs = {"off": flags, "bf16": [*flags, "--amp", "bf16"], "compiled": [*flags, "--compile"]}
    done = trainings(tmp_path, scenes, runs, no_dropout + as_graph)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "bf16") != losses(tmp_path / "off")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "off"), rel=3e-2)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "off"), rel=2e-3)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "bf16", 1).values())


# ---- ends ----

_KILL = "open(os.environ['CCNET_TEST_CLOCK'], 'w').write(str(time.time())); os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [0, 2], ids=["--procs", "torchrun"])
def test_a_killed_process_ends_all_and_training_goes_on(scenes, tmp_path, monkeypatch, capsys, torchrun):
    monkeypatch.setenv("CCNET_TEST_CLOCK", str(tmp_path / "clock"))
    monkeypatch.setenv("CCNET_TEST_RUN", str(tmp_path / "program.py"))
    flags = ["--num-steps", 4, "--save-pred-every", 2, *([] if torchrun else ["--procs", 2, "--num-workers", 1])]
    run = in_folder(tmp_path, scenes, "run", flags)
    done = in_new_processes(tmp_path, "train", run, at_step(3, _KILL), torchrun)
    seconds = time.time() - float((tmp_path / "clock").read_text())
    assert seconds < 20, f"it took {seconds} s"
    if torchrun:
        assert done.returncode == 1
        assert "exitcode  : -9" in done.stderr
        assert "Signal 9 (SIGKILL) received" in done.stderr
    else:
        assert done.returncode == 128 + signal.SIGKILL
        assert "error: process 1 of 2, on cpu, was killed by SIGKILL: the machine's memory may not" in done.stderr
    assert "[rank0]: Traceback" not in done.stderr
    no_process_is_left(tmp_path)
    assert training_steps(tmp_path / "run") == [2]
    again = in_folder(tmp_path, scenes, "run", [*flags, "--resume", "--procs", 1, "--num-workers", 0])
    assert launch(train.train, train.parse_flags(list(map(str, again)))) == 0
    assert "steps 2 to 4" in capsys.readouterr().out


@pytest.mark.slow
def test_one_process_error_is_the_error_of_the_run(scenes, tmp_path):
    error = "raise OSError('frankfurt.png: expected an image')"
    done = training(tmp_path, scenes, "run", ["--num-steps", 3, "--procs", 3], at_step(1, error, rank=2))
    assert done.returncode == 2
    assert done.stderr.count("rror:") == 1
    assert "error: process 2 of 3, on cpu, failed: frankfurt.png: expected an image" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_unforeseen_error_comes_with_its_traceback(scenes, tmp_path):
    flags = ["--num-steps", 3, "--procs", 2]
    done = training(tmp_path, scenes, "run", flags, at_step(1, "raise KeyError('surprise')"))
    assert done.returncode == 1
    assert "error: process 1 of 2, on cpu, failed:" in done.stderr
    assert "KeyError: 'surprise'" in done.stderr
    assert "Connection closed" not in done.stderr


def nan_in_an_image(step):
    """Code that makes the loss of a step NaN: the last image of its batch is."""
    return f"""
real_part = train.Part
count = 0
def part_with_nan(images, labels, names):
    global count
    count += 1
    if count == {step + 1} and (not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1):
        images[-1, 0, 0, 0] = float("nan")
    return real_part(images, labels, names)
train.Part = part_with_nan
"""


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_or_is_skipped(scenes, tmp_path):
    flags = ["--num-steps", 6, "--save-pred-every", 2, "--procs", 2, "--print-frequency", 100]
    runs = {"skips": [*flags, "--skip-nonfinite"], "stops": flags}
    done = trainings(tmp_path, scenes, runs, nan_in_an_image(3))
    assert done.returncode == 2
    assert "the loss is nan at step 4, of the images" in done.stderr
    assert all(item.name in done.stderr for item in scan(scenes, "train"))  # the batch is the epoch
    assert f"the last good snapshot: {tmp_path / 'stops' / 'CS_scenes_2.pth'}; training has diverged" in done.stderr
    assert "step 4: skipped, its loss or gradient is not finite, of the images" in done.stdout + done.stderr
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "skips", 6).values())
    counts = [value.simple_value for event in events(tmp_path / "skips") for value in event.summary.value
              if value.tag == "skipped_steps"]  # fmt: skip
    assert counts == [1]


# ---- evaluation ----


@pytest.mark.slow
def test_evaluation_counts_every_image_once_and_gives_the_same_bits(scenes, tmp_path):
    torch.manual_seed(2)
    model = build_model("resnet18")
    with torch.no_grad():
        model(100 * torch.randn(4, 3, 48, 64))
        model.head.bottleneck[3].weight.mul_(20)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    flags = [*SMALL, "--data-dir", scenes, "--restore-from", tmp_path / "x.pth", "--input-size", "33,41"]
    flags += ["--batch-size", 2, "--submit"]
    results = {}
    outputs = {number: ["--output-dir", tmp_path / number] for number in "123"}
    several = run_script("evaluate", [*flags, "--procs", 3, *outputs["3"]], [*flags, *outputs["1"]])
    under_torchrun = in_new_processes(tmp_path, "evaluate", [*flags, *outputs["2"]], torchrun=2)
    for done, count in ((several, 2), (under_torchrun, 1)):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("mean IoU") == count  # printed once a run
    for name in outputs:  # for 3 processes there are 2 batches
        result = json.loads((tmp_path / name / "result.json").read_text())
        del result["flags"]
        pictures = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*/*.png")}
        assert len(pictures) == 2 * 3
        results[name] = (result, pictures)
    assert results["1"][0]["images"] == 3
    assert 0 < results["1"][0]["meanIU"] < 1
    for name, result in results.items():
        assert result == results["1"], name


# ---- flags ----


def test_the_devices_of_the_processes(monkeypatch):
    def indices(device, gpu="None", procs=None, max_processes=None):
        return [
            found.index if found.type == "cuda" else "cpu" for found in find_devices(device, gpu, procs, max_processes)
        ]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert indices("auto") == [0]
    assert indices("auto", "2") == [2]
    assert indices("cuda", "0,1,3") == [0, 1, 3]
    assert indices("auto", "all") == [0, 1, 2, 3]
    assert indices("auto", "all", max_processes=3) == [0, 1, 2]
    assert indices("auto", procs=2) == [0, 1]
    assert indices("cpu", procs=3) == ["cpu"] * 3
    for arguments, message in (
        (("auto", "0,4"), "--gpu 0,4: expected GPUs that are there, each once, found 4"),
        (("auto", "1,1"), "--gpu 1,1: expected GPUs that are there, each once"),
        (("cuda", "one"), "--gpu one: expected indices of GPUs"),
        (("cpu", "0"), "--gpu 0: cannot go with --device cpu"),
        (("auto", "0,1", 3), "--procs 3: expected a process for each of the 2 GPUs of --gpu 0,1"),
    ):
        with pytest.raises(CommandError, match=message):
            indices(*arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert indices("auto", "all") == ["cpu"]


def test_torchrun_says_which_process_this_is(monkeypatch):
    for name, value in {"LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "RANK": 3, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))

    def world(*flags):
        return launching.torchrun_world(train.parse_flags(list(flags)))

    assert world("--device", "cpu") == world("--device", "cpu", "--gpu", "all") == World(torch.device("cpu"), 3, 4)
    with pytest.raises(CommandError, match="--procs 2: torchrun starts the processes, with --nproc_per_node"):
        world("--procs", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert world().device == world("--gpu", "all").device == torch.device("cuda", 1)
    assert world("--gpu", "2,3").device == torch.device("cuda", 3)
    with pytest.raises(CommandError, match="--gpu 2: expected one for each of torchrun's 2 processes"):
        world("--gpu", "2")


def test_batches_that_cannot_be_cut():
    for num_processes, accumulate, message in (
        (1, 4, "--batch-size 6, --accumulate 4: batch_size: expected a multiple of the 4 parts, got 6"),
        (3, 3, "--batch-size 6, --accumulate 3: .*an image for each of 3 processes in each of 3 parts, 9 or more"),
    ):
        args = train.parse_flags(["--batch-size", "6", "--accumulate", str(accumulate)])
        with pytest.raises(CommandError, match=message):
            train.images_per_part(args, num_processes)
