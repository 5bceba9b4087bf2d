"""The order of the training images, and how the batch of a step is divided into parts and among processes."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

# Part of the seeds, so that order and augmentation draw from different streams of random numbers.
ORDER_STREAM, AUGMENTATION_STREAM = 0, 1


def shard(total: int, process: int, num_processes: int) -> range:
    """The contiguous part of range(total) that a process works on; the sizes of these parts differ by at most one.

    Raises:
        ValueError: there is no such process.
    """
    if not 0 <= process < num_processes:
        raise ValueError(f"process: expected 0..{num_processes - 1}, got {process}")
    return range(total * process // num_processes, total * (process + 1) // num_processes)


def part_size(batch_size: int, parts: int, num_processes: int = 1) -> int:
    """Images of each of the equal parts that a batch is divided into, of all processes together.

    Raises:
        ValueError: the parts cannot be equal, or some process would have no image of a part.
    """
    if parts < 1 or batch_size % parts != 0:
        raise ValueError(f"batch_size: expected a multiple of the {parts} parts, got {batch_size}")
    if batch_size // parts < num_processes:
        raise ValueError(
            f"batch_size: expected an image for each of {num_processes} processes in each of {parts} parts, "
            f"{num_processes * parts} or more, got {batch_size}"
        )
    return batch_size // parts


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys from step `first` to step `last`, exclusive.

    Each epoch is a permutation of all images. A batch may end one epoch and begin the next, so that no epoch drops or
    repeats an image. The batch of a step depends on (seed, step) alone, so training can resume at any step; dividing it
    into parts and among processes does not change its images.

    Args:
        num_images: size of the data set.
        batch_size: images of a step, over all parts and processes.
        first: step to begin at.
        last: step to end before.
        seed: of the permutations.
        parts: how many parts of equal size the batch of a step is yielded in; see `part_size`.
        process: the process whose shard of each part is yielded; see `shard`.
        num_processes: number of processes.

    Raises:
        ValueError: as `part_size` and `shard`.
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
        size = part_size(batch_size, parts, num_processes)
        mine = shard(size, process, num_processes)
        self.num_images = num_images
        self.batch_size = batch_size
        self.first = first
        self.last = last
        self.seed = seed
        # Positions in the batch of this process's shard of each part.
        self._offsets = [range(begin + mine.start, begin + mine.stop) for begin in range(0, batch_size, size)]

    def __len__(self) -> int:
        """Number of lists yielded: one for each part of each step."""
        return max(self.last - self.first, 0) * len(self._offsets)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng([self.seed, ORDER_STREAM, epoch]).permutation(self.num_images)

        for step in range(self.first, self.last):
            for offsets in self._offsets:
                keys = (divmod(step * self.batch_size + offset, self.num_images) for offset in offsets)
                yield [(epoch, int(order(epoch)[place])) for epoch, place in keys]
