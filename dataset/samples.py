"""Training and evaluation samples, as torch datasets."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .images import ImageFile
from .items import DatasetError, Item
from .labels import ENCODINGS, IGNORE_LABEL, train_id_table
from .sampler import AUGMENTATION_STREAM
from .transforms import draw_crop, normalise, pad_label, resize_image, resize_label, source_box


def _open_label(item: Item, image: ImageFile) -> ImageFile:
    if item.label is None:
        raise DatasetError(f"{item.image}: expected a label image beside it, it has none")
    label = ImageFile(item.label)
    if label.size != image.size:
        turned = [file.path.name for file in (image, label) if file.is_turned]
        raise DatasetError(
            f"{item.label}: expected the size of its image {item.image.name}, {image.size[0]}x{image.size[1]}, "
            f"found {label.size[0]}x{label.size[1]}"
            + (f", after turning {' and '.join(turned)} as the EXIF orientation says" if turned else "")
        )
    return label


def _train_id_tables(ignore_label: int) -> dict[str, np.ndarray]:
    return {encoding: train_id_table(encoding, ignore_label) for encoding in ENCODINGS}


class TrainingSet(Dataset):
    """Augmented training samples, indexed by (epoch, index).

    A sample depends on (seed, epoch, index) alone, which seed its random generator.

    Args:
        items: images with labels.
        crop_size: (height, width) of the samples.
        ignore_label: training label of void and padded pixels, 0..255.
        random_scale: scale by one of 0.7, 0.8, ... 2.1, drawn uniformly.
        random_mirror: mirror with probability 1/2.
        seed: seed of the augmentation.
    """

    def __init__(
        self,
        items: list[Item],
        crop_size: tuple[int, int],
        ignore_label: int = IGNORE_LABEL,
        random_scale: bool = True,
        random_mirror: bool = True,
        seed: int = 0,
    ):
        self.items = items
        self.crop_size = crop_size
        self.ignore_label = ignore_label
        self.random_scale = random_scale
        self.random_mirror = random_mirror
        self.seed = seed
        self._train_ids = _train_id_tables(ignore_label)

    def __len__(self) -> int:
        return len(self.items)

    def item(self, key: tuple[int, int]) -> Item:
        """The files of a sample."""
        return self.items[key[1]]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """{"image": float32 [3, h, w], "label": uint8 [h, w] training ids, "name": str}."""
        epoch, index = key
        item = self.item(key)
        generator = np.random.default_rng([self.seed, AUGMENTATION_STREAM, epoch, index])
        image = ImageFile(item.image)
        label = _open_label(item, image)
        crop = draw_crop(generator, image.size, self.crop_size, self.random_scale, self.random_mirror)
        box = source_box(crop)
        pixels = resize_image(image.read_colour(box), crop)
        values = resize_label(label.read_label(box, item.encoding), crop)
        train_ids = self._train_ids[item.encoding][values]
        return {
            "image": torch.from_numpy(normalise(pixels, self.crop_size, crop.mirror)),
            "label": torch.from_numpy(pad_label(train_ids, self.crop_size, self.ignore_label, crop.mirror)),
            "name": item.name,
        }


class EvaluationSet(Dataset):
    """Whole images, normalised, in order.

    Args:
        items: images, with or without labels.
        ignore_label: label of void pixels.
    """

    def __init__(self, items: list[Item], ignore_label: int = IGNORE_LABEL):
        self.items = items
        self._train_ids = _train_id_tables(ignore_label)

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> Item:
        """The files of a sample."""
        return self.items[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": float32 [3, H, W], "label": uint8 [H, W] or None, "item": Item}."""
        item = self.item(index)
        image = ImageFile(item.image)
        label = None
        if item.label is not None:
            values = _open_label(item, image).read_label(encoding=item.encoding)
            label = torch.from_numpy(self._train_ids[item.encoding][values])
        return {"image": torch.from_numpy(normalise(image.read_colour())), "label": label, "item": item}
