"""Layouts of data sets, in synthetic copies of the real ones, and what `python -m dataset` says of them."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dataset import DatasetError, EvaluationSet, check_labels, default_classes, output_names, scan
from dataset.__main__ import look
from dataset.items import Item
from dataset.layouts import find_layout

HEIGHT, WIDTH = 24, 32


def write(path, seed, values=None):
    """A photograph, or a label image of these values or colours, a vertical stripe each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    else:
        stripes = np.arange(WIDTH) * len(values) // WIDTH
        pixels = np.broadcast_to(np.array(values, np.uint8)[stripes][None], (HEIGHT, WIDTH, *np.shape(values)[1:]))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if "SegmentationClass" in str(path):
        image.putpalette(default_classes(path.parents[1]).palette.tobytes())
    image.save(path)


def voc(root):
    base = root / "VOCdevkit/VOC2012"
    names = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}
    write_lists(base / "ImageSets/Segmentation", names | {"test": ["2008_000001"]})
    for number, name in enumerate([*names["train"], *names["val"], "2008_000001"]):
        write(base / f"JPEGImages/{name}.jpg", number)
        if number < 3:
            write(base / f"SegmentationClass/{name}.png", number, [0, 1, 20, 255])
    write(base / "JPEGImages/2009_000009.jpg", 9)  # of another task
    return [0, 1, 20, 255], {"train": 2, "val": 1, "test": 1}


def write_lists(folder, names):
    folder.mkdir(parents=True)
    for split, of_split in names.items():
        (folder / f"{split}.txt").write_text("\n".join(of_split) + "\n")


def ade20k(root):
    for split, name, count in (("training", "ADE_train", 3), ("validation", "ADE_val", 2)):
        for number in range(1, count + 1):
            write(root / f"images/{split}/{name}_{number:08d}.jpg", number)
            write(root / f"annotations/{split}/{name}_{number:08d}.png", number, [0, 1, 2, 150])
    return [255, 0, 1, 149], {"train": 3, "val": 2}


def camvid(root):
    for split, name in (("train", "0001TP_006690"), ("val", "0016E5_07959"), ("test", "Seq05VD_f00000")):
        write(root / f"{split}/{name}.png", 0)
        write(root / f"{split}annot/{name}.png", 0, [0, 3, 10, 11])
    return [0, 3, 10, 255], {"train": 1, "val": 1, "test": 1}


def camvid_original(root):
    names = ("0001TP_006690", "0016E5_00390", "0006R0_f00930", "0016E5_08400", "0016E5_07959", "0016E5_08159")
    for name in (*names, "0001TP_008550", "Seq05VD_f05100"):
        write(root / f"701_StillsRaw_full/{name}.png", 0)
        colours = [
            [128, 128, 128],
            [128, 0, 192],
            [192, 0, 192],
            [0, 0, 0],
        ]  # Sky, LaneMkgsDriv, MotorcycleScooter, Void
        write(root / f"LabeledApproved_full/{name}_L.png", 0, colours)
    return [0, 3, 10, 255], {"train": 4, "val": 2, "test": 2}


def coarse(root):
    """gtCoarse for train_extra, beside gtFine."""
    for split, kind in (("train", "gtFine"), ("val", "gtFine"), ("train_extra", "gtCoarse")):
        write(root / f"leftImg8bit/{split}/ulm/ulm_000000_000019_leftImg8bit.png", 0)
        write(root / f"{kind}/{split}/ulm/ulm_000000_000019_{kind}_labelIds.png", 0, [7, 8, 33, 4])
    return [0, 1, 18, 255], {"train": 1, "val": 1, "train_extra": 1}


def only_coarse(root):
    counts = coarse(root)
    for split in ("train", "val"):
        for path in (root / "gtFine" / split).rglob("*.png"):
            write(root / f"gtCoarse/{split}/ulm/{path.name.replace('gtFine', 'gtCoarse')}", 0, [7, 8, 33, 4])
    shutil.rmtree(root / "gtFine")
    return counts


def folders(root):
    """JPEG photographs of any nesting and case, masks 0 and 255 beside them, classes.toml in the folder."""
    root.mkdir(exist_ok=True)
    (root / "classes.toml").write_text(
        'name = "cracks"\nclasses = [{name = "wall"}, {name = "crack", values = [255]}]\nvoid = {values = [7]}\n'
    )
    for split, name, suffix in (
        ("train", "a/1", ".jpg"),
        ("train", "b/1", ".JPEG"),
        ("val", "2", ".webp"),
        ("val", "3.x", ".bmp"),
    ):
        write(root / f"images/{split}/{name}{suffix}", 0)
        write(root / f"masks/{split}/{name}{'_mask' if split == 'val' else ''}.png", 0, [0, 255, 255, 7])
    write(root / "images/test/t.tif", 0)
    return [0, 1, 1, 255], {"train": 2, "val": 2, "test": 1}


ALL = [voc, ade20k, camvid, camvid_original, coarse, only_coarse, folders]


