"""Samples/s of one worker: cropping first, against resizing the whole image and then cropping.

    python -m benchmarks.loading [--data-dir YOUR_CS_PATH]

The other contenders work in the order of the original: decode image and label, map the labels, resize both, subtract
the mean, pad, crop, mirror. One maps labels as the original does, with one comparison for each label; the other with a
table, as this project does. All draw the same crops and must give the same samples, otherwise the run ends.

Without Cityscapes, images are generated: 1024x2048 PNGs, with noise so that their files have about the size of
Cityscapes' files, 2.3 MB, on which the decoding time depends.
"""

import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from dataset import CITYSCAPES, IGNORE_LABEL, Item, TrainingSet, scan
from dataset.scenes import make_scene
from dataset.transforms import IMAGE_MEAN, draw_crop
from utils.arguments import ArgumentParser

_CROP = (769, 769)
_SEED = 0
# Training id of each label id, as far as there are ids
_TABLE = np.full(256, IGNORE_LABEL, dtype=np.uint8)
_TABLE[[entry.values[0] for entry in CITYSCAPES.classes]] = range(len(CITYSCAPES))
Loader = Callable[[Item, tuple[int, int]], tuple[np.ndarray, np.ndarray]]


def map_by_comparisons(label: np.ndarray) -> np.ndarray:
    out = label.copy()
    for value in CITYSCAPES.void.values:
        out[label == value % 256] = IGNORE_LABEL
    for train_id, entry in enumerate(CITYSCAPES.classes):
        out[label == entry.values[0]] = train_id
    return out


def map_by_table(label: np.ndarray) -> np.ndarray:
    return cv2.LUT(label, _TABLE)


def read(path: Path | None, mode: int) -> np.ndarray:
    pixels = cv2.imread(str(path), mode)
    if pixels is None:
        raise SystemExit(f"{path}: cannot be read as an image")
    return pixels


def resize_then_crop(map_label: Callable[[np.ndarray], np.ndarray]) -> Loader:
    """The original's order."""

    def load(item: Item, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        image = read(item.image, cv2.IMREAD_COLOR)
        label = map_label(read(item.label, cv2.IMREAD_GRAYSCALE))
        size = (image.shape[0], image.shape[1])
        crop = draw_crop(np.random.default_rng([_SEED, 1, *key]), size, _CROP, True, True)
        scale = crop.tenths / 10
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        label = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        pixels: np.ndarray = np.asarray(image, np.float32) - IMAGE_MEAN
        bottom, right = max(_CROP[0] - label.shape[0], 0), max(_CROP[1] - label.shape[1], 0)
        if bottom or right:
            pixels = cv2.copyMakeBorder(pixels, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(0, 0, 0))
            label = cv2.copyMakeBorder(label, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(255,))
        part = np.s_[crop.rows.start : crop.rows.start + _CROP[0], crop.columns.start : crop.columns.start + _CROP[1]]
        pixels, label = pixels[part].transpose(2, 0, 1), label[part]
        flip = -1 if crop.mirror else 1
        return pixels[:, :, ::flip].copy(), label[:, ::flip].copy()

    return load


def crop_first(items: list[Item]) -> Loader:
    """This project's training set."""
    dataset = TrainingSet(items, _CROP, seed=_SEED)

    def load(item: Item, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        sample = dataset[key]
        return sample["image"].numpy(), sample["label"].numpy()

    return load


def generate(folder: Path, count: int) -> list[Item]:
    items = []
    for number in range(count):
        generator = np.random.default_rng(number)
        scene = make_scene(256, 512, generator)
        image = cv2.resize(scene.image, (2048, 1024), interpolation=cv2.INTER_CUBIC).astype(np.float32)
        image += generator.normal(0, 0.9, image.shape)
        item = Item(folder / f"{number}.png", folder / f"{number}_label.png")
        cv2.imwrite(str(item.image), np.clip(image, 0, 255).astype(np.uint8))
        Image.fromarray(cv2.resize(scene.label, (2048, 1024), interpolation=cv2.INTER_NEAREST)).save(str(item.label))
        items.append(item)
    return items


def check_same(loaders: dict[str, Loader], items: list[Item]) -> None:
    """End the run unless all loaders give the same samples.

    Images may differ by one grey level, and labels in 1 % of the pixels: where the exact position is a whole number,
    OpenCV may take the pixel before it.
    """
    for index, item in enumerate(items):
        samples = [load(item, (0, index)) for load in loaders.values()]
        for (image, label), name in zip(samples[1:], list(loaders)[1:], strict=True):
            if np.abs(image - samples[0][0]).max() > 1.001 or (label != samples[0][1]).mean() > 0.01:
                raise SystemExit(f"{name} gives other samples than {next(iter(loaders))}: no times are printed")


def measure(loaders: dict[str, Loader], items: list[Item], epochs: int) -> dict[str, list[float]]:
    """Seconds for each sample; the loaders take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for epoch in range(epochs):
        for index, item in enumerate(items):
            for name, load in loaders.items():
                start = time.perf_counter()
                load(item, (epoch, index))
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = ArgumentParser("Samples/s of one data-loading worker.")
    parser.add_argument("--data-dir", type=Path, help="Cityscapes; images are generated if not given")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=15, help="how many crops of each image")
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        items = scan(args.data_dir, "train")[: args.images] if args.data_dir else generate(Path(folder), args.images)
        megabytes = np.mean([item.image.stat().st_size for item in items]) / 1e6
        loaders = {
            "resize, then crop; labels by comparisons": resize_then_crop(map_by_comparisons),
            "resize, then crop; labels by a table": resize_then_crop(map_by_table),
            "crop first": crop_first(items),
        }
        check_same(loaders, items)
        seconds = measure(loaders, items, args.epochs)
    print(f"{platform.machine()}, one thread, OpenCV {cv2.__version__}; {len(items)} images of {megabytes:.1f} MB")
    print("mean over all crops, since their cost differs by scale and position\n")
    print("| | ms a sample | samples/s | of the first |\n|:--|--:|--:|--:|")
    first = np.mean(next(iter(seconds.values())))
    for name, values in seconds.items():
        mean = np.mean(values)
        print(f"| {name} | {1e3 * mean:.1f} | {1 / mean:.1f} | {first / mean:.2f}x |")


if __name__ == "__main__":
    main()
