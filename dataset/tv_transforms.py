"""Transforms of torchvision (torchvision.transforms.v2), or other callables like them, on images and their labels.

torchvision is imported only where one is used.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .items import DatasetError, Item

# Of (image, label), tv_tensors.Image uint8 [3, H, W] (RGB) and tv_tensors.Mask [H, W] (training ids), to such a pair.
# Where there is no label it is None.
Transform = Callable[[Any, Any], Any]


def label_tensor(train_ids: np.ndarray) -> Tensor:
    """uint8, or int32 since PyTorch computes little in uint16."""
    return torch.from_numpy(train_ids if train_ids.dtype == np.uint8 else train_ids.astype(np.int32))


def transformed(
    transform: Transform, image: np.ndarray, label: np.ndarray | None, generator: np.random.Generator, item: Item
) -> tuple[np.ndarray, Any]:
    """The image, uint8 [H, W, 3] (RGB), and label, [H, W] or None, that the transform makes of these.

    What the transform draws from PyTorch's global generator depends on `generator`; the global one stays as it is.

    Raises:
        DatasetError: the transform returns something else than a uint8 image and a label of its size and the old dtype.
    """
    from torchvision import tv_tensors

    mask = None if label is None else tv_tensors.Mask(label_tensor(label.copy()))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(generator.integers(2**63)))  # torch.manual_seed would seed GPUs as well
        found = transform(tv_tensors.Image(torch.from_numpy(image.copy()).permute(2, 0, 1)), mask)
    new_image, new_label = (*found,) if isinstance(found, tuple | list) and len(found) == 2 else (found, None)
    if not _is_sample(new_image, new_label, mask):
        expected = "None for its label" if mask is None else f"its label, {_kind(mask).split()[0]} [H, W]"
        raise DatasetError(
            f"{item.image}: expected the transform to return an image, uint8 [3, H, W], and {expected}, got "
            f"{_kind(new_image)} and {_kind(new_label)}"
        )
    return np.ascontiguousarray(new_image.permute(1, 2, 0)), None if mask is None else new_label.numpy()


def _is_sample(image: Any, label: Any, mask: Tensor | None) -> bool:
    """Whether these are a uint8 image, and a label of its size and of the dtype of `mask`, or None as that is."""
    is_image = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3 and len(image) == 3
    if not is_image or mask is None:
        return is_image and label is None
    return isinstance(label, Tensor) and label.dtype == mask.dtype and label.shape == image.shape[1:]


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "None" if value is None else type(value).__name__


def color_jitter(brightness: float, contrast: float, saturation: float, hue: float) -> Transform:
    """torchvision's ColorJitter.

    Brightness, contrast and saturation are multiplied by factors from [max(0, 1 - x), 1 + x], and the hue is shifted by
    up to `hue` (0 to 0.5) of its circle, in random order.
    """
    from torchvision.transforms import v2

    return v2.ColorJitter(brightness, contrast, saturation, hue)
