"""Files, labels, augmentation and loading."""

import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision import tv_tensors
from torchvision.transforms import v2

import evaluate
import train
from dataset import (
    CITYSCAPES,
    DatasetError,
    EpochSampler,
    EvaluationSet,
    TrainingSet,
    check_labels,
    color_jitter,
    load_batches,
    read_list,
    scan,
    shard,
)
from dataset.images import Box, ImageFile
from dataset.items import Item
from dataset.samples import read_train_ids
from dataset.transforms import (
    IMAGE_MEAN,
    SCALE_TENTHS,
    Crop,
    Rotation,
    Span,
    denormalise,
    draw_crop,
    normalise,
    resize_image,
    resize_label,
    rotate_image,
    rotate_label,
    scaled_length,
    source_box,
)
from networks import build_model
from utils.distributed import World


def test_label_table_is_that_of_cityscapesscripts():
    from cityscapesscripts.helpers.labels import labels as official

    learnt = {label.trainId: label for label in official if label.trainId not in (-1, 255)}
    assert CITYSCAPES.names == [learnt[k].name for k in range(19)]
    assert CITYSCAPES.palette[:19].tolist() == [list(learnt[k].color) for k in range(19)]
    assert CITYSCAPES.label_values[:19].tolist() == [learnt[k].id for k in range(19)]
    for label in official:
        expected = label.trainId if label.trainId in learnt else 200
        for value, encoding in ((label.id, "ids"), (label.trainId, "trainids")):
            in_8_bits = np.array([[value % 256]], np.uint8)
            assert CITYSCAPES.train_ids(in_8_bits, encoding, ignore_label=200) == expected
            assert CITYSCAPES.train_ids(np.array([[value]]), encoding, ignore_label=200) == expected
    assert CITYSCAPES.known().sum() == 34 + 2  # -1 is 255 and 65535


TRAIN_IDS = np.full(256, 255, np.uint8)
TRAIN_IDS[CITYSCAPES.label_values[:19]] = range(19)

# ---- files


def test_scan_finds_every_split(scenes):
    assert [len(scan(scenes, split)) for split in ("train", "val", "test", "trainval")] == [6, 3, 2, 9]
    item = scan(scenes, "train")[0]
    assert item.label.name == item.frame + "_gtFine_labelIds.png"
    assert item.name == item.frame + "_leftImg8bit"
    assert all(item.label is None for item in scan(scenes, "test"))


def test_hidden_files_and_folders_are_no_data(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / ".hidden" / "data")
    root = tmp_path / ".hidden" / "data"
    image = scan(root, "val")[0].image
    image.with_name("._" + image.name).write_bytes(b"\x00\x05\x16\x07")
    shutil.copytree(image.parent, image.parent.parent / ".trash")
    assert [item.image.name for item in scan(root, "val")] == [item.image.name for item in scan(scenes, "val")]
    image.parent.rename(image.parent.parent / ".moved")
    with pytest.raises(DatasetError, match=r"no images of the split 'val'(.|\n)*leftImg8bit/val holds nothing"):
        scan(root, "val")


@pytest.mark.parametrize("suffix", [".jpg", ".PNG"])
def test_images_of_other_formats_are_not_left_out_silently(scenes, tmp_path, suffix):
    shutil.copytree(scenes, tmp_path, dirs_exist_ok=True)
    image = scan(tmp_path, "val")[1].image
    image.rename(image.with_suffix(suffix))
    with pytest.raises(DatasetError, match=rf"expected every image as \*_leftImg8bit.png, found .*{suffix}$"):
        scan(tmp_path, "val")


def test_list_files_of_the_original(scenes, tmp_path):
    items = scan(scenes, "val")
    lines = [f"{item.image.relative_to(scenes)}\t{item.label.relative_to(scenes)}" for item in items]
    (tmp_path / "val.lst").write_text("\n".join(lines) + "\n\n")
    assert read_list(scenes, tmp_path / "val.lst") == items
    (tmp_path / "test.lst").write_text(str(items[0].image.relative_to(scenes)))
    assert read_list(scenes, tmp_path / "test.lst") == [Item(items[0].image, None)]


def test_no_data_says_what_is_expected_and_found(scenes, tmp_path):
    with pytest.raises(DatasetError, match=r"Cityscapes: leftImg8bit/<split>/<city>/(.|\n)*nowhere does not exist"):
        scan(tmp_path / "nowhere", "train")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DatasetError, match=rf"found: {tmp_path} holds pictures/"):
        scan(tmp_path, "train")
    (tmp_path / "leftImg8bit" / "val").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"no images of the split 'train'(.|\n)*leftImg8bit holds val/"):
        scan(tmp_path, "trainval")


def test_image_without_label_is_named(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path, dirs_exist_ok=True)
    gone = scan(tmp_path, "train")[2].label
    gone.unlink()
    with pytest.raises(DatasetError, match=rf"1 of 6 label files do not exist:\n *{gone}"):
        scan(tmp_path, "train")


