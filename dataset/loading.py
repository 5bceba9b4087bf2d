"""Batches made by worker processes, with errors that name the files."""

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from .items import DatasetError, Item

# Batches that each process makes ahead: while one is waited for, the next is there, and memory stays small.
_PREFETCHED = 2


class Samples(Protocol):
    """A dataset that knows the files of each of its samples."""

    def item(self, key: Any) -> Item: ...

    def __getitem__(self, key: Any) -> Any: ...


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
