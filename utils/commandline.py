"""The flags that train.py and evaluate.py share, and the network and images that they select.

    python -m utils.commandline FLAGS OF train.py

prints those flags that evaluate.py takes as well, one a line.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from dataset import (
    BUILT_IN,
    CITYSCAPES,
    ClassTable,
    DatasetError,
    Item,
    default_classes,
    find_images,
    find_layout,
    load_classes,
    read_list,
    scan,
)
from dataset.classes import ENCODINGS, MOST_CLASSES
from networks import BACKBONE_ACTIVATIONS, BACKBONES, HEADS, STEMS, NetworkConfig
from networks.heads import ATTENTION_HEADS

from .arguments import MOST_PROCESSES, ArgumentParser, loaded_by, number, size
from .network_file import SavedNetwork
from .precision import AMP_DTYPES


class CommandError(RuntimeError):
    """The command cannot be carried out; the message names the flag and says why."""


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that mean the same in training and evaluation, with the same defaults."""
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", type=Path, default=Path("cityscapes"), help="folder of the data set")
    add(
        "--data-list", type=Path,
        help="list file instead of a split: on each line the paths of an image and its label, relative to --data-dir, "
        "separated by a tab or spaces; evaluation does not need labels",
    )  # fmt: skip
    add(
        "--classes", type=loaded_by(load_classes, DatasetError), metavar="NAME|FILE",
        help=f"class table of the label images: {', '.join(BUILT_IN)} or a TOML file; by default classes.toml in "
        "--data-dir, that of the layout of --data-dir, or that of the weights",
    )  # fmt: skip
    add(
        "--label-encoding", choices=ENCODINGS,
        help="values in the label images: those of the class table or training ids; by default what their file names "
        "say",
    )  # fmt: skip
    add("--ignore-label", type=number(int, 1, MOST_CLASSES), help="training label of void; by default 255")
    add(
        "--input-size", type=size, default=(769, 769), metavar="H,W",
        help="size of the training crops, and of the tiles of the sliding window",
    )  # fmt: skip

    add = parser.add_argument_group(
        "network",
        f"The default is what is known of the weights: what their file says, or network.json beside it, or their "
        f"shapes. Otherwise {_paper()}.",
    ).add_argument
    add("--backbone", choices=BACKBONES, help="the paper's is resnet101")
    add(
        "--stem", choices=STEMS,
        help="the backbone's first convolutions: conv3x3, three of 64, 64 and 128 channels, as in the original; "
        "conv3x3_narrow, of 32, 32 and 64, those of ResNet V1c; conv7x7, one, that of torchvision",
    )  # fmt: skip
    add(
        "--backbone-activation", choices=BACKBONE_ACTIVATIONS,
        help="activation of the backbone's batch norms: identity, followed by ReLU, as in the original; leaky_relu "
        "needs 0.55 of the memory for the backward pass",
    )  # fmt: skip
    add(
        "--head", choices=HEADS,
        help="what gathers context: rcca, recurrent criss-cross attention; to compare with: none, psp (PSPNet's), aspp "
        "(DeepLabv3's) or nonlocal (full attention)",
    )  # fmt: skip
    add(
        "--recurrence", type=number(int, 0, 64),
        help="R, how many times criss-cross attention is applied; 0 for none; may differ from that of the weights",
    )  # fmt: skip
    add("--num-classes", type=number(int, 1, MOST_CLASSES), help="channels of the logits, those of the class table")

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
    settings = asdict(NetworkConfig())
    del settings["ccl"]  # a flag of train.py alone
    return "the paper's: " + ", ".join(f"{_flag(name)} {value}" for name, value in settings.items())


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def network_config(args: argparse.Namespace) -> NetworkConfig:
    """The network that a command line from `with_network` describes."""
    return NetworkConfig(**{field.name: getattr(args, field.name) for field in fields(NetworkConfig)})