@pytest.mark.parametrize(
    "line",
    [
        "an image.png\tits label.png",
        "  an image.png \t\t its label.png \t",
        "'an image.png' \"its label.png\"",
        "'an image.png'\t'its label.png'",
        "an\\ image.png its\\ label.png",
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_list_files_with_spaces_comments_and_a_byte_order_mark(tmp_path, line, newline):
    for name in ("an image.png", "its label.png", "a.png", "#b.png"):
        (tmp_path / name).touch()
    lines = ["# image and label: isn't it", line, "", "  # more", "a.png\t#b.png"]
    (tmp_path / "x.lst").write_bytes(b"\xef\xbb\xbf" + newline.join(lines).encode())
    expected = [
        Item(tmp_path / "an image.png", tmp_path / "its label.png"),
        Item(tmp_path / "a.png", tmp_path / "#b.png"),
    ]
    assert read_list(tmp_path, tmp_path / "x.lst") == expected


def test_training_lists_need_labels(scenes, tmp_path):
    image, label = scan(scenes, "val")[0].image, scan(scenes, "val")[0].label
    (tmp_path / "x.lst").write_text(f"{image} {label}\n# a comment\n{image}\n{image} {label}\n{image}\n")
    assert len(read_list(scenes, tmp_path / "x.lst")) == 4
    with pytest.raises(DatasetError, match=r"x.lst: .* no label in 2 of 4 lines, the first of them line 3: '.*leftImg"):
        read_list(scenes, tmp_path / "x.lst", need_labels=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b c\n", "line 1: expected the path of an image, or .*found 3 columns: 'a b c'"),
        ("", "found no line"),
        ("gone.png\n", "1 of 1 image files do not exist"),
        ("# only this\n", "found no line"),
        ("\ta.png\n", "line 1: .*found 2 columns"),
        ("a.png\n'b.png\n", "line 2: .*No closing quotation"),
    ],
)
def test_wrong_list_files(scenes, tmp_path, text, message):
    path = tmp_path / "x.lst"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_list(scenes, path)
    with pytest.raises(DatasetError, match="expected a list file"):
        read_list(scenes, tmp_path / "nowhere.lst")


def test_part_of_an_image_is_that_part_of_the_whole(scenes):
    file = ImageFile(scan(scenes, "val")[0].image)
    whole = file.read_colour()
    assert whole.shape == (*file.size, 3)
    assert np.array_equal(whole, cv2.imread(str(file.path))[..., ::-1])
    for box in (Box(0, 10, 0, 64), Box(5, 30, 7, 40), Box(40, 70, 60, 90)):
        assert np.array_equal(file.read_colour(box), whole[box.top : box.bottom, box.left : box.right])


@pytest.mark.parametrize("format", ["png", "jpg", "interlaced"])
def test_other_formats_are_read_in_parts_too(tmp_path, format):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    path = tmp_path / f"image.{'jpg' if format == 'jpg' else 'png'}"
    Image.fromarray(pixels).save(path, **({"interlace": 1} if format == "interlaced" else {}))
    file = ImageFile(path)
    assert np.array_equal(file.read_colour(Box(3, 20, 4, 9)), file.read_colour()[3:20, 4:9])


def test_palette_label_images_are_read_as_indices(tmp_path):
    label = Image.fromarray(np.full((4, 4), 26, np.uint8))
    label.putpalette(CITYSCAPES.palette.tobytes())
    label.save(tmp_path / "label.png")
    assert (ImageFile(tmp_path / "label.png").read_label() == 26).all()


def one_item(tmp_path, image, label):
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(label).save(tmp_path / "label.png")
    return Item(tmp_path / "image.png", tmp_path / "label.png")


IMAGE = np.zeros((12, 16, 3), np.uint8)


@pytest.mark.parametrize("make", [EvaluationSet, lambda items: TrainingSet(items, (8, 8))])
def test_bad_files_are_named(tmp_path, make):
    def sample(item):
        dataset = make([item])
        return dataset[0 if isinstance(dataset, EvaluationSet) else (0, 0)]

    item = one_item(tmp_path, IMAGE, np.full((12, 16), 34, np.uint8))
    with pytest.raises(
        DatasetError, match=r"label.png: expected label ids 0..33 and -1 \(255\) of cityscapes, found 34"
    ):
        sample(item)
    item = one_item(tmp_path, IMAGE, np.zeros((12, 15), np.uint8))
    with pytest.raises(DatasetError, match=r"label.png: expected the size of its image image.png, 12x16, found 12x15"):
        sample(item)
    item = one_item(tmp_path, IMAGE, np.stack([np.full((12, 16), channel, np.uint8) for channel in (7, 8, 7)], 2))
    with pytest.raises(DatasetError, match=r"label.png: .* or the same in three, found the colour \(7, 8, 7\)"):
        sample(item)
    item = one_item(tmp_path, IMAGE, np.full((12, 16), 255, np.uint8))
    sample(item)  # license plate's -1
    item.image.write_bytes(item.image.read_bytes()[:50])
    with pytest.raises(DatasetError, match=r"image.png: expected an image"):
        sample(item)
    item.image.write_text("no image")
    with pytest.raises(DatasetError, match=r"image.png: expected an image file"):
        sample(item)


TURNS = {  # EXIF orientation: the image as it is shown, of that which is stored
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


def save_turned(path, pixels, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def move_exif_to_the_end(path):
    """PNG allows it behind the pixels."""
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    path.write_bytes(data.replace(chunk, b"")[:-12] + chunk + data[-12:])


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_as_their_exif_orientation_says(tmp_path, suffix, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels).save(path)
    shown = TURNS[orientation](ImageFile(path).read_colour())
    save_turned(path, pixels, orientation)

    def check():
        file = ImageFile(path)
        assert file.size == shown.shape[:2]
        assert file.is_turned == (orientation != 1)
        assert np.array_equal(file.read_colour(), shown)
        assert np.array_equal(file.read_colour(Box(2, 9, 3, 40)), shown[2:9, 3:40])

    check()
    if suffix == "png":
        move_exif_to_the_end(path)
        check()


def test_labels_are_turned_too_and_a_size_error_says_so(tmp_path):
    item = one_item(tmp_path, IMAGE, np.zeros((12, 16), np.uint8))
    label = np.random.default_rng(0).integers(0, 34, (16, 12), dtype=np.uint8)
    save_turned(item.label, label, 6)
    assert np.array_equal(EvaluationSet([item])[0]["label"], TRAIN_IDS[TURNS[6](label)])
    save_turned(item.image, IMAGE, 8)
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(item.label)
    message = "image.png, 16x12, found 12x16, after turning image.png as the EXIF orientation says"
    with pytest.raises(DatasetError, match=message):
        EvaluationSet([item])[0]


@pytest.mark.parametrize(
    ("save", "found"),
    [
        (lambda image, path: image.save(path, "JPEG"), "JPEG"),
        (lambda image, path: image.save(path, "WEBP"), "WEBP"),
        (lambda image, path: image.save(path, "GIF"), "GIF"),  # its palette may be sorted
        (lambda image, path: image.save(path, "TIFF", compression="jpeg"), "TIFF with .*jpeg compression"),
        (lambda image, path: path.write_bytes(png_of_four_bits()), "PNG with grey levels stored as L;4"),
    ],
)
def test_label_formats_that_may_change_the_values_are_refused(tmp_path, save, found):
    path = tmp_path / "label.png"
    save(Image.fromarray(np.full((8, 8), 7, np.uint8)), path)
    with pytest.raises(DatasetError, match=rf"label.png: expected a lossless label image .* found {found}"):
        ImageFile(path).read_label()


def png_of_four_bits():
    """Two grey levels, 0 and 1 of 15, which Pillow reads as 0 and 17."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\x01")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["bmp", "tif"])
def test_other_lossless_label_formats_are_read(tmp_path, suffix):
    label = np.arange(34, dtype=np.uint8)[None]
    Image.fromarray(label).save(tmp_path / f"label.{suffix}")
    assert np.array_equal(ImageFile(tmp_path / f"label.{suffix}").read_label(), label)


@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")])
def test_void_in_labels_of_more_than_8_bits(tmp_path, dtype, suffix):
    path = tmp_path / f"label.{suffix}"
    values = [7, 255, 65535, -1 if dtype == np.int32 else 0]
    Image.fromarray(np.array([values], dtype)).save(path)
    item = Item(path, path)
    assert read_train_ids(item, CITYSCAPES).tolist() == [[0, 255, 255, 255]]
    for wrong in (34, 256 + 7, 65534):
        Image.fromarray(np.array([[7, wrong]], dtype)).save(path)
        with pytest.raises(DatasetError, match=rf"expected label ids 0..33 and -1 \(255\) of city\w+, found {wrong}$"):
            read_train_ids(item, CITYSCAPES)


def test_animations_are_refused(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (7, 8)]
    frames[0].save(tmp_path / "label.png", save_all=True, append_images=frames[1:])
    with pytest.raises(DatasetError, match=r"label.png: expected one image, found an animation"):
        ImageFile(tmp_path / "label.png")


# ---- encodings


def copy_as(scenes, root, name, values):
    """The scenes with other label images: with `name` in place of labelIds, and values mapped by the table."""
    shutil.copytree(scenes / "leftImg8bit", root / "leftImg8bit")
    for path in (scenes / "gtFine").glob("*/*/*_labelIds.png"):
        copy = root / path.relative_to(scenes).with_name(path.name.replace("labelIds", name))
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values[np.asarray(Image.open(path))]).save(copy)


def labels_of(items):
    return [sample["label"] for sample in map(EvaluationSet(items).__getitem__, range(len(items)))]


def same_labels(items, others):
    return all(torch.equal(a, b) for a, b in zip(labels_of(items), labels_of(others), strict=True))


def test_training_ids_are_read_by_their_name(scenes, tmp_path):
    copy_as(scenes, tmp_path, "labelTrainIds", TRAIN_IDS)
    expected, items = scan(scenes, "val"), scan(tmp_path, "val")
    assert [item.encoding for item in items] == ["trainids"] * 3
    assert same_labels(items, expected)
    crops = TrainingSet(items, (30, 40), seed=1), TrainingSet(expected, (30, 40), seed=1)
    assert torch.equal(crops[0][(0, 2)]["label"], crops[1][(0, 2)]["label"])
    check_labels(items, CITYSCAPES)
    # A list may mix both.
    (tmp_path / "x.lst").write_text(f"{items[0].image} {items[0].label}\n{items[1].image} {expected[1].label}\n")
    mixed = read_list(tmp_path, tmp_path / "x.lst")
    assert [item.encoding for item in mixed] == ["trainids", "ids"]
    assert same_labels(mixed, expected[:2])
    check_labels(mixed, CITYSCAPES)
    # The encoding chooses the file: ids where there are both, unless told otherwise.
    shutil.copytree(scenes / "gtFine", tmp_path / "gtFine", dirs_exist_ok=True)
    for encoding, found in ((None, "ids"), ("ids", "ids"), ("trainids", "trainids")):
        items = scan(tmp_path, "val", encoding)
        assert {item.label.name.split("_")[-1].lower() for item in items} == {f"label{found}.png"}
        assert same_labels(items, expected)


def test_training_ids_without_their_name_are_refused_unless_told(scenes, tmp_path):
    copy_as(scenes, tmp_path, "labelIds", TRAIN_IDS)
    with pytest.raises(
        DatasetError, match=r"labelIds.png: .* first 3 label images only the values 0, .*, 255; .*rainids"
    ):
        check_labels(scan(tmp_path, "val"), CITYSCAPES)
    told = scan(tmp_path, "val", "trainids")
    check_labels(told, CITYSCAPES)
    assert same_labels(told, scan(scenes, "val"))
    check_labels(scan(tmp_path, "val", "ids"), CITYSCAPES)
    with pytest.raises(DatasetError, match=r"expected training ids 0..18 and 255 \(void\), found \d\d$"):
        check_labels(scan(scenes, "val", "trainids"), CITYSCAPES)


def test_training_ids_in_three_equal_channels_are_refused_as_well(scenes, tmp_path):
    copy_as(scenes, tmp_path, "labelIds", np.stack([TRAIN_IDS] * 3, axis=1))
    with pytest.raises(DatasetError, match=r"labelIds.png: .* only the values 0, .*, 255; .*rainids"):
        check_labels(scan(tmp_path, "val"), CITYSCAPES)


@pytest.mark.parametrize("values", [[0, 1, 2, 3, 4], [0, 255]])
def test_labels_without_a_valid_pixel_are_refused(scenes, tmp_path, values):
    copy_as(scenes, tmp_path, "labelIds", np.resize(values, 256).astype(np.uint8))
    listed = ", ".join(map(str, values))
    with pytest.raises(DatasetError, match=rf"only the values {listed}; if they are training ids"):
        check_labels(scan(tmp_path, "train"), CITYSCAPES)
    with pytest.raises(DatasetError, match=rf"no pixel of a class .*, 6 in all: .* the values {listed}$"):
        check_labels(scan(tmp_path, "train", "ids"), CITYSCAPES)
    # One image with a valid pixel is enough.
    items = scan(tmp_path, "train", "ids")
    shutil.copy(scan(scenes, "train")[5].label, items[5].label)
    check_labels(items, CITYSCAPES)


def test_images_without_labels_need_no_check(scenes):
    check_labels(scan(scenes, "test"), CITYSCAPES)


def test_scripts_refuse_meaningless_labels_before_anything_else(scenes, tmp_path):
    copy_as(scenes, tmp_path, "labelIds", np.zeros(256, np.uint8))
    command = ["--data-dir", str(tmp_path), "--label-encoding", "ids"]
    world = World(torch.device("cpu"))
    with pytest.raises(DatasetError, match="no pixel of a class"):
        train.train(train.parse_flags(command), world)
    torch.save(build_model("resnet18").state_dict(), tmp_path / "x.pth")  # it says which classes there are
    arguments = evaluate.get_parser().parse_args([*command, "--restore-from", str(tmp_path / "x.pth")])
    with pytest.raises(DatasetError, match="no pixel of a class"):
        evaluate.evaluate(arguments, world)


# ---- augmentation


def crop_by_definition(image, label, crop):
    """Scale the whole, then crop, as the original does."""
    scale = crop.tenths / 10
    scaled = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    rows = np.minimum(np.arange(scaled.shape[0]) * 10 // crop.tenths, label.shape[0] - 1)
    columns = np.minimum(np.arange(scaled.shape[1]) * 10 // crop.tenths, label.shape[1] - 1)
    part = np.s_[crop.rows.start : crop.rows.stop, crop.columns.start : crop.columns.stop]
    return scaled[part], label[np.ix_(rows, columns)][part]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([True, (0.1, 8)]), st.integers(0, 2**32), st.integers(8, 70), st.integers(8, 70),
    st.integers(1, 60), st.integers(1, 60),
)  # fmt: skip
def test_crop_first_gives_the_pixels_of_resize_first(scales, seed, height, width, crop_height, crop_width):
    """From 8 pixels on: OpenCV copies an image whose size rounds to itself, as that of 4 scaled by 1.1 does."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    label = generator.integers(0, 34, (height, width), dtype=np.uint8)
    crop = draw_crop(generator, (height, width), (crop_height, crop_width), scales, False)
    box = source_box(crop)
    part = np.s_[box.top : box.bottom, box.left : box.right]
    expected_image, expected_label = crop_by_definition(image, label, crop)
    # OpenCV may round its interpolation weights differently at other positions: at most one grey level.
    assert np.abs(resize_image(image[part], crop).astype(int) - expected_image).max(initial=0) <= 1
    assert np.array_equal(resize_label(label[part], crop), expected_label)


def rotated_by_definition(scaled, rotation):
    """The whole scaled image [H, W, C] rotated bilinearly, and by nearest pixel; NaN where nothing is."""
    height, width = scaled.shape[:2]
    out = np.full((2, *rotation.size, scaled.shape[2]), np.nan)
    centre = [(span.start + span.stop - 1) / 2 for span in (rotation.rows, rotation.columns)]
    turn = np.exp(1j * np.radians(rotation.degrees))  # the y axis points down: counter-clockwise is exp(-i angle)
    for i in range(rotation.size[0]):
        for j in range(rotation.size[1]):
            offset = complex(rotation.columns.start + j - centre[1], rotation.rows.start + i - centre[0]) * turn
            y, x = centre[0] + offset.imag, centre[1] + offset.real
            if 0 <= y <= height - 1 and 0 <= x <= width - 1:
                a, b = min(int(y), height - 2), min(int(x), width - 2)
                corners = scaled[a : a + 2, b : b + 2].astype(float)
                weights = np.outer([a + 1 - y, y - a], [b + 1 - x, x - b])
                out[0, i, j] = (corners * weights[..., None]).sum((0, 1))
            if -0.5 < y < height - 0.5 and -0.5 < x < width - 0.5:
                out[1, i, j] = scaled[round(y), round(x)]
    return out


@pytest.mark.parametrize("seed", range(12))
def test_rotating_the_crop_gives_the_pixels_of_rotating_the_whole(seed):
    generator = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8), (0, 0), 3)
    image = cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX)
    label = generator.integers(0, 34, image.shape[:2], dtype=np.uint8)
    crop = draw_crop(generator, image.shape[:2], (25, 40), (0.3, 2.1), False, 60)
    whole = Crop(crop.tenths, *(Span(0, scaled_length(length, crop.tenths)) for length in image.shape[:2]), False)
    box = source_box(crop)
    part = np.s_[box.top : box.bottom, box.left : box.right]
    pixels = rotate_image(resize_image(image[part], crop), crop)
    ids = rotate_label(resize_label(label[part], crop), crop, 255)
    scaled_image, scaled_label = crop_by_definition(image, label, whole)
    expected, _ = rotated_by_definition(scaled_image, crop.rotation)
    _, expected_ids = rotated_by_definition(scaled_label[..., None], crop.rotation)
    # OpenCV interpolates at multiples of 1/32 pixel.
    steps = max(np.abs(np.diff(scaled_image.astype(int), axis=axis)).max() for axis in (0, 1))
    inside = ~np.isnan(expected)
    assert np.abs(pixels[inside] - expected[inside]).max() <= 2 + 2 * steps / 64
    assert np.array_equal(ids, np.nan_to_num(expected_ids, nan=255)[..., 0])
    beyond = cv2.erode((ids == 255).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    assert (pixels[beyond] == np.rint(IMAGE_MEAN[::-1])).all()


def test_corners_of_a_rotated_crop_hold_what_the_image_has_there():
    image = np.full((100, 100, 3), 200, np.uint8)
    spans = (Span(30, 60), Span(40, 70))
    rotation = Rotation(45.0, *spans, (30, 30))
    crop = Crop(10, *rotation.reach((100, 100)), False, rotation)
    box = source_box(crop)
    assert (box.top, box.bottom) < (30, 60)
    part = image[box.top : box.bottom, box.left : box.right]
    assert (rotate_image(resize_image(part, crop), crop) == 200).all()
    assert (rotate_label(resize_label(part[..., 0], crop), crop, 255) == 200).all()


def test_rotation_is_drawn_last_and_only_if_it_is_on():
    for seed in range(20):
        plain, with_none, rotated = (np.random.default_rng(seed) for _ in range(3))
        crop = draw_crop(plain, (90, 120), (40, 50), True, True)
        assert crop == draw_crop(with_none, (90, 120), (40, 50), True, True, 0)
        assert plain.bit_generator.state == with_none.bit_generator.state
        other = draw_crop(rotated, (90, 120), (40, 50), True, True, 30)
        assert (other.tenths, other.mirror) == (crop.tenths, crop.mirror)
        assert (other.rotation.rows, other.rotation.columns) == (crop.rows, crop.columns)
        assert -30 <= other.rotation.degrees <= 30


def test_the_sizes_are_opencvs():
    for length in range(1, 60):
        for tenths in SCALE_TENTHS:
            scaled = cv2.resize(np.zeros((length, 4), np.uint8), None, fx=1, fy=tenths / 10)
            assert scaled.shape[0] == scaled_length(length, tenths)


def test_the_source_box_is_small():
    """Of a 1024x2048 image at scale 2, a 769x769 crop needs about 385x385 pixels."""
    box = source_box(Crop(20, Span(600, 1369), Span(1000, 1769), False))
    assert (box.bottom - box.top, box.right - box.left) <= (390, 390)


def test_distribution_of_the_augmentation():
    generator = np.random.default_rng(1)
    crops = [draw_crop(generator, (20, 40), (10, 10), True, True) for _ in range(6000)]
    tenths, counts = np.unique([crop.tenths for crop in crops], return_counts=True)
    assert list(tenths) == list(range(7, 22))
    assert abs(counts / 6000 - 1 / 15).max() < 0.015
    assert abs(np.mean([crop.mirror for crop in crops]) - 0.5) < 0.03
    at_one = [crop.columns.start for crop in crops if crop.tenths == 10]
    assert set(at_one) == set(range(31))  # every position, both ends included


def test_scales_are_drawn_from_those_given():
    recipe, same = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(50):
        crop = draw_crop(recipe, (20, 40), (10, 10), True, True)
        assert crop == draw_crop(same, (20, 40), (10, 10), (0.7, 2.1), True)
    drawn = [draw_crop(recipe, (20, 40), (10, 10), (0.5, 0.9), True).tenths for _ in range(200)]
    assert set(drawn) == {5, 6, 7, 8, 9}
    assert draw_crop(recipe, (2, 3), (10, 10), (0.1, 0.1), True).rows == Span(0, 1)  # a pixel at least


@pytest.mark.parametrize("scales", [(0.55, 2.0), (2.0, 0.5), (0.0, 1.0), (0.5, 8.1), (float("nan"), 1.0)])
def test_other_scales_are_refused(scales):
    low, high = scales
    message = rf"expected LOW,HIGH, multiples of 0.1 with 0.1 <= LOW <= HIGH <= 8, got {low:g},{high:g}"
    with pytest.raises(ValueError, match=message):
        TrainingSet([], (8, 8), random_scale=scales)


def test_no_augmentation_unless_asked_for():
    generator = np.random.default_rng(1)
    crops = [draw_crop(generator, (20, 40), (10, 10), False, False) for _ in range(50)]
    assert {(crop.tenths, crop.mirror) for crop in crops} == {(10, False)}


def test_normalised_is_bgr_without_mean_padded_with_zeros_then_mirrored():
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    expected = np.zeros((3, 5, 6), np.float32)
    expected[:, :3, :4] = (image[..., ::-1].astype(np.float32) - IMAGE_MEAN).transpose(2, 0, 1)
    np.testing.assert_allclose(normalise(image, (5, 6)), expected, atol=1e-5)
    np.testing.assert_allclose(normalise(image, (5, 6), mirror=True), expected[:, :, ::-1], atol=1e-5)
    assert np.array_equal(denormalise(normalise(image)), image)


def test_sample_of_a_small_image_is_padded_and_consistent(tmp_path):
    """Image and label are augmented together: where the image is red, the label is road."""
    image = np.zeros((12, 16, 3), np.uint8)
    image[2:7, 3:9, 0] = 255
    label = np.where(image[..., 0] > 0, 7, 23).astype(np.uint8)
    dataset = TrainingSet([one_item(tmp_path, image, label)], (30, 40), seed=3)
    for epoch in range(30):
        sample = dataset[(epoch, 0)]
        red = sample["image"][2] > 130 - IMAGE_MEAN[2]
        road, void = sample["label"] == 0, sample["label"] == 255
        # The two are resized differently (bilinear, nearest), which shifts edges by up to a pixel and a half.
        kernel = np.ones((5, 5), np.uint8)
        for a, b in ((red, road), (road, red)):
            assert not (a.numpy() & (cv2.dilate(b.numpy().astype(np.uint8), kernel) == 0)).any()
        assert road.any()
        assert (sample["image"][:, void] == 0).all()


# ---- transforms of torchvision, and torch's DataLoader


jitter = color_jitter(0.5, 0.5, 0.5, 0.5)


@pytest.mark.parametrize("workers", [0, 2])
def test_both_sets_go_into_torchs_data_loader(scenes, workers):
    samples = TrainingSet(scan(scenes, "train"), (40, 48), seed=5)
    loader = DataLoader(samples, batch_size=2, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    for epoch in (0, 3):
        samples.set_epoch(epoch)
        names = []
        for batch in loader:
            assert batch["image"].shape == (2, 3, 40, 48)
            for image, label, name in zip(batch["image"], batch["label"], batch["name"], strict=True):
                index = [item.name for item in samples.items].index(name)
                assert torch.equal(image, samples[(epoch, index)]["image"])
                assert torch.equal(label, samples[(epoch, index)]["label"])
                names.append(name)
        assert sorted(names) == sorted(item.name for item in samples.items)
    whole = EvaluationSet(scan(scenes, "val"))
    (batch,) = DataLoader(whole, batch_size=3, num_workers=workers)
    assert batch["index"].tolist() == [0, 1, 2]
    assert batch["name"] == [item.name for item in whole.items]
    assert torch.equal(batch["label"][2], whole[2]["label"])
    assert torch.equal(whole[-1]["image"], whole[2]["image"])
    (unlabelled,) = DataLoader(EvaluationSet(scan(scenes, "test")), batch_size=2)
    assert set(unlabelled) == {"image", "name", "index"}
    assert len(list(samples)) == 6  # iteration ends


def test_transforms_get_rgb_and_training_ids_after_the_crop_and_before_normalisation(scenes):
    seen = []

    def swap(image, label):
        seen.append((image, label))
        return image.flip(0), label.where(label != 0, 5)

    items = scan(scenes, "train")
    for plain, changed, size in (
        (EvaluationSet(items), EvaluationSet(items, transform=swap), (48, 64)),
        (TrainingSet(items, (30, 40)), TrainingSet(items, (30, 40), transform=swap), (30, 40)),
    ):
        before, after = plain[1], changed[1]
        image, label = seen.pop()
        assert isinstance(image, tv_tensors.Image)
        assert isinstance(label, tv_tensors.Mask)
        assert (image.dtype, tuple(image.shape), tuple(label.shape)) == (torch.uint8, (3, *size), size)
        mean = torch.from_numpy(IMAGE_MEAN)[:, None, None]
        torch.testing.assert_close(after["image"] + mean, (before["image"] + mean).flip(0), atol=1e-4, rtol=0)
        assert torch.equal(after["label"], before["label"].where(before["label"] != 0, 5))


def test_colour_jitter_is_torchvisions_drawn_from_the_samples_stream(scenes):
    items = scan(scenes, "train")
    plain = TrainingSet(items, (40, 48), random_scale=False, random_mirror=False, seed=5)[(2, 3)]
    sample = TrainingSet(items, (40, 48), random_scale=False, random_mirror=False, seed=5, transform=jitter)[(2, 3)]
    stream = np.random.default_rng([5, 1, 2, 3])
    draw_crop(stream, (48, 64), (40, 48), False, False)
    torch.manual_seed(int(stream.integers(2**63)))
    pixels = torch.from_numpy(denormalise(plain["image"].numpy())).permute(2, 0, 1)
    expected = v2.ColorJitter(0.5, 0.5, 0.5, 0.5)(pixels).permute(1, 2, 0).numpy()
    assert np.array_equal(denormalise(sample["image"].numpy()), expected)


def test_what_a_transform_draws_depends_on_seed_epoch_and_index_alone(scenes):
    items = scan(scenes, "train")

    def images(samples, keys):
        return torch.stack([samples[key]["image"] for key in keys])

    def training_set(seed=5, transform=jitter):
        return TrainingSet(items, (40, 48), seed=seed, transform=transform)

    keys = [(epoch, index) for epoch in (0, 1) for index in range(6)]
    before = torch.get_rng_state()
    expected = images(training_set(), keys)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(images(training_set(), reversed(keys)).flip(0), expected)
    assert not torch.equal(images(training_set(), keys[:1]), images(training_set(transform=None), keys[:1]))
    assert not torch.equal(images(training_set(seed=6), keys[:1]), expected[:1])
    # The draws of crop, scale and mirroring stay as they are.
    labels = [[samples[key]["label"] for key in keys] for samples in (training_set(), training_set(transform=None))]
    assert all(torch.equal(a, b) for a, b in zip(*labels, strict=True))
    whole = EvaluationSet(items, transform=jitter, seed=1), EvaluationSet(items, transform=jitter, seed=2)
    assert torch.equal(images(whole[0], [3]), images(whole[0], [3]))
    assert not torch.equal(images(whole[0], [3]), images(whole[1], [3]))


def test_transforms_of_torchvision_work_as_they_are(scenes, tmp_path):
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: 255}
    transform = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomRotation(20, fill=fill), v2.GaussianBlur(3)])
    both = TrainingSet(scan(scenes, "train"), (40, 48), transform=transform)
    assert len(torch.stack([sample["image"] for sample in both])) == 6
    small = EvaluationSet(scan(scenes, "val"), transform=v2.Resize((24, 32)))[0]
    assert small["image"].shape[1:] == small["label"].shape == (24, 32)
    without_label = EvaluationSet(scan(scenes, "test"), transform=transform)[0]
    assert "label" not in without_label


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image, label: image, r"and its label, uint8 \[H, W\], got uint8 \[3, 30, 40\] and None"),
        (lambda image, label: (image / 255, label), r"got float32 \[3, 30, 40\] and uint8 \[30, 40\]"),
        (lambda image, label: (image, label.long()), r"got uint8 \[3, 30, 40\] and int64 \[30, 40\]"),
        (lambda image, label: (image, label[1:]), r"got uint8 \[3, 30, 40\] and uint8 \[29, 40\]"),
        (v2.Resize((31, 40)), "at most 30x40, the crop's size, got 31x40"),
    ],
)
def test_what_a_transform_returns_is_checked(scenes, transform, message):
    items = scan(scenes, "train")[:1]
    with pytest.raises(DatasetError, match=rf"{items[0].image}: expected the transform to return .*{message}"):
        TrainingSet(items, (30, 40), transform=transform)[0]


