"""Cityscapes: files, labels, augmentation and loading; and generated scenes in the same layout."""

from .checks import check_labels
from .images import Box, ImageFile
from .items import SPLITS, DatasetError, Item, read_list, scan
from .labels import CLASS_NAMES, IGNORE_LABEL, NUM_CLASSES
from .loading import load_batches
from .sampler import EpochSampler, part_size, shard
from .samples import EvaluationSet, TrainingSet

__all__ = [
    "CLASS_NAMES",
    "IGNORE_LABEL",
    "NUM_CLASSES",
    "SPLITS",
    "Box",
    "DatasetError",
    "EpochSampler",
    "EvaluationSet",
    "ImageFile",
    "Item",
    "TrainingSet",
    "check_labels",
    "load_batches",
    "part_size",
    "read_list",
    "scan",
    "shard",
]
