"""Finding the images of a data set and their labels: in a Cityscapes folder, or named in a list file."""

from dataclasses import dataclass
from pathlib import Path

SPLITS = {"train": ("train",), "val": ("val",), "test": ("test",), "trainval": ("train", "val")}
_IMAGE_SUFFIX = "_leftImg8bit.png"
_LABEL_SUFFIX = "_gtFine_labelIds.png"
_LAYOUT = """expected the Cityscapes layout:
    <data-dir>/leftImg8bit/<split>/<city>/<city>_<sequence>_<frame>_leftImg8bit.png
    <data-dir>/gtFine/<split>/<city>/<city>_<sequence>_<frame>_gtFine_labelIds.png"""


class DatasetError(ValueError):
    """The data at hand cannot be used; the message names the file or folder, what was expected and what was found."""


@dataclass(frozen=True)
class Item:
    """One image and its label image; a test image has none."""

    image: Path
    label: Path | None

    @property
    def name(self) -> str:
        """The image's file name without its extension, by which predictions are named."""
        return self.image.stem

    @property
    def frame(self) -> str:
        """<city>_<sequence>_<frame>, by which the benchmark's server knows the image."""
        return self.name.removesuffix("_leftImg8bit")


def scan(root: str | Path, split: str) -> list[Item]:
    """All images of a split (train, val, test or trainval), sorted; those of test without labels.

    Raises:
        DatasetError: there is no such folder, no image in it, or an image without label.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    root = Path(root)
    items: list[Item] = []
    for part in SPLITS[split]:
        images = sorted((root / "leftImg8bit" / part).glob(f"*/*{_IMAGE_SUFFIX}"))
        if not images:
            raise DatasetError(f"{root}: no images of the split {part!r}; {_LAYOUT}\nfound: {_found(root, part)}")
        for image in images:
            name = image.name.removesuffix(_IMAGE_SUFFIX) + _LABEL_SUFFIX
            label = None if part == "test" else root / "gtFine" / part / image.parent.name / name
            items.append(Item(image, label))
    _check_files(items, f"{root}, split {split!r}")
    return items


def _found(root: Path, part: str) -> str:
    """What there is instead of the images, from the innermost expected folder that exists."""
    for folder in (root / "leftImg8bit" / part, root / "leftImg8bit", root):
        if folder.is_dir():
            names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
            more = ", ..." if len(names) > 8 else ""
            return f"{folder} holds {', '.join(names[:8]) + more if names else 'nothing'}"
    return f"{root} is a file, not a folder" if root.exists() else f"{root} does not exist"


def read_list(root: str | Path, list_path: str | Path) -> list[Item]:
    """The images named in a list file: a line each, image and label relative to root, or the image alone.

    Raises:
        DatasetError: the file cannot be read, a line has another form, or a file it names does not exist.
    """
    root = Path(root)
    try:
        lines = Path(list_path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{list_path}: expected a list file (image and label path a line): {error}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        match line.split():
            case []:
                continue
            case [image]:
                items.append(Item(root / image, None))
            case [image, label]:
                items.append(Item(root / image, root / label))
            case columns:
                raise DatasetError(
                    f"{list_path}, line {number}: expected 1 or 2 columns, found {len(columns)}: {line!r}"
                )
    if not items:
        raise DatasetError(f"{list_path}: expected image and label paths, found no line")
    _check_files(items, str(list_path))
    return items


def _check_files(items: list[Item], source: str) -> None:
    """Every file is there."""
    for what, paths in (
        ("image", [item.image for item in items if not item.image.is_file()]),
        ("label", [item.label for item in items if item.label is not None and not item.label.is_file()]),
    ):
        if paths:
            shown = "".join(f"\n    {path}" for path in paths[:5]) + ("\n    ..." if len(paths) > 5 else "")
            raise DatasetError(f"{source}: {len(paths)} of {len(items)} {what} files do not exist:{shown}")