# ---- loading


def batches(scenes, workers, seed=5, first=0, last=7):
    dataset = TrainingSet(scan(scenes, "train"), (40, 48), seed=seed)
    return list(load_batches(dataset, EpochSampler(len(dataset), 4, first, last, seed), workers))


def same(a, b):
    return torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"]) and a["name"] == b["name"]


def test_batches_do_not_depend_on_the_number_of_workers(scenes):
    alone = batches(scenes, 0)
    for workers in (1, 2):
        assert all(same(a, b) for a, b in zip(alone, batches(scenes, workers), strict=True))


def test_batches_of_a_step_do_not_depend_on_where_the_run_began(scenes):
    assert all(same(a, b) for a, b in zip(batches(scenes, 0)[3:], batches(scenes, 0, first=3), strict=True))


def test_batches_depend_on_the_seed_and_epochs_differ(scenes):
    assert not same(batches(scenes, 0)[0], batches(scenes, 0, seed=6)[0])
    dataset = TrainingSet(scan(scenes, "train"), (40, 48))
    assert not torch.equal(dataset[(0, 1)]["image"], dataset[(1, 1)]["image"])


def test_loading_leaves_the_global_generator_alone(scenes):
    before = torch.get_rng_state()
    batches(scenes, 1, last=1)
    assert torch.equal(before, torch.get_rng_state())


