"""A trained network with its classes, to predict any image from Python."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from dataset import CITYSCAPES, ClassTable, DatasetError, ImageFile
from dataset.transforms import normalise
from networks import CCNet, PredictionNetwork, StateDictError, build_model, load_state

from .checkpoint import read_state_dict
from .inference import multi_scale, sliding_predictor
from .network_file import SavedNetwork, find_network


class Model:
    """A network that predicts images.

    Attributes:
        network: CCNet, in evaluation mode; predictions are made by a copy with folded norms, made once.
        classes: the class table; its names and palette belong to the predicted numbers.
    """

    def __init__(self, network: CCNet, classes: ClassTable):
        self.network = network.eval()
        self.classes = classes
        self._prediction = PredictionNetwork(network)

    @torch.no_grad()
    def predict(
        self,
        image: str | Path | Image.Image | np.ndarray,
        tile_size: tuple[int, int] = (769, 769),
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
    ) -> np.ndarray:
        """The training id of each pixel, [H, W]: uint8, or uint16 if there are more than 255 classes.

        The same as evaluate.py predicts by its sliding window.

        Args:
            image: path, PIL image, or uint8 array [H, W, 3] (RGB) or [H, W] (grey).
            tile_size: (height, width) of the tiles; those of training serve best.
            scales, flip: average over these scales, and with the mirror image.

        Raises:
            DatasetError: the file is no image, or has pixels without a meaning in 8 bits.
            ValueError: the array has another shape or dtype.
        """
        device = next(self.network.parameters()).device
        pixels = torch.from_numpy(normalise(_pixels(image)))[None].to(device, memory_format=torch.channels_last)
        predict = multi_scale(sliding_predictor(self._prediction, tile_size), scales, flip)
        return predict(pixels)[0].argmax(0).cpu().numpy().astype(self.classes.dtype)


def _pixels(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3], RGB."""
    if isinstance(image, str | Path):
        return ImageFile(Path(image)).read_colour()
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":
            raise ValueError(f"image: expected a PIL image of 8 bits, got mode {image.mode}")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"image: expected uint8 [H, W, 3] or [H, W], got {image.dtype} {list(image.shape)}")
    return image if image.ndim == 3 else np.stack([image] * 3, axis=2)


def load_network(path: Path, recurrence: int | None = None) -> tuple[CCNet, SavedNetwork]:
    """The network of a snapshot, on the CPU, and what is known of it; see `load_model`.

    Args:
        recurrence: R, in place of that with which it was trained.

    Raises:
        CheckpointError: the snapshot or network.json cannot be read.
        StateDictError: the weights are of another network.
    """
    state = read_state_dict(path)
    found = find_network(path, state)
    if found is None:
        raise StateDictError(f"{path}: expected the weights of CCNet, found {', '.join(list(state)[:3])}, ...")
    if recurrence is not None:
        found = found._replace(config=replace(found.config, recurrence=recurrence))
    network = build_model(found.config)
    load_state(network, state, str(path))
    return network, found


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    recurrence: int | None = None,
    classes: ClassTable | None = None,
) -> Model:
    """The network of a snapshot.

    The file says what network it is, or network.json beside it. Otherwise backbone, stem and number of classes are read
    off the weights, and the rest is the paper's: R=2, identity, and Cityscapes' classes if there are 19.

    Args:
        device: where it computes.
        recurrence: R, in place of that with which it was trained.
        classes: the class table; by default that with which it was trained.

    Raises:
        CheckpointError: the snapshot or network.json cannot be read.
        StateDictError: the weights are of another network.
        DatasetError: the classes are not known, or their number is not the network's.
    """
    network, found = load_network(Path(path), recurrence)
    config = found.config
    classes = classes or found.classes or (CITYSCAPES if config.num_classes == len(CITYSCAPES) else None)
    if classes is None or len(classes) != config.num_classes:
        given = f"{classes.name} with {len(classes)}" if classes else "none"
        raise DatasetError(f"{path}: expected a class table of its {config.num_classes} classes, found {given}")
    return Model(network.to(device), classes)
