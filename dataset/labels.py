"""The Cityscapes label table: ids, names, training ids and colours, as cityscapesScripts defines them."""

from typing import NamedTuple

import numpy as np

# Value of void pixels in the training labels.
IGNORE_LABEL = 255


class Label(NamedTuple):
    name: str
    id: int
    train_id: int | None  # None: void, not trained and not evaluated
    colour: tuple[int, int, int]  # RGB


LABELS = (
    Label("unlabeled", 0, None, (0, 0, 0)),
    Label("ego vehicle", 1, None, (0, 0, 0)),
    Label("rectification border", 2, None, (0, 0, 0)),
    Label("out of roi", 3, None, (0, 0, 0)),
    Label("static", 4, None, (0, 0, 0)),
    Label("dynamic", 5, None, (111, 74, 0)),
    Label("ground", 6, None, (81, 0, 81)),
    Label("road", 7, 0, (128, 64, 128)),
    Label("sidewalk", 8, 1, (244, 35, 232)),
    Label("parking", 9, None, (250, 170, 160)),
    Label("rail track", 10, None, (230, 150, 140)),
    Label("building", 11, 2, (70, 70, 70)),
    Label("wall", 12, 3, (102, 102, 156)),
    Label("fence", 13, 4, (190, 153, 153)),
    Label("guard rail", 14, None, (180, 165, 180)),
    Label("bridge", 15, None, (150, 100, 100)),
    Label("tunnel", 16, None, (150, 120, 90)),
    Label("pole", 17, 5, (153, 153, 153)),
    Label("polegroup", 18, None, (153, 153, 153)),
    Label("traffic light", 19, 6, (250, 170, 30)),
    Label("traffic sign", 20, 7, (220, 220, 0)),
    Label("vegetation", 21, 8, (107, 142, 35)),
    Label("terrain", 22, 9, (152, 251, 152)),
    Label("sky", 23, 10, (70, 130, 180)),
    Label("person", 24, 11, (220, 20, 60)),
    Label("rider", 25, 12, (255, 0, 0)),
    Label("car", 26, 13, (0, 0, 142)),
    Label("truck", 27, 14, (0, 0, 70)),
    Label("bus", 28, 15, (0, 60, 100)),
    Label("caravan", 29, None, (0, 0, 90)),
    Label("trailer", 30, None, (0, 0, 110)),
    Label("train", 31, 16, (0, 80, 100)),
    Label("motorcycle", 32, 17, (0, 0, 230)),
    Label("bicycle", 33, 18, (119, 11, 32)),
    Label("license plate", -1, None, (0, 0, 142)),
)

# The trained classes, in the order of their training ids.
CLASSES = tuple(
    sorted((label for label in LABELS if label.train_id is not None), key=lambda label: label.train_id or 0)
)
CLASS_NAMES = tuple(label.name for label in CLASSES)
NUM_CLASSES = len(CLASSES)
LABEL_IDS = {label.name: label.id for label in LABELS}

# The encodings of label images, with descriptions of their values.
ENCODINGS = {"ids": "label ids 0..33 and -1 (255)", "trainids": f"training ids 0..{NUM_CLASSES - 1} and 255 (void)"}

# For each encoding bool [256]: the valid values, as uint8, where license plate's id -1 is 255.
KNOWN_VALUES = {encoding: np.zeros(256, dtype=bool) for encoding in ENCODINGS}
KNOWN_VALUES["ids"][[label.id % 256 for label in LABELS]] = True
KNOWN_VALUES["trainids"][[*range(NUM_CLASSES), 255]] = True


def train_id_table(encoding: str = "ids", ignore_label: int = IGNORE_LABEL) -> np.ndarray:
    """uint8 [256]: the training id for each value of a label image, `ignore_label` for void."""
    table = np.full(256, ignore_label, dtype=np.uint8)
    for train_id, label in enumerate(CLASSES):
        table[label.id if encoding == "ids" else train_id] = train_id
    return table


# uint8 [256]: label id of each training id; other values become 0, unlabeled.
TRAIN_ID_TO_ID = np.zeros(256, dtype=np.uint8)
TRAIN_ID_TO_ID[:NUM_CLASSES] = [label.id for label in CLASSES]

# uint8 [256, 3]: RGB colour of each training id; other values are black.
PALETTE = np.zeros((256, 3), dtype=np.uint8)
PALETTE[:NUM_CLASSES] = [label.colour for label in CLASSES]
