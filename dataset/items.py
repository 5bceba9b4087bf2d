"""Finding the images of a data set and their labels: in a Cityscapes folder, or named in a list file."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

SPLITS = {"train": ("train",), "val": ("val",), "test": ("test",), "trainval": ("train", "val")}
_IMAGE_SUFFIX = "_leftImg8bit.png"
_OTHER_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # in any case; .PNG is not .png
_LABEL_SUFFIXES = {"ids": "_gtFine_labelIds.png", "trainids": "_gtFine_labelTrainIds.png"}
# Which label files to look for, by the given encoding. Training ids may be in files that bear the layout's usual name.
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
    """The data at hand cannot be used; the message names the file or folder, what was expected and what was found."""


@dataclass(frozen=True)
class Item:
    """One image and its label image; a test image has none.

    Attributes:
        given_encoding: of the label image, "ids" or "trainids"; None if only its file name tells.
    """

    image: Path
    label: Path | None
    given_encoding: str | None = None

    @property
    def name(self) -> str:
        """The image's file name without its extension, by which predictions are named."""
        return self.image.stem

    @property
    def frame(self) -> str:
        """<city>_<sequence>_<frame>, by which the benchmark's server knows the image."""
        return self.name.removesuffix("_leftImg8bit")

    @property
    def encoding(self) -> str:
        """How to read the label image, "ids" or "trainids": as given, or else as its file name says."""
        named = "trainids" if self.label is not None and "labeltrainids" in self.label.name.lower() else "ids"
        return self.given_encoding or named


def scan(root: str | Path, split: str, encoding: str | None = None) -> list[Item]:
    """All images of a split (train, val, test or trainval), sorted; those of test without labels.

    Hidden files and folders are not looked at.

    Args:
        encoding: of the label images, "ids" or "trainids"; if None, as their file names say: _labelIds if there is such
            a file, or else _labelTrainIds.

    Raises:
        DatasetError: there is no such folder, no image in it, an image of another format, or one without label.
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
    """No image is left out because its name ends otherwise than in the layout."""
    names = folder.glob(f"[!.]*/[!.]*{Path(_IMAGE_SUFFIX).stem}.*")
    others = sorted(path for path in names if path.suffix.lower() in _OTHER_IMAGES and path.suffix != ".png")
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise DatasetError(f"{folder}: expected every image as *{_IMAGE_SUFFIX}, found {others[0]}{more}")


def _label_of(image: Path, folder: Path, encoding: str | None) -> Path:
    """The image's label file: of the possible names the first one that exists, or else the first."""
    suffixes = [_LABEL_SUFFIXES[kind] for kind in _PREFERRED[encoding]]
    stem = image.name.removesuffix(_IMAGE_SUFFIX)
    paths = [folder / image.parent.name / (stem + suffix) for suffix in suffixes]
    return next((path for path in paths if path.is_file()), paths[0])


def _found(root: Path, part: str) -> str:
    """What there is instead of the images, from the innermost expected folder that exists."""
    for folder in (root / "leftImg8bit" / part, root / "leftImg8bit", root):
        if folder.is_dir():
            names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.glob("[!.]*"))
            more = ", ..." if len(names) > 8 else ""
            return f"{folder} holds {', '.join(names[:8]) + more if names else 'nothing'}"
    return f"{root} is a file, not a folder" if root.exists() else f"{root} does not exist"


def read_list(
    root: str | Path, list_path: str | Path, encoding: str | None = None, need_labels: bool = False
) -> list[Item]:
    """The images named in a list file: a line each, image and label relative to root, or the image alone.

    Paths are separated by a tab, or else by spaces; those that hold spaces may be quoted as in a shell. A line that
    begins with # is a comment.

    Args:
        encoding: of the label images, "ids" or "trainids"; None if their file names tell.
        need_labels: every image must have a label.

    Raises:
        DatasetError: the file cannot be read, a line has another form or lacks a label that is needed, or a file it
            names does not exist.
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
    """Every file is there."""
    for what, paths in (
        ("image", [item.image for item in items if not item.image.is_file()]),
        ("label", [item.label for item in items if item.label is not None and not item.label.is_file()]),
    ):
        if paths:
            shown = "".join(f"\n    {path}" for path in paths[:5]) + ("\n    ..." if len(paths) > 5 else "")
            raise DatasetError(f"{source}: {len(paths)} of {len(items)} {what} files do not exist:{shown}")
