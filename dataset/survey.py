"""What a data set holds: sizes, shares of the classes, and everything that is wrong with its files."""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from .classes import ClassTable
from .images import ImageFile
from .items import DatasetError, Item
from .samples import Value, count_values, read_label


@dataclass
class Survey:
    """What some images and their labels hold.

    Attributes:
        images: number of images.
        labels: number of label images that could be read.
        sizes: number of images of each (height, width).
        pixels: number of pixels of each label value or colour, by the encoding of the file.
        files: a file that has it.
        problems: one line for each file that cannot be used.
    """

    images: int = 0
    labels: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: Counter[tuple[str, Value]] = field(default_factory=Counter)
    files: dict[tuple[str, Value], Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, other: "Survey") -> None:
        self.images += other.images
        self.labels += other.labels
        self.sizes += other.sizes
        self.pixels += other.pixels
        self.files = other.files | self.files
        self.problems += other.problems

    def shares(self, classes: ClassTable) -> tuple[list[float], float, dict[Value, Path]]:
        """The share of pixels of each class and of void, and the values not in the table with a file that has each."""
        counts, unknown = Counter[int](), dict[Value, Path]()
        for (encoding, value), count in self.pixels.items():
            try:
                pixel = np.array([[value]], dtype=np.int64 if isinstance(value, int) else np.uint8)
                counts[int(classes.train_ids(pixel, encoding).item())] += count
            except ValueError:
                unknown[value] = self.files[encoding, value]
        total = max(sum(self.pixels.values()), 1)
        return [counts[k] / total for k in range(len(classes))], counts[classes.ignore_label] / total, unknown


def survey(items: Iterable[Item], classes: ClassTable | None, num_workers: int) -> Survey:
    """Decode all images and labels, in several processes. Nothing that is wrong with them is an error here."""
    total = Survey()
    with ProcessPoolExecutor(num_workers) as pool:
        for one in pool.map(partial(_survey_one, classes=classes), items, chunksize=8):
            total.add(one)
    return total


def _survey_one(item: Item, classes: ClassTable | None) -> Survey:
    found = Survey(images=1)
    image = None
    try:
        image = ImageFile(item.image)
        found.sizes[image.size] += 1
        image.read_colour()
    except DatasetError as error:
        found.problems.append(" ".join(str(error).split()))
    if item.label is None:
        return found
    if not item.label.is_file():
        found.problems.append(f"{item.label}: expected the label of {item.image.name}, does not exist")
        return found
    try:
        label = read_label(item, classes, image)
        found.labels = 1
        for value, count in count_values(label).items():
            found.pixels[item.encoding, value] = count
            found.files[item.encoding, value] = item.label
    except DatasetError as error:
        found.problems.append(" ".join(str(error).split()))
    return found
