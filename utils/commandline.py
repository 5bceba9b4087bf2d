"""What the command lines of train.py and evaluate.py share."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from dataset import IGNORE_LABEL, NUM_CLASSES
from dataset.labels import ENCODINGS
from networks import BACKBONE_ACTIVATIONS, BACKBONES

from .precision import AMP_DTYPES


class CommandError(RuntimeError):
    """The command cannot do what it was asked for; the message names the flag and says why."""


def size(text: str) -> tuple[int, int]:
    """Parse "height,width" in pixels."""
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected height,width in pixels (e.g. 769,769), got {text!r}") from None
    if min(height, width) < 8:
        raise argparse.ArgumentTypeError(f"expected at least 8,8, since the network works at 1/8, got {text!r}")
    return height, width


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """A parser of int or float within [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, got {text!r}") from None
        if not low <= value <= high:
            bounds = f"{low} or more" if high == float("inf") else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {bounds}, got {text!r}")
        return value

    return parse


def boolean(text: str) -> bool:
    """Parse 1/0, true/false, yes/no."""
    try:
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected 1 or 0 (true/false, yes/no), got {text!r}") from None


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that mean the same in training and evaluation, with the same defaults."""
    parser.add_argument(
        "--data-dir", type=Path, default=Path("cityscapes"), help="folder with leftImg8bit/ and gtFine/"
    )
    parser.add_argument("--data-list", type=Path, help="list file (image and label path a line) instead of a split")
    parser.add_argument(
        "--label-encoding",
        choices=ENCODINGS,
        help="values of the label images: Cityscapes' label ids, or training ids; as their file names say if not given",
    )
    parser.add_argument(
        "--ignore-label", type=number(int, NUM_CLASSES, 255), default=IGNORE_LABEL, help="label of void"
    )
    parser.add_argument("--input-size", type=size, default=(769, 769), metavar="H,W", help="size of crops and tiles")
    parser.add_argument("--num-classes", type=number(int, NUM_CLASSES, 255), default=NUM_CLASSES, help="of the network")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet101", help="the paper's is resnet101")
    parser.add_argument(
        "--backbone-activation",
        choices=BACKBONE_ACTIVATIONS,
        default="identity",
        help="of the backbone's batch norms: identity, with ReLU behind, or leaky_relu, which saves memory",
    )
    parser.add_argument("--recurrence", type=number(int, 0), default=2, help="R, passes of criss-cross attention")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    parser.add_argument(
        "--gpu", default="None", help="GPUs, as in 0,1,2,3, with a process for each; all; the first one if not given"
    )
    parser.add_argument("--procs", type=number(int, 1), help="processes; with --device cpu, or the first so many GPUs")
    parser.add_argument("--amp", choices=AMP_DTYPES, default="off", help="mixed precision: the network in bf16 or fp16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument(
        "--num-workers",
        type=number(int, 0),
        default=min(4, os.cpu_count() or 1),
        help="processes that load data, of each process",
    )


def plain_flags(args: argparse.Namespace) -> dict:
    """The flags by name, paths as text: what can be saved."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def check_ignore_label(ignore_label: int, num_classes: int) -> None:
    """The label of void is not that of a class.

    Raises:
        CommandError: it is.
    """
    if ignore_label < num_classes:
        raise CommandError(f"--ignore-label {ignore_label}: expected --num-classes {num_classes} or more")
