"""Finding images and their labels, in a folder with the Cityscapes layout or from a list file."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

SPLITS = {"train": ("train",), "val": ("val",), "test": ("test",), "trainval": ("train", "val")}
_IMAGE_SUFFIX = "_leftImg8bit.png"
_OTHER_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # in any case; .PNG is not .png
_LABEL_SUFFIXES = {"ids": "_gtFine_labelIds.png", "trainids": "_gtFine_labelTrainIds.png"}
# Label files to look for, by the given encoding, in order of preference. Files with the usual name, _labelIds, may hold
# training ids.
_PREFERRED: dict[str | None, tuple[str, ...]] = {
    None: ("ids", "trainids"),
    "ids": ("ids",),
    "trainids": ("trainids", "ids"),
}
_LAYOUT = """expected the Cityscapes layout:
    <data-dir>/leftImg8bit/<split>/<city>/<city>_<sequence>_<frame>_leftImg8bit.png
    <data-dir>/gtFine/<split>/<city>/<city>_<sequence>_<frame>_gtFine_labelIds.png"""
_LIST_LINE = (
    "expected the path of an image, or those of an image and its label with a tab or spaces between them "
    "(quote paths that hold spaces, or separate them by a tab)"
)


class DatasetError(ValueError):
    """Data that cannot be used; the message names the file or folder, what was expected and what was found."""


@dataclass(frozen=True)
class Item:
    """An image and its label image; test images have none.

    Attributes:
        given_encoding: encoding of the label image, "ids" or "trainids"; None: see its file name.
    """

    image: Path
    label: Path | None
    given_encoding: str | None = None

    @property
    def name(self) -> str:
        """The image's file name without extension; predictions have this name."""
        return self.image.stem

    @property
    def frame(self) -> str:
        """<city>_<sequence>_<frame>, the image's name on the benchmark server."""
        return self.name.removesuffix("_leftImg8bit")

    @property
    def encoding(self) -> str:
        """Encoding of the label image, "ids" or "trainids": as given, or else by its file name."""
        named = "trainids" if self.label is not None and "labeltrainids" in self.label.name.lower() else "ids"
        return self.given_encoding or named


def scan(root: str | Path, split: str, encoding: str | None = None) -> list[Item]:
    """All images of a split (train, val, test or trainval), sorted; those of test without labels.

    Hidden files and folders are ignored.

    Args:
        encoding: encoding of the label images, "ids" or "trainids". If None, _labelIds files are used where they exist,
            otherwise _labelTrainIds files.

    Raises:
        ValueError: there is no such split.
        DatasetError: the folder does not exist or has no images, or an image has another format or no label.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    root = Path(root)
    items: list[Item] = []
    for part in SPLITS[split]:
        _check_suffixes(root / "leftImg8bit" / part)
        images = sorted((root / "leftImg8bit" / part).glob(f"[!.]*/[!.]*{_IMAGE_SUFFIX}"))
        if not images:
            raise DatasetError(f"{root}: no images of the split {part!r}; {_LAYOUT}\nfound: {_found(root, part)}")
        for image in images:
            label = None if part == "test" else _label_of(image, root / "gtFine" / part, encoding)
            items.append(Item(image, label, encoding))
    _check_files(items, f"{root}, split {split!r}")
    return items


def _check_suffixes(folder: Path) -> None:
    """Raise a DatasetError if images would be missed because their names end in another suffix."""
    names = folder.glob(f"[!.]*/[!.]*{Path(_IMAGE_SUFFIX).stem}.*")
    others = sorted(path for path in names if path.suffix.lower() in _OTHER_IMAGES and path.suffix != ".png")
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise DatasetError(f"{folder}: expected every image as *{_IMAGE_SUFFIX}, found {others[0]}{more}")


def _label_of(image: Path, folder: Path, encoding: str | None) -> Path:
    """The image's label file: the first possible name that exists, or else the first possible name."""
    suffixes = [_LABEL_SUFFIXES[kind] for kind in _PREFERRED[encoding]]
    stem = image.name.removesuffix(_IMAGE_SUFFIX)
    paths = [folder / image.parent.name / (stem + suffix) for suffix in suffixes]
    return next((path for path in paths if path.is_file()), paths[0])


def _found(root: Path, part: str) -> str:
    """A description of the innermost expected folder that exists, for error messages."""
    for folder in (root / "leftImg8bit" / part, root / "leftImg8bit", root):
        if folder.is_dir():
            names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.glob("[!.]*"))
            more = ", ..." if len(names) > 8 else ""
            return f"{folder} holds {', '.join(names[:8]) + more if names else 'nothing'}"
    return f"{root} is a file, not a folder" if root.exists() else f"{root} does not exist"


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
    _check_files(items, str(list_path))
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


def _check_files(items: list[Item], source: str) -> None:
    """Raise a DatasetError if a file does not exist."""
    for what, paths in (
        ("image", [item.image for item in items if not item.image.is_file()]),
        ("label", [item.label for item in items if item.label is not None and not item.label.is_file()]),
    ):
        if paths:
            shown = "".join(f"\n    {path}" for path in paths[:5]) + ("\n    ..." if len(paths) > 5 else "")
            raise DatasetError(f"{source}: {len(paths)} of {len(items)} {what} files do not exist:{shown}")