def with_network(
    args: argparse.Namespace, found: SavedNetwork | None, may_differ: Sequence[str] = ("recurrence", "ccl")
) -> argparse.Namespace:
    """The command line with all network flags and the class table set: by default those of the weights.

    Args:
        found: what is known of the weights; None if there are none.
        may_differ: settings that may differ from it.

    Raises:
        CommandError: a flag contradicts what is known, or another flag.
        DatasetError: the data set's class table cannot be read, or is not known.
    """
    classes = _class_table(args, found, "num_classes" in may_differ)
    settings = asdict(found.config if found else NetworkConfig()) | {"num_classes": len(classes)}
    fixed = set(found.known) - set(may_differ) if found else set()
    if found and found.config.num_classes != len(classes) and "num_classes" in fixed:
        raise CommandError(
            f"--classes {classes.name}: has {len(classes)} classes, and the weights {found.config.num_classes}, as "
            f"{found.source}; expected the class table with which they were trained"
        )
    for name, value in settings.items():
        given = getattr(args, name, None)  # evaluate.py has no --ccl
        if given is None or given == value:
            continue
        if name == "num_classes":
            raise CommandError(
                f"--num-classes {given}: the class table {classes.name} has {value} classes; leave the flag out, or "
                "give --classes"
            )
        if found and name in fixed:
            raise CommandError(
                f"{_flag(name)} {given}: the weights are of {value}, as {found.source}; leave the flag out"
            )
        settings[name] = given
    if settings["head"] != "rcca":
        if args.recurrence:
            raise CommandError(f"--recurrence {args.recurrence}: expected it with --head rcca, got {settings['head']}")
        settings["recurrence"] = 0
    if settings["ccl"] and settings["head"] not in ATTENTION_HEADS:
        if getattr(args, "ccl", None):
            raise CommandError(f"--ccl: expected it with --head {' or '.join(ATTENTION_HEADS)}, got {settings['head']}")
        settings["ccl"] = False
    ignore_label = classes.ignore_label if args.ignore_label is None else args.ignore_label
    if not len(classes) <= ignore_label <= classes.ignore_label:
        raise CommandError(
            f"--ignore-label {ignore_label}: expected {len(classes)} to {classes.ignore_label}, no label of the "
            f"{len(classes)} classes"
        )
    return argparse.Namespace(**vars(args) | settings | {"classes": classes, "ignore_label": ignore_label})


def _class_table(args: argparse.Namespace, found: SavedNetwork | None, may_differ: bool) -> ClassTable:
    """The class table of the command line, or the data set's own, or that with which the weights were trained.

    Args:
        may_differ: whether it may have other classes than the last.
    """
    has_data_set = not getattr(args, "images", None)
    trained = found.classes if found else None
    classes = args.classes or (default_classes(args.data_dir) if has_data_set else None) or trained
    if classes is None and (args.data_list or not has_data_set):
        classes = CITYSCAPES
    if classes is None:
        find_layout(args.data_dir)  # an error if there is no data set
        raise CommandError(
            f"--classes: expected what the label images in {args.data_dir} mean: NAME or FILE, or classes.toml there; "
            f"python -m dataset {args.data_dir} shows what they hold"
        )
    if found and trained and classes.names != trained.names and not may_differ:
        which = f"--classes {classes.name}" if args.classes else f"{args.data_dir}, with labels of {classes.name}"
        raise CommandError(
            f"{which}: the weights were trained with the classes of {trained.name}, {_some(trained.names)}, as "
            f"{found.source}; expected a class table (--classes) with these, found {_some(classes.names)}"
        )
    return classes


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + ", ..." * (len(names) > 4)


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
    """The images of evaluate.py's --images, of --data-list, or else of the split.

    Raises:
        DatasetError: as `find_images`, `read_list` and `scan`.
    """
    if getattr(args, "images", None):
        return find_images(args.images)
    if args.data_list is not None:
        return read_list(args.data_dir, args.data_list, args.label_encoding, need_labels)
    return scan(args.data_dir, split, args.label_encoding)


def plain_flags(args: argparse.Namespace) -> dict:
    """The flags by name, in a form that can be saved: paths are text."""

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, ClassTable):
            return value.name
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(args).items()}


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
