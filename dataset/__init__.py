"""Cityscapes: files, labels, augmentation, loading; and generated scenes in the same layout."""

from .cityscapes import EpochSampler, EvaluationSet, TrainingSet, load_batches, share
from .files import SPLITS, DatasetError, Item, read_list, scan
from .labels import CLASS_NAMES, IGNORE_LABEL, NUM_CLASSES

__all__ = [
    "CLASS_NAMES",
    "IGNORE_LABEL",
    "NUM_CLASSES",
    "SPLITS",
    "DatasetError",
    "EpochSampler",
    "EvaluationSet",
    "Item",
    "TrainingSet",
    "load_batches",
    "read_list",
    "scan",
    "share",
]
