"""Weights of the classes: counted, read from files, and as they go with a run."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import failing, run_training

from dataset import CITYSCAPES, DatasetError, Item, class_weights, parse_classes, scan
from dataset.samples import read_train_ids

TABLE = parse_classes(
    {"name": "abc", "classes": [{"name": name} for name in ("a", "b", "c d")], "void": {"values": [9]}}, ""
)


def balanced_by_definition(labels, num_classes):
    """Median frequency over frequency, class by class; 1 for those that do not occur."""
    frequencies = {}
    for k in range(num_classes):
        with_k = [label for label in labels if (label == k).any()]
        if with_k:
            frequencies[k] = sum((label == k).sum() for label in with_k) / sum(label.size for label in with_k)
    median = np.median(list(frequencies.values()))
    return [median / frequencies[k] if k in frequencies else 1 for k in range(num_classes)]


@pytest.mark.parametrize("workers", [0, 2])
def test_balanced_weights_are_median_over_frequency(scenes, workers):
    items = scan(scenes, "train")
    weights = class_weights("balanced", items, CITYSCAPES, workers)
    expected = balanced_by_definition([read_train_ids(item, CITYSCAPES) for item in items], len(CITYSCAPES))
    assert list(weights) == CITYSCAPES.names
    assert list(weights.values()) == pytest.approx(expected, rel=1e-12)
    assert weights["train"] == 1  # which does not occur


def label_item(path, values, suffix="png"):
    Image.fromarray(np.array(values)).save(path)
    return Item(path, path)


def test_balanced_weights_by_hand(tmp_path):
    """a: 5 of 12 pixels, b: 1 of 4, void counts; and in colours, and in 16 bits."""
    items = [
        label_item(tmp_path / "1.png", np.array([[0, 0, 1, 9]], np.uint8)),
        label_item(tmp_path / "2.png", np.array([[0, 0, 0, 9], [9, 9, 9, 9]], np.uint16)),
    ]
    median = (5 / 12 + 1 / 4) / 2
    expected = {"a": median / (5 / 12), "b": median / (1 / 4), "c d": 1}
    assert class_weights("balanced", items, TABLE, 0) == pytest.approx(expected, rel=1e-12)
    colours = {"name": "a", "label_colours": [[1, 2, 3]]}, {"name": "b", "label_colours": [[3, 2, 1]]}
    table = parse_classes({"name": "colours", "classes": list(colours)}, "")
    item = label_item(tmp_path / "3.png", np.array([[[1, 2, 3], [1, 2, 3], [1, 2, 3], [3, 2, 1]]], np.uint8))
    assert class_weights("balanced", [item], table, 0) == pytest.approx({"a": 0.5 / 0.75, "b": 0.5 / 0.25}, rel=1e-12)


def test_labels_that_cannot_be_counted(tmp_path):
    item = label_item(tmp_path / "1.png", np.full((2, 2), 9, np.uint8))
    with pytest.raises(DatasetError, match=r"1.png: expected a pixel of a class in some label image, found none"):
        class_weights("balanced", [item], TABLE, 0)
    label_item(tmp_path / "1.png", np.full((2, 2), 8, np.uint8))
    with pytest.raises(DatasetError, match=r"1.png: expected label ids 0..2, 9 of abc, found 8"):
        class_weights("balanced", [item], TABLE, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1.0", "a weight for each of the 3 classes of abc, found no weight of b, c d$"),
        ('a = 1\nb = 2\n"c d" = 3\nroad = 4', "found unknown names: road$"),
        ('a = 1\nb = 0\n"c d" = 3', "b: expected a weight, a number from 1e-06 to 1e\\+06, found 0$"),
        ('a = 1\nb = inf\n"c d" = 3', "b: expected a weight, .* found inf$"),
        ('a = 1\nb = true\n"c d" = 3', "b: expected a weight, .* found True$"),
        ('a = 1\nb = "1"\n"c d" = 3', "b: expected a weight, .* found '1'$"),
        ("a = 1\nc d = 2", "expected class weights, a TOML file, cannot read it"),
    ],
)
def test_files_of_weights(tmp_path, text, message):
    path = tmp_path / "weights.toml"
    path.write_text('"c d" = 3\nb = 2.5\na = 1e-1\n')
    assert list(class_weights(str(path), [], TABLE, 0).items()) == [("a", 0.1), ("b", 2.5), ("c d", 3.0)]
    path.write_text(text)
    with pytest.raises(DatasetError, match=rf"^{path}: .*{message}"):
        class_weights(str(path), [], TABLE, 0)


def weights_file(path, **changed):
    path.write_text("".join(f'"{name}" = {changed.get(name, 2)}\n' for name in CITYSCAPES.names))
    return path


def test_weights_are_printed_saved_and_the_same_on_resume(scenes, tmp_path, capsys):
    run = [scenes, tmp_path / "run", "--num-steps", 1]
    file = weights_file(tmp_path / "weights.toml", road=0.5)
    assert run_training(*run, "--class-weights", file) == 0
    assert "class weights: road 0.5, sidewalk 2, building 2, " in capsys.readouterr().out
    flags = torch.load(tmp_path / "run/CS_scenes_1.training.pth", weights_only=True)["flags"]
    assert flags["class_weights"] == {name: 0.5 if name == "road" else 2.0 for name in CITYSCAPES.names}
    assert run_training(*run, "--class-weights", file, "--resume") == 0
    weights_file(file, road=0.5, sky=3)
    message = failing(*run[:2], capsys, *run[2:], "--class-weights", file, "--resume")
    assert "--class-weights: sky: was 2.0, is 3.0" in message
    assert "--class-weights: road" not in message
    assert "is None" in failing(*run[:2], capsys, *run[2:], "--resume")
    message = failing(*run[:2], capsys, *run[2:], "--class-weights", tmp_path / "gone.toml", "--resume")
    assert f"{tmp_path / 'gone.toml'}: expected class weights, a TOML file" in message
