"""Cityscapes as torch datasets, and the loader whose batches depend on nothing but the seed."""

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .files import DatasetError, ImageFile, Item
from .labels import IGNORE_LABEL, id_to_train_id_table
from .transforms import draw_crop, normalise, pad_label, resize_image, resize_label, source_box

# Keep the streams of random numbers apart.
_ORDER, _AUGMENTATION = 0, 1
# Batches that each process makes ahead: while one is waited for, the next is there, and memory stays small.
_PREFETCHED = 2


class Samples(Protocol):
    """A dataset that knows the files of each of its samples."""

    def item(self, key: Any) -> Item: ...

    def __getitem__(self, key: Any) -> Any: ...


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

    def item(self, key: tuple[int, int]) -> Item:
        """The files of the sample."""
        return self.items[key[1]]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """{"image": float32 [3, h, w], "label": uint8 [h, w] training ids, "name": str}."""
        epoch, index = key
        item = self.item(key)
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

    def item(self, index: int) -> Item:
        """The files of the sample."""
        return self.items[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": float32 [3, H, W], "label": uint8 [H, W] or None, "item": Item}."""
        item = self.item(index)
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


@contextmanager
def _errors_that_name(items: list[Item]) -> Iterator[None]:
    """Turn whatever else is raised into a DatasetError that names the items' files."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        files = ", ".join(f"{item.image} (label {item.label})" if item.label else str(item.image) for item in items)
        text = " ".join("".join(traceback.format_exception_only(error)).split())
        made = "a sample of it" if len(items) == 1 else "a batch of them"
        raise DatasetError(f"{files}: expected to make {made}, met an error: {text}") from error


class _Batches(Dataset):
    """Whole batches, indexed by the list of their samples' keys.

    A DatasetError is handed over as the batch: raised in a worker it would arrive wrapped in that worker's traceback.
    """

    def __init__(self, dataset: Samples, collate: Callable[[list], Any]):
        self.dataset = dataset
        self.collate = collate

    def __getitem__(self, keys: list) -> Any:
        try:
            return self._batch(keys)
        except DatasetError as error:
            return error

    def _batch(self, keys: list) -> Any:
        items = [self.dataset.item(key) for key in keys]
        samples = []
        for key, item in zip(keys, items, strict=True):
            with _errors_that_name([item]):
                samples.append(self.dataset[key])
        with _errors_that_name(items):
            return self.collate(samples)


def _unchanged(batch: Any) -> Any:
    return batch


def _set_up_worker(worker_id: int) -> None:
    """One thread each, as torch has; and a signal to the whole process group is for the main process to act on."""
    cv2.setNumThreads(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _deaths_held_back() -> Iterator[Callable[[], None]]:
    """Keep PyTorch's handler of SIGCHLD from acting; yields a function that lets it, if there was such a signal.

    The handler raises a RuntimeError if a worker has died, wherever this process is just then: in the middle of writing
    a snapshot, or in a queue's lock, which then stays locked. A batch that is waited for is not lost sight of: PyTorch
    looks every few seconds whether its worker lives.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    arrived: list[int] = []

    def check() -> None:
        if arrived:
            arrived.clear()
            handler(signal.SIGCHLD, None)

    signal.signal(signal.SIGCHLD, lambda number, frame: arrived.append(number))
    try:
        yield check
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _death_message(workers: list[BaseProcess], found: str) -> str:
    """What has probably happened, and what helps."""
    wait([worker.sentinel for worker in workers], timeout=1)  # for the one that is just dying
    causes = {-worker.exitcode for worker in workers if worker.exitcode is not None and worker.exitcode < 0}
    if signal.SIGBUS in causes:
        advice = "the shared memory (/dev/shm) has probably run out: give more of it, or fewer --num-workers"
    elif signal.SIGKILL in causes or "Killed" in found:
        advice = "the kernel probably did so because memory ran out: give fewer --num-workers"
    else:
        advice = "memory may have run out: give fewer --num-workers; with 0, an error is seen where it happens"
    names = " and ".join(signal.Signals(number).name for number in sorted(causes))
    return f"a process that loads data has died{names and f', killed by {names}'} ({found}); {advice}"


def _end_workers(iterator: Iterator[Any]) -> None:
    """End the worker processes of a DataLoader's iterator.

    PyTorch does so when the iterator is garbage. The traceback of an error may keep it until this process ends, which
    would wait for ever: it ends its children by SIGTERM, which they ignore.
    """
    getattr(iterator, "_shutdown_workers", lambda: None)()


def load_batches(
    dataset: Samples,
    batches: Iterable[list],
    num_workers: int,
    collate: Callable[[list], Any] | None = None,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Iterate over the dataset's batches, made by `num_workers` processes, or in this one if 0.

    Args:
        collate: makes a batch of a list of samples; torch's default_collate if None.

    Raises:
        DatasetError: a sample or batch cannot be made, whichever process it came from and whatever went wrong: the
            message names its files. Or one of the processes has died.
    """
    loader = DataLoader(
        _Batches(dataset, collate or torch.utils.data.default_collate),
        batch_size=None,  # the batches are made already
        sampler=batches,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_set_up_worker,
        prefetch_factor=_PREFETCHED if num_workers > 0 else None,
        # There is one pass, on which the workers live as long as the run: keeping them for another has no use.
        persistent_workers=False,
        # Its own generator: otherwise the loader draws from the one that dropout uses.
        generator=torch.Generator(),
    )
    others = multiprocessing.active_children()
    workers: list[BaseProcess] = []
    try:
        with _deaths_held_back():
            iterator = iter(loader)  # starts the workers, and the first time sets PyTorch's handler of SIGCHLD
        workers += [child for child in multiprocessing.active_children() if child not in others]
        with _deaths_held_back() as check:
            try:
                while (batch := next(iterator, None)) is not None:
                    if isinstance(batch, DatasetError):
                        raise batch
                    yield batch
                    check()
            finally:
                _end_workers(iterator)
    # What a batch meets is a value and not raised: an error of the system is then one of receiving what a dying worker
    # had sent, which may come before PyTorch sees it dead.
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        found = str(error).strip(" .") or type(error).__name__
        raise DatasetError(_death_message(workers, found)) from error
