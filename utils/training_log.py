"""What one sees of a run: the progress bar, and the scalars and pictures in TensorBoard."""

import time
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm


class TrainingLog:
    """Progress bar and TensorBoard of a run that goes from step `first` to `last`.

    Args:
        folder: of the TensorBoard events; when a run goes on, what it had logged after `first` is dropped.
        batch_size: images a step, for images/s.
    """

    def __init__(self, folder: Path, first: int, last: int, batch_size: int):
        self.batch_size = batch_size
        self.bar = tqdm(initial=first, total=last, unit="step", dynamic_ncols=True)
        self.writer = SummaryWriter(str(folder), purge_step=first + 1)
        self._since = (first, time.perf_counter())

    def advance(self) -> None:
        self.bar.update()

    def scalars(self, step: int, learning_rate: float, losses: dict[str, float]) -> None:
        """Log a step's losses ("total" and its parts) and learning rate, and the images/s since the last call."""
        now = time.perf_counter()
        images = (step - self._since[0]) * self.batch_size
        images_per_second = images / (now - self._since[1])
        self._since = (step, now)
        self.bar.set_postfix_str(
            f"loss {losses['total']:.4f}, lr {learning_rate:.2e}, {images_per_second:.2f} images/s"
        )
        self.writer.add_scalar("learning_rate", learning_rate, step)
        self.writer.add_scalar("images_per_second", images_per_second, step)
        for name, loss in losses.items():
            self.writer.add_scalar(f"loss/{name}", loss, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Log a picture, uint8 [H, W, 3] RGB."""
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
        self.writer.close()
