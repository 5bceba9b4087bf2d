"""Weights of the classes in the loss: by their frequencies in the label images, or from a file."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch.utils.data import BatchSampler

from .classes import ClassTable, read_toml
from .items import DatasetError, Item
from .loading import load_batches
from .samples import count_values, read_label, to_train_ids

BALANCED = "balanced"
# Of a file: what single precision can divide by, and more than anybody needs.
_LEAST, _GREATEST = 1e-6, 1e6
# Label images that a process counts at a time.
_BATCH = 8


def class_weights(source: str, items: list[Item], classes: ClassTable, num_workers: int) -> dict[str, float]:
    """The weight of each class, by name.

    Args:
        source: "balanced", for `balanced_weights` of the items, or the path of a file, for `read_weights`.
        num_workers: processes that count, or 0 for this one.

    Raises:
        DatasetError: as these.
    """
    weights = balanced_weights(items, classes, num_workers) if source == BALANCED else read_weights(source, classes)
    return dict(zip(classes.names, weights, strict=True))


def balanced_weights(items: list[Item], classes: ClassTable, num_workers: int) -> list[float]:
    """Median-frequency balancing (Eigen and Fergus 2015, arXiv 1411.4734).

    weight(c) = median of the frequencies / frequency(c), where frequency(c) is the number of pixels of class c over the
    number of all pixels of the images in which c occurs. The median is over the classes that occur.

    A class that does not occur has no frequency, and gets 1, the weight of the median. No loss of these images depends
    on that, and the weights stay positive, so that no mean is one over weights of 0.

    Raises:
        DatasetError: a label image cannot be read, or none has a pixel of a class.
    """
    pixels, of_images = _count(items, classes, num_workers)
    occurs = pixels > 0
    if not occurs.any():
        raise DatasetError(f"{items[0].label}: expected a pixel of a class in some label image, found none")
    frequencies = pixels[occurs] / of_images[occurs]
    weights = np.ones(len(classes))
    weights[occurs] = np.median(frequencies) / frequencies
    return weights.tolist()


class _Counts:
    """For each item's label image the pixels of each class, and all pixels where that is not 0: int64 [2, K]."""

    def __init__(self, items: list[Item], classes: ClassTable):
        self.items = items
        self.classes = classes

    def item(self, index: int) -> Item:
        return self.items[index]

    def __getitem__(self, index: int) -> np.ndarray:
        item = self.items[index]
        values = count_values(read_label(item, self.classes))
        counts = np.array(list(values.values()))
        train_ids = to_train_ids(np.array([list(values)]), item, self.classes)[0]
        pixels = np.zeros(self.classes.ignore_label + 1, dtype=np.int64)
        np.add.at(pixels, train_ids, counts)
        pixels = pixels[: len(self.classes)]
        return np.stack([pixels, np.where(pixels > 0, counts.sum(), 0)])


def _sum(counts: Iterable[np.ndarray]) -> np.ndarray:
    return np.sum(list(counts), axis=0)


def _count(items: list[Item], classes: ClassTable, num_workers: int) -> np.ndarray:
    """int64 [2, K]: the pixels of each class, and all pixels of the images in which it occurs."""
    batches = BatchSampler(range(len(items)), _BATCH, drop_last=False)
    return _sum(load_batches(_Counts(items, classes), batches, num_workers, collate=_sum))


def read_weights(path: str | Path, classes: ClassTable) -> list[float]:
    """The weights of a TOML file that has one for each class, by name: `road = 0.8` and `"traffic light" = 1.2`.

    Raises:
        DatasetError: it cannot be read, a class is missing or unknown, or a weight is no number from 1e-6 to 1e6.
    """
    content = read_toml(Path(path), "class weights")
    for what, names in (
        ("no weight of", [name for name in classes.names if name not in content]),
        ("unknown names:", [name for name in content if name not in classes.names]),
    ):
        if names:
            raise DatasetError(
                f"{path}: expected a weight for each of the {len(classes)} classes of {classes.name}, found {what} "
                f"{', '.join(names)}"
            )
    for name, weight in content.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not _LEAST <= weight <= _GREATEST:
            raise DatasetError(
                f"{path}: {name}: expected a weight, a number from {_LEAST:g} to {_GREATEST:g}, found {weight!r}"
            )
    return [float(content[name]) for name in classes.names]
