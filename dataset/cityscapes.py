"""Cityscapes as torch datasets, and the loader whose batches depend on nothing but the seed."""

import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .files import DatasetError, ImageFile, Item
from .labels import IGNORE_LABEL, id_to_train_id_table
from .transforms import draw_crop, normalise, pad_label, resize_image, resize_label, source_box

# Keep the streams of random numbers apart.
_ORDER, _AUGMENTATION = 0, 1


def _open_label(item: Item, image: ImageFile) -> ImageFile:
    if item.label is None:
        raise DatasetError(f"{item.image}: expected a label image beside it, it has none")
    label = ImageFile(item.label)
    if label.size != image.size:
        raise DatasetError(
            f"{item.label}: expected the size of its image {item.image.name}, {image.size[0]}x{image.size[1]}, "
            f"found {label.size[0]}x{label.size[1]}"
        )
    return label


class TrainingSet(Dataset):
    """Augmented training samples, indexed by (epoch, index).

    A sample is a pure function of (seed, epoch, index): its generator is seeded by them and by nothing else.

    Args:
        items: the images with their labels.
        crop_size: (height, width) of the samples.
        ignore_label: training label of void and padded pixels, 0..255.
        random_scale: scale by 0.7, 0.8, ... 2.1, each as likely.
        random_mirror: mirror every other sample.
        seed: of all augmentation.
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
        self._train_ids = id_to_train_id_table(ignore_label)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """{"image": float32 [3, h, w], "label": uint8 [h, w] training ids, "name": str}."""
        epoch, index = key
        item = self.items[index]
        generator = np.random.default_rng([self.seed, _AUGMENTATION, epoch, index])
        image = ImageFile(item.image)
        label = _open_label(item, image)
        crop = draw_crop(generator, image.size, self.crop_size, self.random_scale, self.random_mirror)
        box = source_box(crop)
        pixels = resize_image(image.read_colour(box), crop)
        train_ids = self._train_ids[resize_label(label.read_label(box), crop)]
        return {
            "image": torch.from_numpy(normalise(pixels, self.crop_size, crop.mirror)),
            "label": torch.from_numpy(pad_label(train_ids, self.crop_size, self.ignore_label, crop.mirror)),
            "name": item.name,
        }


class EvaluationSet(Dataset):
    """Whole images, normalised, in order.

    Args:
        items: the images; label images are read where there are any.
        ignore_label: label of void pixels.
    """

    def __init__(self, items: list[Item], ignore_label: int = IGNORE_LABEL):
        self.items = items
        self._train_ids = id_to_train_id_table(ignore_label)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": float32 [3, H, W], "label": uint8 [H, W] or None, "item": Item}."""
        item = self.items[index]
        image = ImageFile(item.image)
        label = None
        if item.label is not None:
            label = torch.from_numpy(self._train_ids[_open_label(item, image).read_label()])
        return {"image": torch.from_numpy(normalise(image.read_colour())), "label": label, "item": item}


def share(total: int, process: int, num_processes: int) -> range:
    """The part of range(total) that is this process's: the parts are contiguous, in order, and differ by at most one.

    Raises:
        ValueError: there is no such process.
    """
    if not 0 <= process < num_processes:
        raise ValueError(f"process: expected 0..{num_processes - 1}, got {process}")
    return range(total * process // num_processes, total * (process + 1) // num_processes)


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys from step `first` to step `last`, exclusive.

    Each epoch is a permutation of all images; epochs follow each other without a gap, so none is dropped or repeated
    within one. The batch of a step depends on (seed, step) alone, which is what lets training go on anywhere. How it
    is cut, into parts and among processes, changes nothing in it.

    Args:
        num_images: images of an epoch.
        batch_size: images of a step, over all parts and processes.
        first: step to begin at.
        last: step to end before.
        seed: of the permutations.
        parts: micro-batches of equal size that a step's batch is cut into, one after the other.
        process: the one whose share of each micro-batch is yielded; see `share`.
        num_processes: how many there are.

    Raises:
        ValueError: the batch cannot be cut into equal parts, a part has fewer images than there are processes, or there
            is no such process.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        first: int,
        last: int,
        seed: int,
        parts: int = 1,
        process: int = 0,
        num_processes: int = 1,
    ):
        if parts < 1 or batch_size % parts != 0:
            raise ValueError(f"batch_size: expected a multiple of the {parts} parts, got {batch_size}")
        part_size = batch_size // parts
        if part_size < num_processes:
            raise ValueError(
                f"batch_size: expected an image for each of {num_processes} processes in each of {parts} parts, "
                f"{num_processes * parts} or more, got {batch_size}"
            )
        mine = share(part_size, process, num_processes)
        self.num_images = num_images
        self.batch_size = batch_size
        self.first = first
        self.last = last
        self.seed = seed
        # Where this process's share of each part lies in a step's batch.
        self._offsets = [range(begin + mine.start, begin + mine.stop) for begin in range(0, batch_size, part_size)]

    def __len__(self) -> int:
        """Lists that are yielded: one a step and part."""
        return max(self.last - self.first, 0) * len(self._offsets)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng([self.seed, _ORDER, epoch]).permutation(self.num_images)

        for step in range(self.first, self.last):
            for offsets in self._offsets:
                keys = (divmod(step * self.batch_size + offset, self.num_images) for offset in offsets)
                yield [(epoch, int(order(epoch)[place])) for epoch, place in keys]


class _ErrorsAsValues(Dataset):
    """Hands a DatasetError over as a sample: raised in a worker it would arrive wrapped in that worker's traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key):
        try:
            return self.dataset[key]
        except DatasetError as error:
            return error


class _Collate:
    """Collate samples, or pass the first DatasetError among them on."""

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, samples: list) -> Any:
        error = next((sample for sample in samples if isinstance(sample, DatasetError)), None)
        return self.collate(samples) if error is None else error


def _set_up_worker(worker_id: int) -> None:
    """One thread each; and a signal to the whole process group is for the main process to act on."""
    cv2.setNumThreads(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def load_batches(
    dataset: Dataset,
    batches: Sampler[list],
    num_workers: int,
    collate: Callable[[list], Any] | None = None,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Iterate over the dataset's batches, made by `num_workers` processes, or in this one if 0.

    Args:
        collate: makes a batch of a list of samples; torch's default_collate if None.

    Raises:
        DatasetError: of the dataset, whichever process it came from.
    """
    loader = DataLoader(
        _ErrorsAsValues(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_Collate(collate or torch.utils.data.default_collate),
        pin_memory=pin_memory,
        worker_init_fn=_set_up_worker,
        # Its own generator: otherwise the loader draws from the one that dropout uses.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, DatasetError):
            raise batch
        yield batch
