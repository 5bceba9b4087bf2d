"""Small street scenes, generated, in the exact Cityscapes layout: a data set for where there is none.

    python -m dataset.scenes --output data/scenes

Each scene holds sky, buildings, trees, road, sidewalk, and a few people, poles and cars; and one *ambiguous*
vehicle: a grey box that is a bus where a blue traffic sign hangs in the scene, and a truck where an orange traffic
light does. Nothing near the vehicle tells which. The sign or light hangs at the other side of the image, always in
other columns than the vehicle and in half of the scenes in other rows: only a network that carries context over the
image, from outside the criss-cross path too, can name the vehicle.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.arguments import ArgumentParser, number

from .classes import CITYSCAPES
from .images import Box

# Label ids by class; the car that takes the pictures is void.
LABEL_IDS = {entry.name: entry.values[0] for entry in CITYSCAPES.classes} | {"ego vehicle": 1}
# For each class of the ambiguous vehicle the cue that tells it: the cue's class and colour, RGB.
CUES = {"bus": ("traffic sign", (30, 60, 220)), "truck": ("traffic light", (240, 130, 20))}
# Classes of which Cityscapes tells one thing from the other.
_WITH_INSTANCES = {"person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"}
# Height and width of the cue. At first attention is spread evenly over a pixel's row and column, and the cue is no more
# than its share of these: with half the width, a run of minutes does not find it.
_CUE_SIZE = (0.25, 0.3)
# In how many scenes the cue hangs in the vehicle's rows, where one criss-cross reaches it.
_SHARED_ROWS = 0.5
_CITIES = {"train": ("altstadt", "neustadt"), "val": ("hafen",), "test": ("ufer",)}


@dataclass(frozen=True)
class Scene:
    """A generated scene: image uint8 [H, W, 3] RGB, label uint8 [H, W] ids, instances, and where vehicle and cue are.

    instances: uint16 [H, W], as Cityscapes has them: the label id, times 1000 plus a number for a thing of its own.
    """

    image: np.ndarray
    label: np.ndarray
    instances: np.ndarray
    vehicle: Box
    cue: Box


def _pixels(low: float, high: float, length: int) -> tuple[int, int]:
    """The pixels [first, stop) of an interval of fractions of an axis: at least one, within the axis."""
    first = min(max(round(low * length), 0), length - 1)
    return first, min(max(round(high * length), first + 1), length)


class _Canvas:
    """Image and labels, painted together; coordinates are fractions of the height and width."""

    def __init__(self, height: int, width: int, generator: np.random.Generator):
        self.height, self.width, self.generator = height, width, generator
        self.image = np.zeros((height, width, 3), dtype=np.float32)
        self.label = np.zeros((height, width), dtype=np.uint8)
        self.instances = np.zeros((height, width), dtype=np.uint16)
        self.count: Counter[str] = Counter()

    def box(self, top: float, bottom: float, left: float, right: float) -> Box:
        """The pixels of a rectangle of fractions, at least one, within the image."""
        return Box(*_pixels(top, bottom, self.height), *_pixels(left, right, self.width))

    def fill(self, mask: np.ndarray | Box, name: str, colour: tuple[int, int, int], spread: float = 12) -> None:
        """Paint a region in about the given colour and label it."""
        region = np.s_[mask.top : mask.bottom, mask.left : mask.right] if isinstance(mask, Box) else mask
        self.image[region] = np.array(colour, dtype=np.float32) + self.generator.normal(0, spread, 3)
        self.label[region] = self.instances[region] = LABEL_IDS[name]
        if name in _WITH_INSTANCES:
            self.instances[region] = LABEL_IDS[name] * 1000 + self.count[name]
            self.count[name] += 1

    def ellipse(self, y: float, x: float, half_height: float, half_width: float) -> np.ndarray:
        rows = (np.arange(self.height)[:, None] / self.height - y) / half_height
        columns = (np.arange(self.width)[None, :] / self.width - x) / half_width
        return rows**2 + columns**2 <= 1


def make_scene(height: int, width: int, generator: np.random.Generator) -> Scene:
    """Draw one scene of the given size, at least 48x48."""
    if min(height, width) < 48:
        raise ValueError(f"size: expected at least 48x48, got {height}x{width}")
    canvas = _Canvas(height, width, generator)
    horizon = generator.uniform(0.42, 0.5)
    _paint_background(canvas, horizon)
    _paint_objects(canvas, horizon)
    vehicle, cue = _paint_vehicle_and_cue(canvas)
    _paint_borders(canvas)
    shade = generator.uniform(0.85, 1.15) * np.linspace(1, generator.uniform(0.8, 1.2), width)[None, :, None]
    noise = generator.normal(0, 6, canvas.image.shape)
    image = np.clip(canvas.image * shade + noise, 0, 255).astype(np.uint8)
    return Scene(image, canvas.label, canvas.instances, vehicle, cue)


def _paint_background(canvas: _Canvas, horizon: float) -> None:
    uniform = canvas.generator.uniform
    canvas.fill(canvas.box(0, horizon, 0, 1), "sky", (150, 190, 230))
    left = 0.0
    while left < 1:
        right = left + uniform(0.12, 0.3)
        if uniform() < 0.75:
            canvas.fill(canvas.box(uniform(0.05, horizon - 0.12), horizon, left, right), "building", (140, 100, 80), 20)
        left = right
    canvas.fill(canvas.box(horizon, 1, 0, 1), "road", (85, 80, 90), 6)
    canvas.fill(canvas.box(horizon, horizon + 0.09, 0, 1), "sidewalk", (190, 170, 185), 6)
    if uniform() < 0.4:
        canvas.fill(canvas.box(horizon, horizon + 0.05, 0, 1), "terrain", (170, 190, 110), 8)


def _paint_objects(canvas: _Canvas, horizon: float) -> None:
    """Trees, poles, people and cars: classes that their own look tells."""
    uniform, integers = canvas.generator.uniform, canvas.generator.integers
    aspect = canvas.height / canvas.width
    for _ in range(integers(1, 4)):
        x, size = uniform(0, 1), uniform(0.08, 0.16)
        canvas.fill(canvas.ellipse(horizon - size, x, size, size * aspect), "vegetation", (60, 110, 45), 12)
    for _ in range(integers(1, 3)):
        x = uniform(0.02, 0.98)
        canvas.fill(canvas.box(horizon - uniform(0.2, 0.3), horizon + 0.06, x, x + 0.02), "pole", (60, 60, 60), 5)
    for _ in range(integers(1, 4)):
        x, y = uniform(0.05, 0.95), uniform(horizon, horizon + 0.05)
        canvas.fill(canvas.box(y - 0.02, y + 0.13, x, x + 0.06 * aspect), "person", (215, 40, 90), 18)
    for _ in range(integers(1, 3)):
        x, y = uniform(0.36, 0.56), uniform(horizon + 0.1, 0.66)
        canvas.fill(canvas.box(y, y + 0.13, x, x + 0.24 * aspect), "car", (30, 40, 160), 20)


def _paint_vehicle_and_cue(canvas: _Canvas) -> tuple[Box, Box]:
    """The ambiguous vehicle at one side, the cue that tells its class at the other."""
    uniform = canvas.generator.uniform
    name = "bus" if uniform() < 0.5 else "truck"
    top, left = uniform(0.58, 0.66), uniform(0.02, 0.1)
    bottom, right = top + 0.28, left + 0.15
    height, width = _CUE_SIZE
    cue_left = uniform(0.9, 0.98) - width
    cue_top = uniform(top, bottom - height) if uniform() < _SHARED_ROWS else uniform(0.03, 0.55 - height)
    vehicle = canvas.box(top, bottom, left, right)
    cue = canvas.box(cue_top, cue_top + height, cue_left, cue_left + width)
    if uniform() < 0.5:
        vehicle, cue = (Box(b.top, b.bottom, canvas.width - b.right, canvas.width - b.left) for b in (vehicle, cue))
    canvas.fill(vehicle, name, (165, 165, 165), 4)
    canvas.fill(cue, *CUES[name], 5)
    return vehicle, cue


def _paint_borders(canvas: _Canvas) -> None:
    """The void frame of Cityscapes' images: what is not evaluated."""
    canvas.fill(canvas.box(0.97, 1, 0, 1), "ego vehicle", (30, 30, 35), 3)


