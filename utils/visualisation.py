"""Pictures: coloured predictions, panels of image, label and prediction, and figures of the attention."""

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cc_attention import ca_map, ca_weight
from dataset import ClassTable, ImageFile
from dataset.contact_sheet import legend
from dataset.transforms import denormalise, normalise
from networks import CCNet
from networks.rcca import RCCAModule

from .criterion import upsample

_GREEN = (0, 255, 0)
_RED = (214, 39, 40)
_PANEL_WIDTH = 400
_TITLE_HEIGHT = 18


def palette_image(train_ids: np.ndarray, classes: ClassTable) -> Image.Image:
    """Training ids [H, W] to an image whose pixels are the ids: in 8 bits with the classes' colours, or in 16 bits."""
    image = Image.fromarray(train_ids)
    if train_ids.dtype == np.uint8:
        image.putpalette(classes.palette.tobytes())
    return image


def overlay(image: np.ndarray, train_ids: np.ndarray, classes: ClassTable) -> Image.Image:
    """The classes' colours over the image, half and half, and below it a legend of the classes that it has.

    image: uint8 [H, W, 3] RGB; train_ids: [H, W].
    """
    mixed = cv2.addWeighted(image, 0.5, classes.palette[train_ids], 0.5, 0)
    present = np.unique(train_ids).tolist()
    names = legend([entry for index, entry in enumerate(classes.classes) if index in present], max(image.shape[1], 200))
    picture = Image.new("RGB", (names.width, image.shape[0] + names.height), "white")
    picture.paste(Image.fromarray(mixed), (0, 0))
    picture.paste(names, (0, image.shape[0]))
    return picture


def training_panel(image: Tensor, label: Tensor, logits: Tensor, classes: ClassTable) -> np.ndarray:
    """Image, label and prediction side by side: uint8 [H, 3W, 3] RGB.

    image: float32 [3, H, W], normalised as for the network; label: [H, W] training ids; logits: [K, h, w]. Void pixels
    are black in label and prediction.
    """
    prediction = upsample(logits[None].float(), label.shape)[0].argmax(0)
    label_pixels = label.cpu().numpy()
    is_valid = (label_pixels < len(classes))[..., None]
    colours = (classes.palette[pixels] * is_valid for pixels in (label_pixels, prediction.cpu().numpy()))
    return np.concatenate([denormalise(image.cpu().numpy()), *colours], axis=1)


def error_panel(image: np.ndarray, label: np.ndarray, prediction: np.ndarray, classes: ClassTable) -> np.ndarray:
    """Image, truth, prediction and errors side by side, uint8 [H, 4W, 3] RGB; errors are red over the grey image.

    image: uint8 [H, W, 3] RGB; label, prediction: [H, W] training ids. Void pixels are black in the truth.
    """
    is_valid = label < len(classes)
    grey = np.repeat(image.mean(2, keepdims=True) * 0.5 + 127, 3, axis=2).astype(np.uint8)
    errors = np.where((is_valid & (label != prediction))[..., None], np.array(_RED, np.uint8), grey)
    truth = classes.palette[label] * is_valid[..., None]
    return np.concatenate([image, truth, classes.palette[prediction], errors], axis=1)


