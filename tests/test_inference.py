"""Prediction of whole images, and IoU."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from utils.inference import multi_scale, sliding_predictor, tile_starts, whole_predictor
from utils.metrics import ConfusionMatrix


class Local(nn.Module):
    """A network at full resolution that sees one pixel, so that tiling must not change its result."""

    def forward(self, images):
        return [torch.cat([images, -images[:, :1]], 1), None]


class Positional(nn.Module):
    """A network whose logits depend on where in its input a pixel is, so that tiling shows."""

    def forward(self, images):
        rows = torch.arange(images.shape[2], dtype=images.dtype)[:, None]
        return [images[:, :1] * rows + torch.arange(images.shape[3], dtype=images.dtype), None]


@given(st.integers(1, 90), st.integers(0, 110))
def test_tiles_cover_the_axis_and_overlap_by_a_third(tile, more):
    length = tile + more
    starts = tile_starts(length, tile)
    assert {position for start in starts for position in range(start, start + tile)} == set(range(length))
    assert all(b - a <= math.ceil(tile * 2 / 3) for a, b in itertools.pairwise(starts))
    assert len(starts) == len(set(starts))


@pytest.mark.parametrize("size", [(20, 30), (7, 50), (9, 5), (16, 16)])
def test_sliding_a_local_network_is_the_whole(size):
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    sliding = sliding_predictor(Local(), (9, 13))(images)
    torch.testing.assert_close(sliding, whole_predictor(Local())(images))


def test_overlapping_tiles_are_averaged_for_every_image_of_a_batch():
    images = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    got = sliding_predictor(Positional(), (6, 6))(images)
    total, count = torch.zeros(2, 1, 8, 9, dtype=torch.float64), torch.zeros(8, 9, dtype=torch.float64)
    for top in (0, 2):  # steps of 4, the last flush with the end
        for left in (0, 3):
            total[:, :, top : top + 6, left : left + 6] += Positional()(images[:, :, top : top + 6, left : left + 6])[0]
            count[top : top + 6, left : left + 6] += 1
    torch.testing.assert_close(got, total / count)
    torch.testing.assert_close(sliding_predictor(Positional(), (6, 6))(images[1:]), got[1:])


@pytest.mark.parametrize("tile", [(769, 769), (9, 769)])
def test_a_tile_larger_than_the_image_is_cut_to_it(tile):
    """And not filled up with something that a network would see."""
    images = torch.randn(2, 3, 9, 13, dtype=torch.float64)
    seen = []

    def network(part):
        seen.append(part)
        return [part * part.mean((2, 3), keepdim=True), None]

    torch.testing.assert_close(sliding_predictor(network, tile)(images), network(images)[0])
    assert all(torch.equal(part, images) for part in seen)


def test_flip_is_left_right_and_averaged():
    images = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    predict = whole_predictor(Positional())
    got = multi_scale(predict, [1.0], flip=True)(images)
    mirrored = Positional()(images.flip(3))[0].flip(3)
    torch.testing.assert_close(got, (Positional()(images)[0] + mirrored) / 2)
    assert not torch.allclose(got, predict(images))


def test_scales_are_resized_back_and_averaged():
    seen = []

    def predict(images):
        seen.append(tuple(images.shape[2:]))
        return torch.full((len(images), 2, *images.shape[2:]), float(len(seen)))

    got = multi_scale(predict, [0.5, 1.0, 2.0], flip=False)(torch.randn(2, 3, 10, 14))
    assert seen == [(5, 7), (10, 14), (20, 28)]
    torch.testing.assert_close(got, torch.full((2, 2, 10, 14), 2.0))


def test_iou_of_absent_classes_is_nan_and_not_in_the_mean():
    confusion = ConfusionMatrix(4)
    label = torch.tensor([[0, 0, 1, 255], [1, 1, 0, 255]])
    prediction = torch.tensor([[0, 1, 1, 3], [1, 2, 0, 0]])
    confusion.update(label[:1], prediction[:1])
    confusion.update(label[1:], prediction[1:])
    iou = confusion.iou()
    torch.testing.assert_close(iou[:3], torch.tensor([2 / 3, 2 / 4, 0 / 1], dtype=torch.float64))
    assert iou[3].isnan()  # predicted on void only
    assert confusion.mean_iou() == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert confusion.pixel_accuracy() == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match=r"prediction: expected shape \[2, 4\]"):
        confusion.update(label, prediction[:1])
