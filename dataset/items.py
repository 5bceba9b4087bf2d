"""Images and their label images, and list files that name them."""

import re
import shlex
from collections import Counter
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path

_LIST_LINE = (
    "expected the path of an image, or those of an image and its label with a tab or spaces between them "
    "(quote paths that hold spaces, or separate them by a tab)"
)


# The end of the names of Cityscapes' images
_CITYSCAPES = "_leftImg8bit"


class DatasetError(ValueError):
    """Data that cannot be used; the message names the file or folder, what was expected and what was found."""


@dataclass(frozen=True)
class Item:
    """An image and its label image; test images may have none.

    Attributes:
        given_encoding: encoding of the label image, "ids" or "trainids"; None: see its file name.
    """

    image: Path
    label: Path | None
    given_encoding: str | None = None

    @property
    def name(self) -> str:
        """The image's file name without extension."""
        return self.image.stem

    @property
    def frame(self) -> str:
        """<city>_<sequence>_<frame> of Cityscapes' images; the name of others."""
        return self.name.removesuffix(_CITYSCAPES)

    @property
    def encoding(self) -> str:
        """Encoding of the label image, "ids" or "trainids": as given, or else by its file name."""
        named = "trainids" if self.label is not None and "labeltrainids" in self.label.name.lower() else "ids"
        return self.given_encoding or named


def output_names(items: list[Item]) -> dict[Item, str]:
    """The name of each image's results: the image's without extension, with folders if two images have the same.

    Raises:
        DatasetError: two images have the same path but for the extension, or an image occurs twice.
    """
    names = {item: item.name for item in items}
    if len(set(names.values())) < len(items):
        root = commonpath([item.image.parent.absolute() for item in items])
        names = {item: str(item.image.absolute().relative_to(root).with_suffix("")) for item in items}
    (name, count), *_ = Counter(names[item] for item in items).most_common(1)
    if count > 1:
        (first, *_) = (item.image for item in items if names[item] == name)
        raise DatasetError(f"{first}: expected every image once, found {count} named {name}")
    return names


def submission_name(name: str) -> str:
    """The file name of submitted label values, by the name of the image's results: Cityscapes' server has its own."""
    return f"{name.removesuffix(_CITYSCAPES)}_pred_labelIds.png" if name.endswith(_CITYSCAPES) else f"{name}.png"


def read_list(
    root: str | Path, list_path: str | Path, encoding: str | None = None, need_labels: bool = False
) -> list[Item]:
    """The images named in a list file. Each line has the paths, relative to root, of an image and its label, if any.

    Paths are separated by a tab, or else by spaces; paths with spaces may be quoted as in a shell. Lines that begin
    with # are comments.

    Args:
        encoding: encoding of the label images, "ids" or "trainids"; None: by their file names.
        need_labels: whether every image must have a label.

    Raises:
        DatasetError: the list cannot be read, a line is malformed or lacks a needed label, or a file does not exist.
    """
    root = Path(root)
    try:
        lines = Path(list_path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{list_path}: expected a list file (image and label path a line): {error}") from error
    items, unlabelled = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        image, *label = _paths(line.rstrip().lstrip(" "), f"{list_path}, line {number}")
        items.append(Item(root / image, root / label[0] if label else None, encoding))
        if not label:
            unlabelled.append(number)
    if not items:
        raise DatasetError(f"{list_path}: expected image and label paths, found no line")
    if need_labels and unlabelled:
        raise DatasetError(
            f"{list_path}: expected an image and its label in every line, found no label in {len(unlabelled)} of "
            f"{len(items)} lines, the first of them line {unlabelled[0]}: {lines[unlabelled[0] - 1]!r}"
        )
    check_files(items, str(list_path))
    return items


def _paths(line: str, where: str) -> list[str]:
    """The one or two paths of a line."""
    is_quoted = re.search(r"""(^|\s)["']""", line)
    try:
        paths = shlex.split(line) if is_quoted or "\t" not in line else re.split(r" *\t\s*", line)
    except ValueError as error:
        raise DatasetError(f"{where}: {_LIST_LINE}, found {line!r}: {error}") from error
    if len(paths) not in (1, 2) or not all(paths):
        raise DatasetError(f"{where}: {_LIST_LINE}, found {len(paths)} columns: {line!r}")
    return paths


def check_files(items: list[Item], source: str) -> None:
    """Raise a DatasetError if a file does not exist."""
    for what, paths in (
        ("image", [item.image for item in items if not item.image.is_file()]),
        ("label", [item.label for item in items if item.label is not None and not item.label.is_file()]),
    ):
        if paths:
            shown = "".join(f"\n    {path}" for path in paths[:5]) + ("\n    ..." if len(paths) > 5 else "")
            raise DatasetError(f"{source}: {len(paths)} of {len(items)} {what} files do not exist:{shown}")
