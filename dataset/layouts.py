"""Finding the images and labels of a data set by the layout of its folder.

Each layout is a function that returns the items of a part of the data set (train, val, test), sorted, and an entry of
LAYOUTS. Hidden files and folders are ignored.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .classes import ClassTable, load_classes
from .items import DatasetError, Item, check_files

# The splits, and the parts that they are made of.
SPLITS = {
    "train": ("train",),
    "val": ("val",),
    "test": ("test",),
    "trainval": ("train", "val"),
    "train_extra": ("train_extra",),
}
# Names of the folder of a part, in order of preference
_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # in any case
_LABEL_FOLDERS = ("labels", "annotations", "masks")


def _files(folder: Path) -> list[Path]:
    """All image files below the folder, sorted."""
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES]
    return sorted(path for path in paths if not any(part[0] == "." for part in path.relative_to(folder).parts))


def _folder(root: Path, part: str) -> Path:
    """The folder of a part in `root`: the first possible name that exists, or else the first possible name."""
    paths = [root / name for name in _FOLDERS.get(part, (part,))]
    return next((path for path in paths if path.is_dir()), paths[0])


def _beside(folder: Path, image: Path, image_folder: Path, endings: tuple[str, ...] = ("",)) -> Path:
    """The label in `folder` for an image: of its name or, with one of the endings, in any format."""
    stem = folder / image.relative_to(image_folder).with_suffix("")
    candidates = [stem.with_name(stem.name + ending + suffix) for ending in endings for suffix in _LABEL_SUFFIXES]
    return next((path for path in candidates if path.is_file()), candidates[0])


_LABEL_SUFFIXES = tuple(s for suffix in _IMAGE_SUFFIXES for s in (suffix, suffix.upper()))


# ---- Cityscapes ----

_CITYSCAPES_IMAGE = "_leftImg8bit.png"
# Label files to look for, by the given encoding, in order of preference. Files with the usual name, _labelIds, may hold
# training ids.
_CITYSCAPES_LABELS: dict[str | None, tuple[str, ...]] = {
    None: ("labelIds", "labelTrainIds"),
    "ids": ("labelIds",),
    "trainids": ("labelTrainIds", "labelIds"),
}


def _cityscapes(root: Path, part: str, encoding: str | None) -> list[Item]:
    """The fine labels or, where there are none for the part, the coarse ones."""
    folder = root / "leftImg8bit" / part
    names = folder.glob(f"[!.]*/[!.]*{Path(_CITYSCAPES_IMAGE).stem}.*")
    others = sorted(path for path in names if path.suffix.lower() in _IMAGE_SUFFIXES and path.suffix != ".png")
    if others:  # .PNG is not .png
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise DatasetError(f"{folder}: expected every image as *{_CITYSCAPES_IMAGE}, found {others[0]}{more}")
    kind = "gtFine" if (root / "gtFine" / part).is_dir() or not (root / "gtCoarse" / part).is_dir() else "gtCoarse"

    def label(image: Path) -> Path:
        stem = image.name.removesuffix(_CITYSCAPES_IMAGE)
        names = [f"{stem}_{kind}_{name}.png" for name in _CITYSCAPES_LABELS[encoding]]
        paths = [root / kind / part / image.parent.name / name for name in names]
        return next((path for path in paths if path.is_file()), paths[0])

    images = sorted(folder.glob(f"[!.]*/[!.]*{_CITYSCAPES_IMAGE}"))
    return [Item(image, None if part == "test" else label(image), encoding) for image in images]


# ---- folders of images and of labels ----


def _label_folder(root: Path) -> Path | None:
    return next((root / name for name in _LABEL_FOLDERS if (root / name).is_dir()), None)


def _image_folders(root: Path, part: str, encoding: str | None) -> list[Item]:
    """A label has the name of its image, in the same subfolder; test images may have none."""
    images, labels = _folder(root / "images", part), _label_folder(root)
    of_part = labels and _folder(labels, part)
    has_labels = of_part is not None and (of_part.is_dir() or part != "test")
    endings = ("", "_mask", "_label", "_labels", "_gt")
    return [
        Item(image, _beside(of_part, image, images, endings) if of_part and has_labels else None, encoding)
        for image in _files(images)
    ]


# ---- PASCAL VOC ----


def _voc_root(root: Path) -> Path:
    """The folder with JPEGImages: root, or VOC2012 in it, as the archive unpacks."""
    return next((path for path in (root, root / "VOC2012", root / "VOCdevkit/VOC2012") if _is_voc(path)), root)


def _is_voc(root: Path) -> bool:
    return (root / "JPEGImages").is_dir()


def _voc(root: Path, part: str, encoding: str | None) -> list[Item]:
    """The images that ImageSets/Segmentation lists; those of test have no labels."""
    root = _voc_root(root)
    path = root / "ImageSets" / "Segmentation" / f"{part}.txt"
    if not path.is_file():
        return []
    names = path.read_text().split()
    labels = {name: None if part == "test" else root / "SegmentationClass" / f"{name}.png" for name in names}
    return [Item(root / "JPEGImages" / f"{name}.jpg", label, encoding) for name, label in sorted(labels.items())]


# ---- CamVid ----

# Of the sequences, in the field's usual split: those of a part, and the first and last frame.
_CAMVID_SEQUENCES = {
    "train": (("0001TP", 0, 8549), ("0006R0", 0, 99999), ("0016E5", 0, 7958), ("0016E5", 8160, 99999)),
    "val": (("0016E5", 7959, 8159),),
    "test": (("0001TP", 8550, 99999), ("Seq05VD", 0, 99999)),
}


def _camvid_folders(root: Path, part: str, encoding: str | None) -> list[Item]:
    """train/ and trainannot/, val/ and valannot/, test/ and testannot/."""
    images, labels = root / part, root / f"{part}annot"
    return [Item(image, _beside(labels, image, images), encoding) for image in _files(images)]


def _camvid_original(root: Path, part: str, encoding: str | None) -> list[Item]:
    """All frames in 701_StillsRaw_full, colour labels *_L.png in LabeledApproved_full; split by their numbers."""
    images = root / "701_StillsRaw_full"
    labels = root / "LabeledApproved_full"

    def is_in_part(path: Path) -> bool:
        name = re.match(r"([^_]+)_f?(\d+)", path.stem)
        sequences = _CAMVID_SEQUENCES.get(part, ())
        return any(name and name[1] == of and first <= int(name[2]) <= last for of, first, last in sequences)

    return [Item(path, labels / f"{path.stem}_L.png", encoding) for path in _files(images) if is_in_part(path)]


# ---- all of them ----

Find = Callable[[Path, str, str | None], list[Item]]


@dataclass(frozen=True)
class Layout:
    """A layout of folders.

    Attributes:
        name: in messages.
        folders: that it has, any of them, by which it is recognised; relative to the root.
        expected: its files, in messages.
        find: the items of a part of the data set.
        classes: name of the class table that belongs to it; None: the user has to say.
    """

    name: str
    folders: tuple[str, ...]
    expected: str
    find: Find
    classes: str | None = None

    def fits(self, root: Path) -> bool:
        return any((root / folder).is_dir() for folder in self.folders)


LAYOUTS = (
    Layout(
        "Cityscapes",
        ("leftImg8bit",),
        "leftImg8bit/<split>/<city>/<city>_<sequence>_<frame>_leftImg8bit.png, "
        "gtFine/<split>/<city>/<city>_<sequence>_<frame>_gtFine_labelIds.png (or gtCoarse)",
        _cityscapes,
        "cityscapes",
    ),
    Layout(
        "VOC",
        ("JPEGImages", "VOC2012/JPEGImages", "VOCdevkit/VOC2012/JPEGImages"),
        "JPEGImages/<name>.jpg, SegmentationClass/<name>.png, ImageSets/Segmentation/<split>.txt",
        _voc,
        "voc2012",
    ),
    Layout(
        "CamVid's original",
        ("701_StillsRaw_full",),
        "701_StillsRaw_full/<name>.png, LabeledApproved_full/<name>_L.png",
        _camvid_original,
        "camvid",
    ),
    Layout(
        "CamVid", ("trainannot", "valannot"), "<split>/<name>.png, <split>annot/<name>.png", _camvid_folders, "camvid"
    ),
    Layout(
        "ADE20K",
        ("annotations/training",),
        "images/training/<name>.jpg, annotations/training/<name>.png, and validation/ in both",
        _image_folders,
        "ade20k",
    ),
    Layout(
        "folders", ("images",), f"images/<split>/<name>, {'|'.join(_LABEL_FOLDERS)}/<split>/<name>.png", _image_folders
    ),
)


def _layout_that_fits(root: Path) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.fits(root)), None)


def find_layout(root: Path) -> Layout:
    """The layout of the folder.

    Raises:
        DatasetError: it has none that is known.
    """
    layout = _layout_that_fits(root)
    if layout is None:
        expected = "".join(f"\n    {layout.name}: {layout.expected}" for layout in LAYOUTS)
        raise DatasetError(f"{root}: expected a data set in one of these layouts:{expected}\nfound: {_found(root)}")
    return layout


def scan(root: str | Path, split: str, encoding: str | None = None) -> list[Item]:
    """All images of a split (train, val, test, trainval or Cityscapes' train_extra), sorted, with their labels.

    Args:
        encoding: encoding of the label images, "ids" or "trainids". If None, Cityscapes' _labelIds files are used where
            they exist, otherwise _labelTrainIds files.

    Raises:
        ValueError: there is no such split.
        DatasetError: the folder does not exist or has no images, or an image has another format or no label.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    root = Path(root)
    layout = find_layout(root)
    items: list[Item] = []
    for part in SPLITS[split]:
        found = layout.find(root, part, encoding)
        if not found:
            inner = _innermost(root, layout, part)
            raise DatasetError(
                f"{root}: no images of the split {part!r}; expected the layout of {layout.name}:\n    "
                f"{layout.expected}\nfound: {_found(inner)}"
            )
        items += found
    check_files(items, f"{root}, split {split!r}")
    return items


def find_images(paths: list[Path]) -> list[Item]:
    """Images without labels: files, and all images below folders, sorted.

    Raises:
        DatasetError: a path does not exist, or a folder holds no image.
    """
    items: list[Item] = []
    for path in paths:
        found = _files(path) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise DatasetError(f"{path}: expected an image or a folder of images ({', '.join(_IMAGE_SUFFIXES)})")
        items += [Item(image, None) for image in found]
    return items


def default_classes(root: Path) -> ClassTable | None:
    """The class table of a data set for which none is given: classes.toml in its folder, or its layout's; or None.

    Raises:
        DatasetError: classes.toml is no class table.
    """
    own = root / "classes.toml"
    if own.exists():
        return load_classes(own)
    layout = _layout_that_fits(root)
    return load_classes(layout.classes) if layout and layout.classes else None


def _innermost(root: Path, layout: Layout, part: str) -> Path:
    """The innermost folder that exists of where the images of a part should be."""
    first = next(root / folder for folder in layout.folders if (root / folder).is_dir())
    images = first if first.name != "training" else root / "images"
    return next((path for path in (_folder(images, part), images) if path.is_dir()), root)


def _found(folder: Path) -> str:
    """What a folder holds, for messages."""
    if not folder.is_dir():
        return f"{folder} is a file, not a folder" if folder.exists() else f"{folder} does not exist"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.glob("[!.]*"))
    more = ", ..." if len(names) > 8 else ""
    return f"{folder} holds {', '.join(names[:8]) + more if names else 'nothing'}"