@pytest.mark.parametrize("make", ALL)
def test_every_layout_is_found_and_read(tmp_path, make):
    """Each split has its images, and each label the training ids that its stripes mean."""
    stripes, counts = make(tmp_path)
    classes = default_classes(tmp_path)
    for split, count in counts.items():
        items = scan(tmp_path, split)
        assert len(items) == count
        check_labels(items, classes)
        for sample in map(EvaluationSet(items, classes).__getitem__, range(count)):
            assert sample["image"].shape == (3, HEIGHT, WIDTH)
            if "label" in sample:
                assert sample["label"][0, :: WIDTH // 4].tolist() == stripes
        assert (items[0].label is None) == (split == "test" and make in (voc, folders))
    trainval = scan(tmp_path, "trainval")
    assert len(trainval) == counts["train"] + counts["val"] == len(set(output_names(trainval).values()))


@pytest.mark.parametrize("make", ALL)
def test_looking_at_a_data_set(tmp_path, make, capsys):
    stripes, counts = make(tmp_path / "data")
    assert look(tmp_path / "data", None, None, tmp_path / "sheet.png", 1) == 0
    out = capsys.readouterr().out
    for split, count in counts.items():
        assert re.search(rf"^{split} +{count} images, .* 24x32 \({count}\)$", out, re.MULTILINE)
    assert f"layout of {find_layout(tmp_path / 'data').name};" in out
    quarter = r"( +25\.000)+$"
    classes = default_classes(tmp_path / "data")
    expected = {classes.names[k]: 25 * stripes.count(k) for k in stripes if k != 255} | {
        "void": 25 * stripes.count(255)
    }
    for name, share in expected.items():
        assert re.search(rf"^{name} +{quarter if share == 25 else f'{share}'}", out, re.MULTILINE), out
    assert "nothing is wrong" in out
    assert Image.open(tmp_path / "sheet.png").width == 4 * 320


def test_all_that_is_wrong_is_told_at_once(tmp_path, capsys):
    folders(tmp_path)
    (tmp_path / "masks/train/a/1.png").unlink()
    write(tmp_path / "masks/train/b/1.png", 0, [0, 9, 33, 255])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "masks/val/2_mask.png")
    photograph = tmp_path / "images/val/3.x.bmp"
    photograph.write_bytes(photograph.read_bytes()[:99])
    assert look(tmp_path, None, None, tmp_path / "sheet.png", 2) == 1
    out = capsys.readouterr().out
    assert "5 problems:" in out
    for message in (
        "masks/train/a/1.png: expected the label of 1.jpg, does not exist",
        "masks/val/2_mask.png: expected the size of its image 2.webp, 24x32, found 9x9",
        "images/val/3.x.bmp: expected an image",
        "masks/train/b/1.png: the value 9 of train is not in the class table cracks",
        "masks/train/b/1.png: the value 33 of train is not in the class table cracks",
    ):
        assert message in out


@pytest.mark.parametrize("colours", [False, True])
def test_without_a_class_table_one_is_proposed_that_works(tmp_path, capsys, colours):
    folders(tmp_path)
    (tmp_path / "classes.toml").unlink()
    values = [[0, 0, 0], [255, 0, 0], [9, 9, 9]] if colours else [0, 255, 7]
    for path in tmp_path.glob("masks/**/*.png"):
        write(path, 0, values)
    assert look(tmp_path, None, None, None, 1) == 1
    text = capsys.readouterr().out.split("classes.toml:\n\n")[1].split("\n\n")[0]
    (tmp_path / "classes.toml").write_text(text)
    assert len(default_classes(tmp_path)) == 3
    assert look(tmp_path, None, None, tmp_path / "sheet.png", 1) == 0


def test_a_folder_of_no_layout_says_which_there_are(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DatasetError, match=r"Cityscapes: (.|\n)*VOC: (.|\n)*folders: (.|\n)*holds pictures/"):
        find_layout(tmp_path)
    voc(tmp_path / "voc")
    with pytest.raises(DatasetError, match=r"no images of the split 'train_extra'; expected the layout of VOC"):
        scan(tmp_path / "voc", "train_extra")


def test_equal_names_keep_their_folders(tmp_path):
    items = [Item(tmp_path / "x" / name, None) for name in ("a/1.png", "b/1.jpg", "b/2.png")]
    assert list(output_names(items).values()) == ["a/1", "b/1", "b/2"]
    assert list(output_names(items[1:]).values()) == ["1", "2"]
    with pytest.raises(DatasetError, match=r"b/1.jpg: expected every image once, found 2 named b/1"):
        output_names([*items, Item(tmp_path / "x/b/1.png", None)])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_photographs_of_other_modes_are_converted(tmp_path, mode):
    grey = np.arange(256, dtype=np.uint8).reshape(8, 32)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(grey).convert("RGB" if mode in ("CMYK", "YCbCr") else "L").convert(mode).save(path)
    image = EvaluationSet([Item(path, None)])[0]["image"]
    expected = (grey > 127) * 255 if mode == "1" else grey
    if mode == "1":  # dithered
        assert set((image[0] + 104.00698793).round().unique().tolist()) == {0, 255}
    else:
        assert np.abs(image[0].numpy() + 104.00698793 - expected).max() <= 1.5


def test_photographs_without_a_meaning_in_8_bits_are_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DatasetError, match=r"x.tif: expected an image of mode RGB .* found mode F"):
        EvaluationSet([Item(tmp_path / "x.tif", None)])[0]
