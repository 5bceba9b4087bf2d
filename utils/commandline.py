"""The flags that train.py and evaluate.py share, and the network and images that they select.

    python -m utils.commandline FLAGS OF train.py

prints those flags that evaluate.py takes as well, one a line.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from dataset import IGNORE_LABEL, NUM_CLASSES, Item, read_list, scan
from dataset.labels import ENCODINGS
from networks import BACKBONE_ACTIVATIONS, BACKBONES, NetworkConfig

from .arguments import MOST_PROCESSES, ArgumentParser, number, size
from .network_file import network_path, read_network
from .precision import AMP_DTYPES


class CommandError(RuntimeError):
    """The command cannot be carried out; the message names the flag and says why."""


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that mean the same in training and evaluation, with the same defaults."""
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", type=Path, default=Path("cityscapes"), help="folder with leftImg8bit/ and gtFine/")
    add(
        "--data-list", type=Path,
        help="list file instead of a split: on each line the paths of an image and its label, relative to --data-dir, "
        "separated by a tab or spaces; evaluation does not need labels",
    )  # fmt: skip
    add(
        "--label-encoding", choices=ENCODINGS,
        help="values in the label images: Cityscapes' label ids or training ids; by default what their file names say",
    )  # fmt: skip
    add("--ignore-label", type=number(int, NUM_CLASSES, 255), default=IGNORE_LABEL, help="training label of void")
    add(
        "--input-size", type=size, default=(769, 769), metavar="H,W",
        help="size of the training crops, and of the tiles of the sliding window",
    )  # fmt: skip

    add = parser.add_argument_group(
        "network",
        f"The default is what network.json beside the weights says, or without that file {_paper()}.",
    ).add_argument
    add("--backbone", choices=BACKBONES, help="the paper's is resnet101")
    add(
        "--backbone-activation", choices=BACKBONE_ACTIVATIONS,
        help="activation of the backbone's batch norms: identity, followed by ReLU, as in the original; leaky_relu "
        "needs 0.55 of the memory for the backward pass",
    )  # fmt: skip
    add(
        "--recurrence", type=number(int, 0, 64),
        help="R, how many times criss-cross attention is applied; 0 for none; may differ from network.json",
    )  # fmt: skip
    add("--num-classes", type=number(int, NUM_CLASSES, 255), help="channels of the logits")

    add = parser.add_argument_group("devices and speed").add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is a GPU")
    add(
        "--gpu", default="None",
        help="GPUs, as in 0,1,2,3, one process for each; all: all GPUs, in training at most one for each image of a "
        "batch; None: the first",
    )  # fmt: skip
    add("--procs", type=number(int, 1, MOST_PROCESSES), help="number of processes, on the CPU or on the first GPUs")
    add("--amp", choices=AMP_DTYPES, default="off", help="mixed precision: the network in bf16 or fp16")
    add("--compile", action="store_true", help="torch.compile the network")
    add(
        "--num-workers", type=number(int, 0, MOST_PROCESSES), default=min(4, os.cpu_count() or 1),
        help="data-loading processes of each process; 0: it loads its data itself",
    )  # fmt: skip


def _paper() -> str:
    return "the paper's: " + ", ".join(f"{_flag(name)} {value}" for name, value in asdict(NetworkConfig()).items())


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def network_config(args: argparse.Namespace) -> NetworkConfig:
    """The network that a command line from `with_network` describes."""
    return NetworkConfig(args.backbone, args.backbone_activation, args.recurrence, args.num_classes)


def with_network(
    args: argparse.Namespace, folder: Path | None, may_differ: Sequence[str] = ("recurrence",)
) -> argparse.Namespace:
    """The command line with all network flags set: those not given are taken from the folder's network.json.

    Args:
        folder: folder of the weights; None if there are none.
        may_differ: settings that may differ from network.json.

    Raises:
        CommandError: a flag contradicts network.json.
        CheckpointError: network.json cannot be read.
    """
    found = None if folder is None else read_network(folder)
    settings = asdict(found or NetworkConfig())
    for name, value in settings.items():
        given = getattr(args, name)
        if given is None:
            continue
        if folder is not None and found is not None and given != value and name not in may_differ:
            raise CommandError(
                f"{_flag(name)} {given}: {network_path(folder)} says {value}, with which the weights beside it were "
                "trained; leave the flag out"
            )
        settings[name] = given
    return argparse.Namespace(**vars(args) | settings)


def shared_arguments(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments of train.py that evaluate.py takes as well, but --data-list, which names training images."""
    parser = ArgumentParser("")
    add_shared_flags(parser)
    for action in parser._actions:
        action.type, action.default = None, argparse.SUPPRESS
    known, _ = parser.parse_known_args(arguments)
    for name, value in vars(known).items():
        if name != "data_list":
            yield _flag(name) if value is True else f"{_flag(name)}={value}"


def find_items(args: argparse.Namespace, split: str, need_labels: bool = False) -> list[Item]:
    """The images of --data-list, or else of the split.

    Raises:
        DatasetError: as `read_list` and `scan`.
    """
    if args.data_list is not None:
        return read_list(args.data_dir, args.data_list, args.label_encoding, need_labels)
    return scan(args.data_dir, split, args.label_encoding)


def plain_flags(args: argparse.Namespace) -> dict:
    """The flags by name, in a form that can be saved: paths are text."""

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(args).items()}


def check_ignore_label(ignore_label: int, num_classes: int) -> None:
    """Raise a CommandError if the label of void is that of a class."""
    if ignore_label < num_classes:
        raise CommandError(f"--ignore-label {ignore_label}: expected --num-classes {num_classes} or more")


def check_memory(flag: str, num_images: int, image_size: tuple[int, int]) -> None:
    """Raise a CommandError if the images and labels of a batch alone exceed the machine's memory."""
    needed = num_images * image_size[0] * image_size[1] * (3 * 4 + 1)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise CommandError(
            f"{flag}: {num_images} images of {image_size[0]}x{image_size[1]} are {needed / 2**30:.0f} GiB, "
            f"expected less than this machine's memory of {memory / 2**30:.0f} GiB"
        )


if __name__ == "__main__":
    print("\n".join(shared_arguments(sys.argv[1:])))
