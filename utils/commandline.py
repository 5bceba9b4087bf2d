"""The flags that train.py and evaluate.py share, and which network they ask for.

python -m utils.commandline FLAGS OF train.py      prints those that evaluate.py takes as well, a line each
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from dataset import IGNORE_LABEL, NUM_CLASSES
from dataset.labels import ENCODINGS
from networks import BACKBONE_ACTIVATIONS, BACKBONES, NetworkConfig

from .arguments import MOST_PROCESSES, ArgumentParser, number, size
from .network_file import network_path, read_network
from .precision import AMP_DTYPES


class CommandError(RuntimeError):
    """The command cannot do what it was asked for; the message names the flag and says why."""


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that mean the same in training and evaluation, with the same defaults."""
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", type=Path, default=Path("cityscapes"), help="folder with leftImg8bit/ and gtFine/")
    add(
        "--data-list", type=Path,
        help="list file instead of a split: image and label path a line, relative to --data-dir, with a tab or spaces "
        "between them; evaluation does without labels",
    )  # fmt: skip
    add(
        "--label-encoding", choices=ENCODINGS,
        help="values of the label images: Cityscapes' label ids, or training ids; as their file names say if not given",
    )  # fmt: skip
    add("--ignore-label", type=number(int, NUM_CLASSES, 255), default=IGNORE_LABEL, help="training label of void")
    add(
        "--input-size", type=size, default=(769, 769), metavar="H,W",
        help="size of training crops and of the sliding window's tiles",
    )  # fmt: skip

    add = parser.add_argument_group(
        "network",
        f"A flag that is not given is as network.json says, beside the weights; without that file it is {_paper()}.",
    ).add_argument
    add("--backbone", choices=BACKBONES, help="the paper's is resnet101")
    add(
        "--backbone-activation", choices=BACKBONE_ACTIVATIONS,
        help="of the backbone's batch norms: identity, with ReLU behind, as the original's; leaky_relu keeps 0.55 of "
        "the memory for the backward pass",
    )  # fmt: skip
    add(
        "--recurrence", type=number(int, 0, 64),
        help="R, how often criss-cross attention is applied; 0 for none; may differ from network.json",
    )  # fmt: skip
    add("--num-classes", type=number(int, NUM_CLASSES, 255), help="channels of the logits")

    add = parser.add_argument_group("devices and speed").add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    add(
        "--gpu", default="None",
        help="GPUs, as in 0,1,2,3, with a process for each; all, in training as far as a batch has images for them; "
        "None for the first",
    )  # fmt: skip
    add("--procs", type=number(int, 1, MOST_PROCESSES), help="processes: with --device cpu, or the first so many GPUs")
    add("--amp", choices=AMP_DTYPES, default="off", help="mixed precision: the network in bf16 or fp16")
    add("--compile", action="store_true", help="torch.compile the network")
    add(
        "--num-workers", type=number(int, 0, MOST_PROCESSES), default=min(4, os.cpu_count() or 1),
        help="processes that load data, of each process; 0 for none",
    )  # fmt: skip


def _paper() -> str:
    return "the paper's: " + ", ".join(f"{_flag(name)} {value}" for name, value in asdict(NetworkConfig()).items())


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def network_config(args: argparse.Namespace) -> NetworkConfig:
    """The network of a command line that `with_network` has completed."""
    return NetworkConfig(args.backbone, args.backbone_activation, args.recurrence, args.num_classes)


def with_network(
    args: argparse.Namespace, folder: Path | None, may_differ: Sequence[str] = ("recurrence",)
) -> argparse.Namespace:
    """The command line with every network flag: those that are not given as the folder's network.json says.

    Args:
        folder: of the weights; None if there are none.
        may_differ: settings that weights fit whatever they are.

    Raises:
        CommandError: a flag contradicts the file.
        CheckpointError: the file cannot be read.
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
    """Of the arguments of train.py, those that evaluate.py takes as well; but no --data-list, which is of training."""
    parser = ArgumentParser("")
    add_shared_flags(parser)
    for action in parser._actions:
        action.type, action.default = None, argparse.SUPPRESS
    known, _ = parser.parse_known_args(arguments)
    for name, value in vars(known).items():
        if name != "data_list":
            yield _flag(name) if value is True else f"{_flag(name)}={value}"


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


def check_memory(flag: str, num_images: int, image_size: tuple[int, int]) -> None:
    """A batch's images and labels, which are the least of what it needs, fit the machine's memory.

    Raises:
        CommandError: they do not.
    """
    needed = num_images * image_size[0] * image_size[1] * (3 * 4 + 1)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise CommandError(
            f"{flag}: {num_images} images of {image_size[0]}x{image_size[1]} are {needed / 2**30:.0f} GiB, "
            f"expected less than this machine's memory of {memory / 2**30:.0f} GiB"
        )


if __name__ == "__main__":
    print("\n".join(shared_arguments(sys.argv[1:])))