@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 9))
def test_epochs_neither_drop_nor_repeat_an_image(num_images, batch_size, seed):
    keys = [key for batch in EpochSampler(num_images, batch_size, 0, 40, seed) for key in batch]
    assert len(keys) == 40 * batch_size
    for begin in range(0, len(keys) - num_images + 1, num_images):
        epoch = keys[begin : begin + num_images]
        assert {e for e, _ in epoch} == {begin // num_images}
        assert sorted(i for _, i in epoch) == list(range(num_images))


@given(st.integers(0, 50), st.integers(1, 9))
def test_shards_are_contiguous_and_even(total, num_processes):
    shards = [shard(total, process, num_processes) for process in range(num_processes)]
    assert [i for part in shards for i in part] == list(range(total))
    assert {len(part) for part in shards} <= {total // num_processes, -(-total // num_processes)}


@st.composite
def cuts(draw):
    """(num_images, batch_size, parts, num_processes) that fit each other."""
    num_processes, parts = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    part_size = draw(st.integers(num_processes, num_processes + 5))
    return draw(st.integers(1, 20)), part_size * parts, parts, num_processes


@given(cuts(), st.integers(0, 9), st.integers(0, 12), st.integers(0, 12))
def test_parts_and_processes_together_see_the_batch_of_one_process(cut, seed, first, num_steps):
    num_images, batch_size, parts, num_processes = cut
    whole = list(EpochSampler(num_images, batch_size, first, first + num_steps, seed))
    samplers = [
        EpochSampler(num_images, batch_size, 0, first + num_steps, seed, parts, process, num_processes)
        for process in range(num_processes)
    ]
    assert {len(sampler) for sampler in samplers} == {(first + num_steps) * parts}
    for process, sampler in enumerate(samplers):
        resumed = EpochSampler(num_images, batch_size, first, first + num_steps, seed, parts, process, num_processes)
        assert list(resumed) == list(sampler)[first * parts :]
        assert len(resumed) == num_steps * parts
    micro_batches = [list(chain(*shares)) for shares in zip(*samplers, strict=True)]
    assert {len(keys) for keys in micro_batches} <= {batch_size // parts}
    steps = [list(chain(*micro_batches[i : i + parts])) for i in range(0, len(micro_batches), parts)]
    assert steps[first:] == whole
    keys = list(chain(*steps))
    for begin in range(0, len(keys) - num_images + 1, num_images):
        assert sorted(keys[begin : begin + num_images]) == [(begin // num_images, i) for i in range(num_images)]


@pytest.mark.parametrize(
    ("batch_size", "parts", "process", "num_processes", "message"),
    [
        (8, 3, 0, 1, "expected a multiple of the 3 parts, got 8"),
        (8, 0, 0, 1, "expected a multiple of the 0 parts, got 8"),
        (8, 4, 0, 3, "an image for each of 3 processes in each of 4 parts, 12 or more, got 8"),
        (8, 1, 2, 2, "process: expected 0..1, got 2"),
        (8, 1, -1, 2, "process: expected 0..1, got -1"),
    ],
)
def test_batches_that_cannot_be_cut(batch_size, parts, process, num_processes, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(10, batch_size, 0, 1, 0, parts, process, num_processes)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_arrives_as_it_is(scenes, tmp_path, workers):
    shutil.copytree(scenes, tmp_path, dirs_exist_ok=True)
    broken = scan(tmp_path, "train")[3].image
    broken.write_text("broken")
    with pytest.raises(DatasetError) as error:
        batches(tmp_path, workers)
    assert str(error.value).startswith(str(broken))
    assert "Traceback" not in str(error.value)


class Failing(TrainingSet):
    """Meets an error at the image of index 3."""

    def __init__(self, items, fail):
        super().__init__(items, (40, 48))
        self.fail = fail

    def __getitem__(self, key):
        if key[1] == 3:
            self.fail()
        return super().__getitem__(key)


def raise_opencvs_error():
    cv2.resize(np.zeros((0, 0), np.uint8), (1, 1))


def raise_memory_error():
    raise MemoryError


def raise_value_error():
    raise ValueError("two\nlines")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fail", "kind", "text"),
    [
        (raise_opencvs_error, cv2.error, r"cv2.error: OpenCV.*resize"),
        (raise_memory_error, MemoryError, "MemoryError$"),
        (raise_value_error, ValueError, "ValueError: two lines$"),
    ],
)
def test_an_unexpected_error_names_the_files(scenes, workers, fail, kind, text):
    items = scan(scenes, "train")
    with pytest.raises(DatasetError, match=text) as error:
        list(load_batches(Failing(items, fail), EpochSampler(6, 4, 0, 3, 0), workers))
    expected = f"{items[3].image} (label {items[3].label}): expected to make a sample of it, met an error: "
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)
    if workers == 0:
        assert isinstance(error.value.__cause__, kind)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_collating_names_all_files(scenes, workers):
    items = scan(scenes, "test")

    def collate(samples):
        raise MemoryError

    with pytest.raises(DatasetError) as error:
        list(load_batches(EvaluationSet(items), [[0, 1]], workers, collate))
    expected = f"{items[0].image}, {items[1].image}: expected to make a batch of them, met an error: MemoryError"
    assert str(error.value) == expected


def kill_worker():
    if torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)


DEATH = r"a process that loads data has died.*\(.*\); .*memory .*: give fewer --num-workers"
KILLED = r"a process that loads data has died, killed by SIGKILL \(.*\); the kernel .*: give fewer --num-workers"


def test_a_worker_that_was_killed_is_one_message(scenes, monkeypatch):
    # PyTorch checks every 5 seconds whether the workers are alive; here, 50 times as often.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    handler = signal.getsignal(signal.SIGCHLD)
    samples = Failing(scan(scenes, "train"), kill_worker)
    with pytest.raises(DatasetError, match=DEATH):
        list(load_batches(samples, EpochSampler(6, 4, 0, 3, 0), 2))
    assert not multiprocessing.active_children()
    loaded = list(load_batches(TrainingSet(samples.items, (40, 48)), EpochSampler(6, 4, 0, 3, 0), 2))
    assert len(loaded) == 3
    assert handler == signal.SIG_DFL or signal.getsignal(signal.SIGCHLD) is handler


def test_a_worker_that_dies_during_a_step_is_met_at_the_next_batch(scenes):
    """PyTorch's handler of SIGCHLD would raise in the middle of the step."""
    dataset = TrainingSet(scan(scenes, "train"), (40, 48))
    loaded = load_batches(dataset, EpochSampler(6, 4, 0, 40, 0), 2)
    next(loaded)
    worker = multiprocessing.active_children()[0].pid
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)  # WNOWAIT: it is PyTorch that finds it
    torch.ones(3).sum()  # the step
    with pytest.raises(DatasetError, match=KILLED):
        next(loaded)


@pytest.mark.slow
def test_a_process_whose_error_is_kept_ends():
    """The traceback keeps the loader, whose processes ignore the SIGTERM that they are ended with."""
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from dataset import DatasetError, EvaluationSet, Item, load_batches
try:
    next(load_batches(EvaluationSet([Item(Path("nowhere.png"), None)]), [[0]], 2))
except DatasetError as error:
    kept = error
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
