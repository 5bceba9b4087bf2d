"""The output of a run: the progress bar, and scalars and pictures for TensorBoard."""

import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.proto import event_pb2
from tqdm import tqdm


class TrainingLog:
    """Progress bar and TensorBoard log of a run from step `first` to `last`.

    Args:
        folder: folder of the TensorBoard events. On resuming, what was logged after `first` is dropped. None: show and
            write nothing, in processes other than the main one.
        batch_size: images per step, for images/s.
    """

    def __init__(self, folder: Path | None, first: int, last: int, batch_size: int):
        self.batch_size = batch_size
        self.bar = tqdm(initial=first, total=last, unit="step", dynamic_ncols=True, disable=folder is None)
        self.writer = SummaryWriter(str(folder), purge_step=first + 1, write_to_disk=folder is not None)
        self.num_skipped = 0
        self._since = (first, time.perf_counter())

    def advance(self) -> None:
        self.bar.update()

    def scalars(self, step: int, learning_rate: float, losses: dict[str, float]) -> None:
        """Log a step's losses by name, if any, its learning rate, and the images/s since the last call."""
        now = time.perf_counter()
        images = (step - self._since[0]) * self.batch_size
        images_per_second = images / (now - self._since[1])
        self._since = (step, now)
        total, skipped = losses.get("total", math.nan), f", {self.num_skipped} skipped" if self.num_skipped else ""
        self.bar.set_postfix_str(f"loss {total:.4f}, lr {learning_rate:.2e}, {images_per_second:.2f} images/s{skipped}")
        self.writer.add_scalar("learning_rate", learning_rate, step)
        self.writer.add_scalar("images_per_second", images_per_second, step)
        for name, loss in losses.items():
            self.writer.add_scalar(f"loss/{name}", loss, step)

    def skipped(self, step: int, names: list[str]) -> None:
        """Count and report a step that was skipped because its loss or gradient was not finite."""
        self.num_skipped += 1
        self.message(
            f"step {step}: skipped, its loss or gradient is not finite, of the images {', '.join(names)} "
            f"({self.num_skipped} skipped)"
        )
        self.writer.add_scalar("skipped_steps", self.num_skipped, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Log a picture, uint8 [H, W, 3] RGB."""
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if not self.bar.disable:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
        self.writer.close()


def read_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of a scalar in a folder's logs. Of resumed runs, what was dropped is left out.

    Files that are damaged, as by a full disk, are read up to there.
    """
    values: dict[int, float] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in _events(path):
            if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
                values = {step: value for step, value in values.items() if step < event.step}
            for entry in event.summary.value:
                if entry.tag == name:
                    values[event.step] = entry.simple_value
    return sorted(values.items())


def _events(path: Path) -> Iterator[event_pb2.Event]:
    """The records of a file: each has its length in 8 bytes, 4 bytes of checksum, the event, and 4 of checksum."""
    content, place = path.read_bytes(), 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        record = content[place + 12 : place + 12 + length]
        if len(record) < length:
            return
        yield event_pb2.Event.FromString(record)
        place += length + 16
