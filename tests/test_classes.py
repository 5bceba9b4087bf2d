"""Class tables: those that come with the project, own ones, and what they refuse."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import BUILT_IN, CITYSCAPES, ClassTable, DatasetError, load_classes, parse_classes, plain_classes
from dataset.classes import LabelClass, Void


def table(classes, **rest) -> ClassTable:
    return parse_classes({"name": "own", "classes": classes, **rest}, "own.toml")


def test_built_in_tables():
    sizes = {name: len(load_classes(name)) for name in BUILT_IN}
    assert sizes == {"ade20k": 150, "camvid": 11, "cityscapes": 19, "voc2012": 21}
    ade = load_classes("ade20k")
    assert (ade.classes[0].name, ade.classes[149].name) == ("wall", "flag")
    assert ade.train_ids(np.array([[0, 1, 150]], np.uint8)).tolist() == [[255, 0, 149]]
    voc = load_classes("voc2012")
    assert voc.palette[[0, 1, 15, 20]].tolist() == [[0, 0, 0], [128, 0, 0], [192, 128, 128], [0, 64, 128]]
    assert voc.train_ids(np.array([[0, 20, 255]], np.uint8)).tolist() == [[0, 20, 255]]
    camvid = load_classes("camvid")
    assert camvid.train_ids(np.array([[0, 10, 11]], np.uint8)).tolist() == [[0, 10, 255]]
    colours = np.array(
        [[[128, 128, 128], [64, 0, 64], [192, 0, 192], [0, 0, 0]]], np.uint8
    )  # sky, tunnel, scooter, void
    assert camvid.train_ids(colours).tolist() == [[0, 1, 10, 255]]
    assert sum(len(entry.label_colours) for entry in camvid.classes) == 31  # and void


def test_what_is_left_out_has_a_default(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('name = "roads"\nclasses = [{name = "ground"}, {name = "road", values = [255, 3]}]\n')
    roads = load_classes(path)
    assert roads.names == ["ground", "road"]
    assert roads.classes[0].values == (0,)  # its place
    assert roads.palette[:2].tolist() == [[128, 0, 0], [0, 128, 0]]
    assert roads.train_ids(np.array([[0, 255, 3]], np.uint8)).tolist() == [[0, 1, 1]]
    assert roads.label_values[:2].tolist() == [0, 255]
    assert (roads.ignore_label, roads.dtype) == (255, np.uint8)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_table_goes_through_json(name):
    expected = load_classes(name)
    assert parse_classes(json.loads(json.dumps(plain_classes(expected))), "network.json") == expected


@given(st.lists(st.integers(0, 65535), min_size=2, max_size=300, unique=True), st.integers(0, 255))
def test_training_ids_by_the_definition(values, seed):
    """Every value becomes the place of its class, or void; 300 classes take 16 bits."""
    *of_classes, void = values
    own = ClassTable("own", tuple(LabelClass(str(v), (v,)) for v in of_classes), Void((void,)))
    label = np.random.default_rng(seed).choice(np.array(values), (5, 7))
    expected = [[of_classes.index(v) if v != void else own.ignore_label for v in row] for row in label.tolist()]
    assert own.train_ids(label).tolist() == expected
    assert own.train_ids(label).dtype == (np.uint8 if len(of_classes) <= 255 else np.uint16)
    if all(v < 256 for v in values):
        assert own.train_ids(label.astype(np.uint8)).tolist() == expected


def test_values_and_colours_that_are_not_in_the_table_are_named():
    own = table([{"name": "a", "values": [1], "label_colours": [[1, 2, 3]]}], void={"values": [-1]})
    for label, found in (
        (np.array([[1, 9]], np.uint8), "found 9"),
        (np.array([[1, 300]], np.uint16), "found 300"),
        (np.array([[1, -2]], np.int32), "found -2"),
        (np.array([[1, 70000]], np.int32), "found 70000"),
        (np.array([[[1, 2, 3], [3, 2, 1]]], np.uint8), r"found \(3, 2, 1\)"),
    ):
        with pytest.raises(ValueError, match=found):
            own.train_ids(label)
    assert own.train_ids(np.array([[1, -1, 65535, 255]], np.int32)).tolist() == [[0, 255, 255, 255]]
    assert own.train_ids(np.array([[0, 255]], np.uint8), "trainids").tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name = 'x'", "the table: expected name, classes, void, training_ids; missing: classes"),
        ("name = 'x'\nclasses = []", "classes: expected a list of 1 to 65535 classes"),
        ("name = 'x'\nclasses = [{nam = 'a'}]", r"classes\[0\]: expected name, .*; missing: name"),
        ("name = 'x'\nclasses = [{name = 'a', vals = [1]}]", "unknown: vals"),
        ("name = 'x'\nclasses = [{name = ''}]", r"classes\[0\]: name: expected text, got ''"),
        ("name = 'x'\nclasses = [{name = 'a', values = [70000]}]", "values: expected whole numbers from -1 to 65535"),
        ("name = 'x'\nclasses = [{name = 'a', values = ['7']}]", "values: expected whole numbers"),
        ("name = 'x'\nclasses = [{name = 'a', colour = '#ff0000'}]", r"colour: expected \[red, green, blue\]"),
        ("name = 'x'\nclasses = [{name = 'a', label_colours = [1, 2, 3]}]", "label_colours: expected "),
        ("name = 'x'\nclasses = [{name = 'a'}, {name = 'a', values = [3]}]", "different names, found a twice"),
        ("name = 'x'\nclasses = [{name = 'a'}, {name = 'b', values = [0]}]", "found 0 of a and b"),
        ("name = 'x'\nclasses = [{name = 'a', values = [255]}]\nvoid = {values = [-1]}", "found 255 of a and void"),
        ("name = 'x'\ntraining_ids = 1\nclasses = [{name = 'a'}]", "training_ids: expected true or false"),
        ("name = ", "expected a class table, a TOML file, cannot read it"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, content, message):
    (tmp_path / "own.toml").write_text(content)
    with pytest.raises(DatasetError, match=rf"own.toml: .*{message}"):
        load_classes(tmp_path / "own.toml")


@pytest.mark.parametrize("name", ["nowhere.toml", "cityscape", "/"])
def test_tables_that_are_not_there(name):
    with pytest.raises(DatasetError, match=f"{name}: expected a class table: ade20k, camvid, cityscapes, voc2012 or a"):
        load_classes(name)


def test_the_table_of_cityscapes_is_the_default():
    assert load_classes("cityscapes") == CITYSCAPES
    assert (len(CITYSCAPES), CITYSCAPES.ignore_label) == (19, 255)
