"""Checks before a run that the labels of a data set are usable for training or evaluation."""

from collections.abc import Iterable

import numpy as np

from .images import ImageFile
from .items import DatasetError, Item
from .labels import ENCODINGS, IGNORE_LABEL, KNOWN_VALUES, train_id_table

# Number of label images that are searched for values that only label ids have.
_FIRST = 16


def check_labels(items: Iterable[Item]) -> None:
    """Refuse labels that would make a run meaningless. Usually it reads only the first label image.

    The result depends on the files alone, so that it is the same in all processes.

    Raises:
        DatasetError: the first label images seem to hold training ids, though neither the given encoding nor their
            names say so; or no label image has a pixel of a trained class; or one cannot be read.
    """
    labelled = [item for item in items if item.label is not None]
    _check_encoding([item for item in labelled if item.given_encoding is None and item.encoding == "ids"][:_FIRST])
    _check_classes(labelled)


def _check_encoding(items: list[Item]) -> None:
    """Raise a DatasetError unless some label image has a value that only label ids have."""
    found = np.zeros(256, dtype=bool)
    for item in items:
        found |= _values(item)
        if (found & ~KNOWN_VALUES["trainids"]).any():
            return
    if items:
        raise DatasetError(
            f"{items[0].label}: expected {ENCODINGS['ids']}, found in the first {len(items)} label images only "
            f"{_listed(found)}; if they are {ENCODINGS['trainids']}, give --label-encoding trainids, if they are "
            "label ids all the same, --label-encoding ids; labels of other classes cannot be used"
        )


def _check_classes(items: list[Item]) -> None:
    """Raise a DatasetError unless some label image has a pixel of a trained class."""
    found = np.zeros(256, dtype=bool)
    for item in items:
        values = _values(item)
        if (train_id_table(item.encoding)[values] != IGNORE_LABEL).any():
            return
        found |= values
    if items:
        encodings = " or ".join(ENCODINGS[name] for name in sorted({item.encoding for item in items}))
        raise DatasetError(
            f"{items[0].label}: expected {encodings}, found no pixel of a trained class in this and all other label "
            f"images, {len(items)} in all: they hold only {_listed(found)}"
        )


def _values(item: Item) -> np.ndarray:
    """bool [256]: the values that occur in the item's label image."""
    assert item.label is not None
    return np.bincount(ImageFile(item.label).read_label(encoding=item.encoding).ravel(), minlength=256) > 0


def _listed(values: np.ndarray) -> str:
    return "the values " + ", ".join(map(str, np.flatnonzero(values)))