def write_data_set(root: Path, counts: dict[str, int], height: int, width: int, seed: int) -> None:
    """Write a data set of scenes under `root` in the Cityscapes layout; test images get no labels.

    Args:
        counts: number of images of each split.
        height, width: size of the images.
        seed: every image is a function of (seed, split, number).

    scenes.json says how a data set was made and whether it is complete. One that was made in the same way is left
    alone, or finished if it was interrupted; anything else in the folder is an error.

    Raises:
        FileExistsError: the folder holds other things; hidden files are ignored.
    """
    description = {"counts": counts, "height": height, "width": width, "seed": seed, "version": 3, "complete": True}
    marker = root / "scenes.json"
    if marker.exists():
        found = json.loads(marker.read_text())
        if found == description:
            return
        # Version 2 had the same scenes without instances.
        if {**found, "version": 3} not in (description, {**description, "complete": False}):
            raise FileExistsError(f"{root}: expected no data set or the same, found {found} and not {description}")
    elif root.exists() and any(root.glob("[!.]*")):
        raise FileExistsError(f"{root}: expected an empty folder or generated scenes, found other things")
    _write_json(marker, {**description, "complete": False})
    palette = np.zeros((256, 3), dtype=np.uint8)
    for entry in CITYSCAPES.classes:
        palette[entry.values[0]] = entry.colour
    for split_number, (split, count) in enumerate(counts.items()):
        for index in range(count):
            scene = make_scene(height, width, np.random.default_rng([seed, split_number, index]))
            city = _CITIES[split][index % len(_CITIES[split])]
            frame = f"{city}_{index:06d}_000019"
            _write_png(root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png", scene.image)
            if split != "test":
                folder = root / "gtFine" / split / city
                _write_png(folder / f"{frame}_gtFine_labelIds.png", scene.label)
                _write_png(folder / f"{frame}_gtFine_instanceIds.png", scene.instances)
                _write_png(folder / f"{frame}_gtFine_color.png", palette[scene.label])
    _write_json(marker, description)


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(path)


def _write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)  # as fast as can be: most of the time is spent here


def main() -> None:
    parser = ArgumentParser("Generate street scenes in the Cityscapes layout.")
    parser.add_argument("--output", type=Path, default=Path("data/scenes"), help="folder of the data set")
    parser.add_argument("--train", type=number(int, 0, 10**6), default=1600, help="number of training images")
    parser.add_argument("--val", type=number(int, 0, 10**6), default=40, help="number of validation images")
    parser.add_argument("--test", type=number(int, 0, 10**6), default=4, help="number of test images, without labels")
    parser.add_argument("--height", type=number(int, 48, 2**13), default=48, help="of the images, in pixels")
    parser.add_argument("--width", type=number(int, 48, 2**13), default=192, help="of the images, in pixels")
    parser.add_argument("--random-seed", type=number(int, 0, 2**63 - 1), default=1234, help="seed of all scenes")
    args = parser.parse_args()
    counts = {"train": args.train, "val": args.val, "test": args.test}
    try:
        write_data_set(args.output, counts, args.height, args.width, args.random_seed)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{args.output}: {args.train} training, {args.val} validation and {args.test} test scenes")


if __name__ == "__main__":
    main()
