"""Loading of batches in worker processes, with errors that name the files."""

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

from utils.memory import return_freed_memory

from .items import DatasetError, Item

# Batches that each worker prefetches.
_PREFETCHED = 2


class Samples(Protocol):
    """A dataset that can name the files of each sample."""

    def item(self, key: Any) -> Item: ...

    def __getitem__(self, key: Any) -> Any: ...


@contextmanager
def _errors_that_name(items: list[Item]) -> Iterator[None]:
    """Turn every exception but a DatasetError into a DatasetError that names the items' files."""
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
    """A dataset of whole batches, indexed by the lists of their samples' keys.

    A DatasetError is returned in place of the batch. Raised in a worker, it would arrive wrapped in a traceback.
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
    """Use one thread and little memory, and ignore SIGINT and SIGTERM.

    If the whole process group gets a signal, the main process reacts.
    """
    cv2.setNumThreads(0)
    return_freed_memory()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _deferred_sigchld() -> Iterator[Callable[[], None]]:
    """Defer PyTorch's handler of SIGCHLD. Yields a function that runs it if a signal has arrived.

    The handler raises a RuntimeError if a worker has died, at whatever point this process is: while writing a
    snapshot, or while holding the lock of a queue, which then stays locked. Waiting for a batch remains safe, since
    PyTorch checks every few seconds whether the worker is alive.
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
    """An error message with the probable cause of a worker's death, and a remedy."""
    wait([worker.sentinel for worker in workers], timeout=1)  # it may not have exited yet
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

    PyTorch does this when the iterator is garbage-collected. But a traceback may keep it alive until this process
    exits, and the exit would hang: it sends SIGTERM to the workers, which they ignore, and waits for them.
    """
    getattr(iterator, "_shutdown_workers", lambda: None)()


def load_batches(
    dataset: Samples,
    batches: Iterable[list],
    num_workers: int,
    collate: Callable[[list], Any] | None = None,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Iterate over batches that `num_workers` processes load, or this process if it is 0.

    Args:
        batches: for each batch the list of its samples' keys.
        collate: makes a batch from a list of samples; torch's default_collate if None.
        pin_memory: whether tensors are put in pinned memory, for asynchronous copies to a GPU.

    Raises:
        DatasetError: a sample or batch cannot be made, for any reason, and the message names its files; or a worker
            has died.
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
        persistent_workers=False,  # there is only one pass
        # By default the loader draws from the global generator, which dropout uses.
        generator=torch.Generator(),
    )
    others = multiprocessing.active_children()
    workers: list[BaseProcess] = []
    try:
        with _deferred_sigchld():
            iterator = iter(loader)  # starts the workers, and the first time installs PyTorch's handler of SIGCHLD
        workers += [child for child in multiprocessing.active_children() if child not in others]
        with _deferred_sigchld() as check:
            try:
                while (batch := next(iterator, None)) is not None:
                    if isinstance(batch, DatasetError):
                        raise batch
                    yield batch
                    check()
            finally:
                _end_workers(iterator)
    # Errors of samples come back as values, so an OSError or EOFError here means that a worker died while it sent a
    # batch. It may come before PyTorch notices the death.
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        found = str(error).strip(" .") or type(error).__name__
        raise DatasetError(_death_message(workers, found)) from error
