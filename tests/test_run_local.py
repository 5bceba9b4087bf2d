"""run_local.sh as a user runs it: in a copy of the checkout, with the packages that are installed here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The sources of this checkout, with links to what is built and to its .venv if the tests run in it."""
    environment = ROOT / ".venv"
    if Path(sys.prefix).resolve() != environment.resolve():
        pytest.skip(f"needs the environment that run_tests.sh sets up, {environment}; these tests run in {sys.prefix}")
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".*", "build", "data", "snapshots", "tests", "__pycache__", "*.egg-info", "*.so")
    shutil.copytree(ROOT, copy, ignore=ignored)
    for library in ROOT.glob("*/*.so"):
        (copy / library.relative_to(ROOT)).symlink_to(library)
    (copy / ".venv").symlink_to(environment)
    return copy


def run_local(checkout, *arguments, **environment):
    return subprocess.run(
        [checkout / "run_local.sh", *map(str, arguments)],
        cwd=checkout.parent,
        env={**os.environ, "HOME": "/dev/null", **environment},  # where nothing can be written
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_arguments_it_trains_and_evaluates_on_generated_scenes(checkout):
    """On 16 and 8 scenes instead of 1600 and 40."""
    program = (checkout / "dataset" / "scenes.py").read_text()
    fewer = program.replace("default=1600", "default=16").replace("default=40", "default=8")
    assert fewer != program
    (checkout / "dataset" / "scenes.py").write_text(fewer)
    done = run_local(checkout, "--num-steps", 2, "--recurrence=1", BS="2", SAVE_EVERY="1")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = checkout / "snapshots" / "scenes"
    tables = re.findall(r"\*\*mean IoU\*\* \| (\d+\.\d+)", done.stdout)
    assert len(tables) == 2  # without attention, and with it
    for path in (
        "CS_scenes_2.pth",
        "network.json",
        "outputs/CS_scenes_2/val/report.md",
        "outputs/CS_scenes_2/val/result.json",
        "outputs/CS_scenes_2/val/predictions/hafen_000000_000019_leftImg8bit.png",
        "outputs/CS_scenes_2/val/attention/hafen_000006_000019_leftImg8bit.png",
        "without_attention/CS_scenes_2.pth",
        "without_attention/val/result.json",
    ):
        assert (folder / path).is_file(), path
    assert "| class | IoU, % | R=0 | R=1 | R=2 | R=3 | without_attention |" in done.stdout
    ending = done.stdout.splitlines()[-4:]
    assert [line.split(":")[0] for line in ending] == ["report", "checkpoint", "predictions", "attention"]


def test_with_a_path_it_runs_the_recipe_and_goes_on_after_sigterm(checkout, scenes):
    """The fifth step of training sends it, to the script alone: training saves, and evaluation does not start."""
    flags = [
        "--backbone",
        "resnet18",
        "--input-size",
        "33,41",
        "--num-steps",
        12,
        "--batch-size",
        2,
        "--num-workers",
        1,
    ]
    flags += ["--backbone-activation", "leaky_relu", "--amp", "bf16"]
    settings = {"SNAPSHOT_DIR": "elsewhere", "RECURRENCE": "3"}
    program = (checkout / "train.py").read_text()
    kill = (
        "        step += 1\n        if step == 5:\n            __import__('os').kill(__import__('os').getppid(), 15)\n"
    )
    (checkout / "train.py").write_text(program.replace("        step += 1\n", kill))
    done = run_local(checkout, scenes, *flags, **settings)
    assert done.returncode == 128 + 15, done.stdout + done.stderr
    assert "resnet18, R=3" in done.stdout
    step = int(re.search(r"stopped by SIGTERM at step (\d+)", done.stdout)[1])
    assert (checkout / f"elsewhere/CS_scenes_{step}.training.pth").exists()
    assert not (checkout / "elsewhere/outputs").exists()

    (checkout / "train.py").write_text(program)
    done = run_local(checkout, scenes, *flags, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"steps {step} to 12" in done.stdout  # resumed where it was
    assert "installing" not in done.stdout
    report = (checkout / "elsewhere" / "outputs" / "CS_scenes_12" / "val" / "report.md").read_text()
    evaluated = ("- backbone_activation: leaky_relu", "- amp: bf16", "- num_workers: 1")
    for setting in ("- recurrence: 3", "- backbone: resnet18", "- input_size: (33, 41)", "3 images,", *evaluated):
        assert setting in report


def test_the_recipe_asks_for_the_imagenet_weights(checkout, scenes):
    done = run_local(checkout, scenes)
    assert done.returncode == 2
    assert "dataset/resnet101-imagenet.pth: expected the ImageNet weights" in done.stderr


def test_help_and_flags_that_do_not_go(checkout):
    done = run_local(checkout, "--help")
    assert done.returncode == 0
    assert "./run_local.sh YOUR_CS_PATH [flags]" in done.stdout
    assert "--weight-decay" in done.stdout
    done = run_local(checkout, "--data-dir=elsewhere")
    assert done.returncode == 2
    assert "--data-dir: give the path as the first argument" in done.stderr


def test_half_an_environment_is_made_anew(checkout):
    """A .venv without pip, as is left where python3-venv is missing."""
    (checkout / ".venv").unlink()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    (checkout / ".venv" / ".done-x").write_text("")
    script = "source utils/environment.sh; _unless_done() { :; }; set_up_environment; python -m pip --version"
    done = subprocess.run(["bash", "-euc", script], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "creating .venv" in done.stdout
    assert str(checkout / ".venv") in done.stdout
    assert not (checkout / ".venv" / ".done-x").exists()


def test_a_path_that_is_not_there(checkout):
    done = run_local(checkout, "nowhere")
    assert done.returncode == 2
    assert "nowhere: expected the folder of a data set" in done.stderr
