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
from .tv_transforms import Transform, label_tensor, transformed

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
    """Augmented training samples, indexed by (epoch, index), or by an index, which is of the epoch of `set_epoch`.

    A sample depends on (seed, epoch, index) alone, which seed its random generator.

    Args:
        items: images with labels.
        crop_size: (height, width) of the samples.
        classes: what the label images mean.
        ignore_label: training label of void and padded pixels; by default the class table's.
        random_scale: scale by a multiple of 0.1 drawn uniformly from (LOW, HIGH); True: the recipe's 0.7, 0.8, ... 2.1.
        random_mirror: mirror with probability 1/2.
        seed: seed of the augmentation.
        random_rotate: rotate about the crop's centre by an angle drawn uniformly from [-random_rotate, random_rotate]
            degrees.
        transform: of torchvision.transforms.v2, or like one, for the crop before it is padded and mirrored; see
            `Transform`.

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
        transform: Transform | None = None,
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
        self.transform = transform
        self._epoch = torch.tensor(0).share_memory_()  # workers that persist see it change

    def __len__(self) -> int:
        return len(self.items)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of plain indices, in which a DataLoader asks for samples. Call it before each pass."""
        self._epoch.fill_(epoch)

    def _key(self, key: int | tuple[int, int]) -> tuple[int, int]:
        """(epoch, index), with an index from 0."""
        epoch, index = key if isinstance(key, tuple) else (int(self._epoch), key)
        return epoch, range(len(self.items))[index]

    def item(self, key: int | tuple[int, int]) -> Item:
        """The files of a sample."""
        return self.items[self._key(key)[1]]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """{"image": float32 [3, h, w], "label": [h, w] training ids, "name": str}.

        The label is uint8, or int32 if there are more than 255 classes.
        """
        epoch, index = self._key(key)
        item = self.items[index]
        generator = np.random.default_rng([self.seed, AUGMENTATION_STREAM, epoch, index])
        image = ImageFile(item.image)
        crop = draw_crop(
            generator, image.size, self.crop_size, self.random_scale, self.random_mirror, self.random_rotate
        )
        box = source_box(crop)
        pixels = rotate_image(resize_image(image.read_colour(box), crop), crop)
        train_ids = resize_label(read_train_ids(item, self.classes, self.ignore_label, image, box), crop)
        train_ids = rotate_label(train_ids, crop, self.ignore_label)
        if self.transform is not None:
            pixels, train_ids = transformed(self.transform, pixels, train_ids, generator, item)
            self._check_size(pixels, item)
        return {
            "image": torch.from_numpy(normalise(pixels, self.crop_size, crop.mirror)),
            "label": label_tensor(pad_label(train_ids, self.crop_size, self.ignore_label, crop.mirror)),
            "name": item.name,
        }

    def _check_size(self, pixels: np.ndarray, item: Item) -> None:
        """Raise a DatasetError if the transform has made the crop larger."""
        (height, width), (most_rows, most_columns) = pixels.shape[:2], self.crop_size
        if height > most_rows or width > most_columns:
            raise DatasetError(
                f"{item.image}: expected the transform to return at most {most_rows}x{most_columns}, the crop's size, "
                f"got {height}x{width}"
            )


class EvaluationSet(Dataset):
    """Whole images, normalised, in order.

    Args:
        items: images, with or without labels.
        classes: what the label images mean.
        ignore_label: label of void pixels; by default the class table's.
        transform: of torchvision.transforms.v2, or like one; see `Transform`.
        seed: with the index, seed of what the transform draws.
    """

    def __init__(
        self,
        items: list[Item],
        classes: ClassTable = CITYSCAPES,
        ignore_label: int | None = None,
        transform: Transform | None = None,
        seed: int = 0,
    ):
        self.items = items
        self.classes = classes
        self.ignore_label = ignore_label
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> Item:
        """The files of a sample."""
        return self.items[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": float32 [3, H, W], "label": [H, W] training ids, if it has one, "name": str, "index": int}."""
        index = range(len(self.items))[index]
        item = self.items[index]
        image = ImageFile(item.image)
        pixels, train_ids = image.read_colour(), None
        if item.label is not None:
            train_ids = read_train_ids(item, self.classes, self.ignore_label, image)
        if self.transform is not None:
            generator = np.random.default_rng([self.seed, AUGMENTATION_STREAM, index])
            pixels, train_ids = transformed(self.transform, pixels, train_ids, generator, item)
        sample = {"image": torch.from_numpy(normalise(pixels)), "name": item.name, "index": index}
        return sample if train_ids is None else sample | {"label": label_tensor(train_ids)}
