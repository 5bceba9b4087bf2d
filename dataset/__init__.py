"""Data sets: class tables, files, augmentation and loading; and generated scenes."""

from .checks import check_labels
from .class_weights import class_weights
from .classes import BUILT_IN, CITYSCAPES, IGNORE_LABEL, ClassTable, load_classes, parse_classes, plain_classes
from .images import Box, ImageFile
from .items import DatasetError, Item, output_names, read_list, submission_name
from .layouts import SPLITS, default_classes, find_images, find_layout, scan
from .loading import load_batches
from .sampler import EpochSampler, part_size, shard
from .samples import EvaluationSet, TrainingSet
from .tv_transforms import Transform, color_jitter

__all__ = [
    "BUILT_IN",
    "CITYSCAPES",
    "IGNORE_LABEL",
    "SPLITS",
    "Box",
    "ClassTable",
    "DatasetError",
    "EpochSampler",
    "EvaluationSet",
    "ImageFile",
    "Item",
    "TrainingSet",
    "Transform",
    "check_labels",
    "class_weights",
    "color_jitter",
    "default_classes",
    "find_images",
    "find_layout",
    "load_batches",
    "load_classes",
    "output_names",
    "parse_classes",
    "part_size",
    "plain_classes",
    "read_list",
    "scan",
    "shard",
    "submission_name",
]
