"""Training and evaluation samples, as torch datasets."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .classes import CITYSCAPES, ClassTable, colour_codes
from .images import Box, ImageFile
from .items import DatasetError, Item
from .sampler import AUGMENTATION_STREAM
from .transforms import (
    draw_crop,
    normalise,
    pad_label,
    resize_image,
    resize_label,
    rotate_image,
    rotate_label,
    scale_tenths,
    source_box,
)

Value = int | tuple[int, ...]


def _open_label(item: Item, image: ImageFile | None) -> ImageFile:
    if item.label is None:
        raise DatasetError(f"{item.image}: expected a label image beside it, it has none")
    label = ImageFile(item.label)
    if image is not None and label.size != image.size:
        turned = [file.path.name for file in (image, label) if file.is_turned]
        raise DatasetError(
            f"{item.label}: expected the size of its image {item.image.name}, {image.size[0]}x{image.size[1]}, "
            f"found {label.size[0]}x{label.size[1]}"
            + (f", after turning {' and '.join(turned)} as the EXIF orientation says" if turned else "")
        )
    return label


def read_label(
    item: Item, classes: ClassTable | None, image: ImageFile | None = None, box: Box | None = None
) -> np.ndarray:
    """The values [height, width] or colours [height, width, 3] of the item's label image, or of the part in the box.

    Args:
        classes: has label colours if those of an image with three channels are meant, and not one value in all of them;
            None if that is not known.
        image: the item's image, whose size the label must have.

    Raises:
        DatasetError: there is no label, it has another size, or colours that nobody expects.
    """
    label = _open_label(item, image)
    values = label.read_label(box)
    if values.ndim == 2 or (classes is not None and classes.has_label_colours):
        return values
    coloured = (values != values[..., :1]).any(-1)
    if classes is None and coloured.any():
        return values
    if coloured.any():
        raise DatasetError(
            f"{label.path}: expected label values, in one channel or the same in three, found the colour "
            f"{tuple(values[coloured][0].tolist())}; colours are read where the class table has label_colours"
        )
    return values[..., 0]


def read_train_ids(
    item: Item,
    classes: ClassTable,
    ignore_label: int | None = None,
    image: ImageFile | None = None,
    box: Box | None = None,
) -> np.ndarray:
    """The training ids [height, width] of the item's label image, or of the part of it in the box.

    Args:
        ignore_label: for void; by default the class table's.
        image: the item's image, whose size the label must have.

    Raises:
        DatasetError: as `read_label`, or a value is not in the class table.
    """
    return to_train_ids(read_label(item, classes, image, box), item, classes, ignore_label)


def to_train_ids(label: np.ndarray, item: Item, classes: ClassTable, ignore_label: int | None = None) -> np.ndarray:
    """The training ids of what `read_label` returned for the item; see `read_train_ids`."""
    try:
        return classes.train_ids(label, item.encoding, ignore_label)
    except ValueError as error:
        raise DatasetError(f"{item.label}: {error}") from None


def count_values(label: np.ndarray) -> dict[Value, int]:
    """The number of pixels of each value, or colour, of what `read_label` returned."""
    if label.ndim == 3:
        codes, counts = np.unique(colour_codes(label), return_counts=True)
        colours = [(code >> 16, code >> 8 & 255, code & 255) for code in codes.tolist()]
        return dict(zip(colours, counts.tolist(), strict=True))
    if label.dtype == np.uint8:
        counts = np.bincount(label.ravel(), minlength=256)
        return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}
    values, counts = np.unique(label, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


class TrainingSet(Dataset):
    """Augmented training samples, indexed by (epoch, index).

    A sample depends on (seed, epoch, index) alone, which seed its random generator.

    Args:
        items: images with labels.
        crop_size: (height, width) of the samples.
        classes: what the label images mean.
        ignore_label: training label of void and padded pixels; by default the class table's.
        random_scale: scale by a multiple of 0.1 drawn uniformly from (LOW, HIGH); True: the recipe's 0.7, 0.8, ... 2.1.
        random_mirror: mirror with probability 1/2.
        random_rotate: rotate about the crop's centre by an angle drawn uniformly from [-random_rotate, random_rotate]
            degrees.
        seed: seed of the augmentation.

    Raises:
        ValueError: random_scale is not as `scale_tenths` expects.
    """

    def __init__(
        self,
        items: list[Item],
        crop_size: tuple[int, int],
        classes: ClassTable = CITYSCAPES,
        ignore_label: int | None = None,
        random_scale: bool | tuple[float, float] = True,
        random_mirror: bool = True,
        seed: int = 0,
        random_rotate: float = 0,
    ):
        scale_tenths(random_scale)  # an error if there are no such scales
        self.items = items
        self.crop_size = crop_size
        self.classes = classes
        self.ignore_label = classes.ignore_label if ignore_label is None else ignore_label
        self.random_scale = random_scale
        self.random_mirror = random_mirror
        self.seed = seed
        self.random_rotate = random_rotate

    def __len__(self) -> int:
        return len(self.items)

    def item(self, key: tuple[int, int]) -> Item:
        """The files of a sample."""
        return self.items[key[1]]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """{"image": float32 [3, h, w], "label": [h, w] training ids, "name": str}.

        The label is uint8, or int32 if there are more than 255 classes.
        """
        epoch, index = key
        item = self.item(key)
        generator = np.random.default_rng([self.seed, AUGMENTATION_STREAM, epoch, index])
        image = ImageFile(item.image)
        crop = draw_crop(
            generator, image.size, self.crop_size, self.random_scale, self.random_mirror, self.random_rotate
        )
        box = source_box(crop)
        pixels = rotate_image(resize_image(image.read_colour(box), crop), crop)
        train_ids = resize_label(read_train_ids(item, self.classes, self.ignore_label, image, box), crop)
        train_ids = rotate_label(train_ids, crop, self.ignore_label)
        return {
            "image": torch.from_numpy(normalise(pixels, self.crop_size, crop.mirror)),
            "label": _tensor(pad_label(train_ids, self.crop_size, self.ignore_label, crop.mirror)),
            "name": item.name,
        }


class EvaluationSet(Dataset):
    """Whole images, normalised, in order.

    Args:
        items: images, with or without labels.
        classes: what the label images mean.
        ignore_label: label of void pixels; by default the class table's.
    """

    def __init__(self, items: list[Item], classes: ClassTable = CITYSCAPES, ignore_label: int | None = None):
        self.items = items
        self.classes = classes
        self.ignore_label = ignore_label

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> Item:
        """The files of a sample."""
        return self.items[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": float32 [3, H, W], "label": [H, W] training ids or None, "item": Item}."""
        item = self.item(index)
        image = ImageFile(item.image)
        label = None
        if item.label is not None:
            label = _tensor(read_train_ids(item, self.classes, self.ignore_label, image))
        return {"image": torch.from_numpy(normalise(image.read_colour())), "label": label, "item": item}


def _tensor(train_ids: np.ndarray) -> torch.Tensor:
    """uint8, or int32 since PyTorch computes little in uint16."""
    return torch.from_numpy(train_ids if train_ids.dtype == np.uint8 else train_ids.astype(np.int32))
