"""The order of the training images, and how each step's batch is divided among processes."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

# A number in the seeds keeps the streams of random numbers apart.
ORDER_STREAM, AUGMENTATION_STREAM = 0, 1


def shard(total: int, process: int, num_processes: int) -> range:
    """The contiguous part of range(total) that a process works on; sizes of the parts differ by at most one.

    Raises:
        ValueError: there is no such process.
    """
    if not 0 <= process < num_processes:
        raise ValueError(f"process: expected 0..{num_processes - 1}, got {process}")
    return range(total * process // num_processes, total * (process + 1) // num_processes)


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys from step `first` to step `last`, exclusive.

    Each epoch is a permutation of all images. Epochs follow each other without a gap, so that an epoch neither drops
    nor repeats an image. The batch of a step depends on (seed, step) alone, so training can resume at any step.
    Dividing a batch into parts and among processes does not change which images it has.

    Args:
        num_images: images of an epoch.
        batch_size: images of a step, over all parts and processes.
        first: step to begin at.
        last: step to end before.
        seed: of the permutations.
        parts: micro-batches of equal size that make up a step's batch.
        process: whose shard of each micro-batch is yielded; see `shard`.
        num_processes: number of processes.

    Raises:
        ValueError: the batch cannot be divided into equal parts, a part has fewer images than there are processes, or
            there is no such process.
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
        mine = shard(part_size, process, num_processes)
        self.num_images = num_images
        self.batch_size = batch_size
        self.first = first
        self.last = last
        self.seed = seed
        # The places within a step's batch of this process's shard of each part.
        self._offsets = [range(begin + mine.start, begin + mine.stop) for begin in range(0, batch_size, part_size)]

    def __len__(self) -> int:
        """Number of lists that are yielded: one for each part of each step."""
        return max(self.last - self.first, 0) * len(self._offsets)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng([self.seed, ORDER_STREAM, epoch]).permutation(self.num_images)

        for step in range(self.first, self.last):
            for offsets in self._offsets:
                keys = (divmod(step * self.batch_size + offset, self.num_images) for offset in offsets)
                yield [(epoch, int(order(epoch)[place])) for epoch, place in keys]
