"""Pictures of the attention: the composed influence against the product of dense attention matrices."""

import numpy as np
import torch

from cc_attention import ca_map, ca_weight
from dataset import CITYSCAPES
from dataset.transforms import normalise
from networks import build_model
from utils.visualisation import (
    attention_figure,
    attention_passes,
    composed_influence,
    overlay,
    palette_image,
    training_panel,
)


def dense(weight):
    """The attention of one pass as a matrix [h*w, h*w], a row a pixel."""
    height, width = weight.shape[2:]
    basis = torch.eye(height * width, dtype=weight.dtype).view(1, height * width, height, width)
    return ca_map(weight, basis)[0].flatten(1).T


def test_composed_influence_is_the_product_of_the_attention_matrices():
    passes = [ca_weight(*torch.randn(2, 1, 3, 4, 5, dtype=torch.float64)).softmax(1) for _ in range(3)]
    a1, a2, a3 = (dense(weight) for weight in passes)
    influences = composed_influence(passes, 2, 3)
    for influence, matrix in zip(influences, (a3, a3 @ a2, a3 @ a2 @ a1), strict=True):
        torch.testing.assert_close(influence.flatten(), matrix[2 * 5 + 3])
        torch.testing.assert_close(influence.sum(), torch.tensor(1.0, dtype=torch.float64))
    on_path = torch.zeros(4, 5, dtype=torch.bool)
    on_path[2, :] = on_path[:, 3] = True
    assert torch.equal(influences[0] > 0, on_path)  # one pass: the criss-cross
    assert (influences[1] > 0).all()  # two: everything


def test_passes_are_those_of_the_network():
    model = build_model("resnet18", recurrence=2).eval()
    model.head.cca.gamma.data.fill_(0.8)
    image = torch.randn(1, 3, 33, 41)
    logits, passes = attention_passes(model, image)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(image)[0])
        x = model.head.conva(model.features(image)[1])
        for weight in passes:
            energy = ca_weight(model.head.cca.query_conv(x), model.head.cca.key_conv(x))
            torch.testing.assert_close(weight, energy.softmax(1))
            x = 0.8 * ca_map(weight, model.head.cca.value_conv(x)) + x
    assert len(passes) == 2
    assert not model.head.cca._forward_pre_hooks


def test_figure_has_a_line_a_pixel_and_a_panel_a_pass():
    model = build_model("resnet18", recurrence=3).eval()
    figure = np.asarray(attention_figure(model, torch.randn(1, 3, 40, 80), [(5, 6), (39, 79)], CITYSCAPES))
    assert figure.shape == (18 + 2 * 200, 400 * 5, 3)
    green = (figure == (0, 255, 0)).all(-1)
    for panel in range(4):  # the image and R=1, 2, 3; not the prediction
        assert green[18 : 18 + 200, panel * 400 : (panel + 1) * 400].any()


def test_predictions_keep_their_ids_and_have_the_colours():
    ids = np.array([[0, 18], [10, 255]], np.uint8)
    image = palette_image(ids, CITYSCAPES)
    assert np.array_equal(np.asarray(image), ids)
    assert np.array_equal(np.asarray(image.convert("RGB")), CITYSCAPES.palette[ids])


def test_overlay_mixes_image_and_colours_and_names_the_classes_that_are_there():
    image = np.random.default_rng(0).integers(0, 256, (20, 260, 3), dtype=np.uint8)
    ids = np.full((20, 260), 10, np.uint8)
    picture = np.asarray(overlay(image, ids, CITYSCAPES))
    mixed = (image.astype(int) + CITYSCAPES.palette[10]) / 2
    assert np.abs(picture[:20] - mixed).max() <= 0.5
    legend = picture[20:]
    assert (legend == CITYSCAPES.palette[10]).all(-1).any()
    assert not (legend == CITYSCAPES.palette[13]).all(-1).any()
    assert overlay(image[:, :8], ids[:, :8], CITYSCAPES).width == 200  # room for the legend


def test_training_panel_shows_image_label_and_prediction():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    label = torch.full((16, 24), 255, dtype=torch.uint8)
    label[4:] = 10
    logits = torch.zeros(19, 2, 3)
    logits[13] = 1
    panel = training_panel(torch.from_numpy(normalise(pixels)), label, logits, CITYSCAPES)
    assert panel.shape == (16, 72, 3)
    assert np.array_equal(panel[:, :24], pixels)
    assert (panel[4:, 24:48] == CITYSCAPES.palette[10]).all()
    assert (panel[4:, 48:] == CITYSCAPES.palette[13]).all()
    assert (panel[:4, 24:] == 0).all()
