"""Checks before a run that the labels of a data set are usable for training or evaluation."""

from collections.abc import Iterable

from .classes import ClassTable
from .items import DatasetError, Item
from .samples import Value, count_values, read_label, to_train_ids

# Number of label images that are searched for values that only label ids have.
_FIRST = 16


def check_labels(items: Iterable[Item], classes: ClassTable) -> None:
    """Refuse labels that would make a run meaningless. Usually it reads only the first label image.

    The result depends on the files alone, so that it is the same in all processes.

    Raises:
        DatasetError: the first label images seem to hold training ids, though neither the given encoding nor their
            names say so; or no label image has a pixel of a class; or one cannot be read.
    """
    labelled = [item for item in items if item.label is not None]
    if classes.training_ids:
        unnamed = [item for item in labelled if item.given_encoding is None and item.encoding == "ids"]
        _check_encoding(unnamed[:_FIRST], classes)
    _check_classes(labelled, classes)


def _check_encoding(items: list[Item], classes: ClassTable) -> None:
    """Raise a DatasetError unless some label image has a value that only label ids have."""
    found: set[Value] = set()
    training_ids: set[Value] = {*range(len(classes)), classes.ignore_label, -1}
    for item in items:
        label = read_label(item, classes)
        to_train_ids(label, item, classes)  # an error if a value is not in the table
        found |= count_values(label).keys()
        if found - training_ids:
            return
    if items:
        raise DatasetError(
            f"{items[0].label}: expected {classes.describe('ids')}, found in the first {len(items)} label images only "
            f"{_listed(found)}; if they are {classes.describe('trainids')}, give --label-encoding trainids, if they "
            "are label ids all the same, --label-encoding ids; if they are of other classes, --classes"
        )


def _check_classes(items: list[Item], classes: ClassTable) -> None:
    """Raise a DatasetError unless some label image has a pixel of a class."""
    found: set[Value] = set()
    for item in items:
        label = read_label(item, classes)
        if (to_train_ids(label, item, classes) != classes.ignore_label).any():
            return
        found |= count_values(label).keys()
    if items:
        encodings = " or ".join(classes.describe(name) for name in sorted({item.encoding for item in items}))
        raise DatasetError(
            f"{items[0].label}: expected {encodings}, found no pixel of a class in this and all other label images, "
            f"{len(items)} in all: they hold only {_listed(found)}"
        )


def _listed(values: set[Value]) -> str:
    return "the values " + ", ".join(map(str, sorted(values)))