@torch.no_grad()
def attention_passes(model: CCNet, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run the network on one image [1, 3, H, W]. Returns the main logits [1, K, h, w] and the attention weights.

    There is one tensor of weights for each of the R passes: [1, h+w-1, h, w], in the order of `ca_weight` along dim 1.
    """
    if not isinstance(model.head, RCCAModule):
        raise ValueError(f"model: expected the head RCCAModule, got {type(model.head).__name__}")
    cca = model.head.cca
    inputs: list[Tensor] = []
    hook = cca.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        logits = model(image)[0]
    finally:
        hook.remove()
    return logits, [ca_weight(cca.query_conv(x), cca.key_conv(x)).softmax(1) for x in inputs]


def composed_influence(passes: list[Tensor], row: int, column: int) -> list[Tensor]:
    """How much each position contributes to the output at (row, column) through the last pass, the last two, ... all R.

    With A_r the attention of pass r as a matrix (position by position), entry k of the result is the row of that
    position in the product A_R ... A_(R-k), computed exactly. Each entry is [h, w] and sums to 1.
    """
    height, width = passes[0].shape[2:]
    mass = passes[0].new_zeros(1, 1, height, width)
    mass[0, 0, row, column] = 1
    influences = []
    for weight in reversed(passes):
        # Multiply by the transpose of `ca_map`: since that is linear in the values, its gradient.
        with torch.enable_grad():
            value = torch.zeros_like(mass, requires_grad=True)
            (mass,) = torch.autograd.grad(ca_map(weight, value), value, mass)
        influences.append(mass[0, 0])
    return influences


def attention_figure(model: CCNet, image: Tensor, pixels: list[tuple[int, int]], classes: ClassTable) -> Image.Image:
    """The paper's figure of the attention, one row for each pixel.

    A row shows the image with the pixel as a green cross, the influence on it with R=1, R=2, ..., and the prediction.
    The colour is the square root of the influence over its maximum, so that small contributions are visible.

    Args:
        image: float32 [1, 3, H, W], normalised as for the network.
        pixels: (y, x) of each pixel in the image.

    Raises:
        ValueError: the network has R=0.
    """
    logits, passes = attention_passes(model, image)
    if not passes:
        raise ValueError("recurrence: expected 1 or more to show attention, the network has 0")
    height, width = image.shape[2:]
    size = (_PANEL_WIDTH, round(_PANEL_WIDTH * height / width))
    photograph = denormalise(image[0].cpu().numpy())
    prediction = upsample(logits, (height, width))[0].argmax(0).cpu().numpy()
    titles = ["image", *(f"R={r}" for r in range(1, len(passes) + 1)), "prediction"]
    lines = [_title_line(titles, size[0])]
    for y, x in pixels:
        # The corners of the image and of the feature map are aligned.
        row = round(y * (passes[0].shape[2] - 1) / max(height - 1, 1))
        column = round(x * (passes[0].shape[3] - 1) / max(width - 1, 1))
        heats = [_heat(influence, photograph) for influence in composed_influence(passes, row, column)]
        panels = [cv2.resize(panel, size, interpolation=cv2.INTER_AREA) for panel in (photograph, *heats)]
        panels.append(cv2.resize(classes.palette[prediction], size, interpolation=cv2.INTER_NEAREST))
        centre = (round(x * size[0] / width), round(y * size[1] / height))
        for panel in panels[:-1]:
            cv2.drawMarker(panel, centre, _GREEN, cv2.MARKER_CROSS, markerSize=14, thickness=2)
        lines.append(np.concatenate(panels, axis=1))
    return Image.fromarray(np.concatenate(lines, axis=0))


def attention_of_file(model: CCNet, path: Path, pixels: list[tuple[int, int]], classes: ClassTable) -> Image.Image:
    """`attention_figure` of an image file."""
    image = torch.from_numpy(normalise(ImageFile(path).read_colour()))[None]
    image = image.to(next(model.parameters()).device, memory_format=torch.channels_last)
    return attention_figure(model, image, pixels, classes)


def _title_line(titles: list[str], panel_width: int) -> np.ndarray:
    line = Image.new("RGB", (panel_width * len(titles), _TITLE_HEIGHT), "white")
    draw = ImageDraw.Draw(line)
    for number, title in enumerate(titles):
        draw.text((number * panel_width + 6, 3), title, fill="black")
    return np.asarray(line)


def _heat(influence: Tensor, photograph: np.ndarray) -> np.ndarray:
    """The influence [h, w] as colours over the grey image: uint8 [H, W, 3] RGB."""
    height, width = photograph.shape[:2]
    relative = (influence / influence.max()).sqrt()[None, None]
    heat = upsample(relative, (height, width))[0, 0].cpu().numpy()
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    grey = cv2.cvtColor(cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(cv2.addWeighted(colours, 0.6, grey, 0.4, 0))
