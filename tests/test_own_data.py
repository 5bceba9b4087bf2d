"""Other data sets than Cityscapes, from training to predictions: nothing of them is told twice."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_layouts import HEIGHT, WIDTH, ade20k, camvid_original, folders, voc, write

import evaluate
import train
from dataset import CITYSCAPES, default_classes, plain_classes, scan
from networks import build_model
from utils.launch import launch
from utils.network_file import read_network

SMALL = ["--num-workers", "0", "--device", "cpu"]
TRAIN = [*SMALL, "--backbone", "resnet18", "--input-size", "24,32", "--batch-size", "2", "--num-steps", "1"]


def trained(data, snapshots, *flags):
    arguments = ["--data-dir", data, "--snapshot-dir", snapshots, *TRAIN, *flags]
    return launch(train.train, train.parse_flags(list(map(str, arguments))))


def evaluated(data, snapshots, *flags):
    arguments = ["--data-dir", data, "--restore-from", snapshots / "CS_scenes_1.pth", *SMALL, *flags]
    return launch(evaluate.evaluate, evaluate.get_parser().parse_args(list(map(str, arguments))))


@pytest.mark.parametrize("make", [folders, voc, ade20k, camvid_original])
def test_the_classes_go_from_the_data_to_network_checkpoint_report_and_predictions(tmp_path, make):
    data, run = tmp_path / "data", tmp_path / "run"
    make(data)
    classes = default_classes(data)
    assert trained(data, run) == 0
    state = torch.load(run / "CS_scenes_1.pth", weights_only=True)
    assert len(state["head.bottleneck.3.bias"]) == len(state["dsn.3.bias"]) == len(classes)
    assert read_network(run).classes == classes
    assert evaluated(data, run, "--submit") == 0
    results = run / "outputs/CS_scenes_1/val"
    assert list(json.loads((results / "result.json").read_text())["classes"]) == classes.names
    for item in scan(data, "val"):
        prediction = Image.open(results / "predictions" / f"{item.name}.png")
        assert prediction.size == (WIDTH, HEIGHT)
        ids = np.asarray(prediction)
        assert ids.max() < len(classes)
        assert np.array_equal(np.asarray(prediction.convert("RGB")), classes.palette[ids])
        submitted = np.asarray(Image.open(results / "submit" / f"{item.name}.png"))
        assert np.array_equal(classes.train_ids(submitted), ids)


def test_more_than_255_classes_take_16_bits(tmp_path):
    (tmp_path / "data").mkdir()
    entries = "".join(f'{{name = "c{k}", values = [{3 * k}]}},\n' for k in range(300))
    (tmp_path / "data/classes.toml").write_text(f'name = "many"\nclasses = [{entries}]\nvoid = {{values = [1]}}\n')
    for split in ("train", "val"):
        for name in "ab":
            write(tmp_path / f"data/images/{split}/{name}.png", 0)
            label = np.full((HEIGHT, WIDTH), 897, np.uint16)
            label[0] = 1
            path = tmp_path / f"data/labels/{split}/{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(label).save(path)
    assert trained(tmp_path / "data", tmp_path) == 0
    model = build_model("resnet18", num_classes=300)
    state = torch.load(tmp_path / "CS_scenes_1.pth", weights_only=True)
    model.load_state_dict(state)
    for name in ("head.bottleneck.3.bias", "dsn.3.bias"):
        state[name][299] = 1e3
    torch.save(state, tmp_path / "CS_scenes_1.pth")
    assert evaluated(tmp_path / "data", tmp_path, "--submit") == 0
    results = tmp_path / "outputs/CS_scenes_1/val"
    result = json.loads((results / "result.json").read_text())
    assert (result["pixel_accuracy"], result["classes"]["c299"], result["classes"]["c298"]) == (1, 1, None)
    assert np.unique(np.asarray(Image.open(results / "predictions/a.png"))).tolist() == [299]
    assert np.unique(np.asarray(Image.open(results / "submit/a.png"))).tolist() == [897]


def test_own_classes_in_the_layout_of_cityscapes(scenes, tmp_path, capsys):
    """Two classes of Cityscapes' label ids; evaluation has to be told again, or it would read them as Cityscapes'."""
    others = [value for value in range(34) if value not in (7, 8, 26, 27, 28)]
    table = tmp_path / "own.toml"
    table.write_text(
        'name = "roads"\nclasses = [{name = "ground", values = [7, 8]}, {name = "vehicle", values = [26, 27, 28]}]\n'
        f"void = {{values = {[-1, *others]}}}\n"
    )
    assert trained(scenes, tmp_path, "--classes", table) == 0
    assert evaluated(scenes, tmp_path) == 2
    message = capsys.readouterr().err
    assert "with labels of cityscapes: the weights were trained with the classes of" in message
    assert evaluated(scenes, tmp_path, "--classes", table) == 0
    assert "| vehicle | " in capsys.readouterr().out
    assert trained(scenes, tmp_path, "--classes", table, "--resume") == 0
    table.write_text(table.read_text().replace("[7, 8]", "[7]").replace("values = [-1,", "values = [8, -1,"))
    assert trained(scenes, tmp_path, "--classes", table, "--resume") == 2
    message = capsys.readouterr().err
    assert "was started with another class table" in message
    assert "was LabelClass(name='ground', values=(7, 8)" in message


def test_networks_and_data_of_different_classes_do_not_go_together(scenes, tmp_path, capsys):
    voc(tmp_path / "voc")
    assert trained(scenes, tmp_path) == 0
    assert evaluated(tmp_path / "voc", tmp_path) == 2
    assert "voc, with labels of voc2012: the weights were trained" in capsys.readouterr().err
    assert evaluated(tmp_path / "voc", tmp_path, "--classes", "voc2012") == 2
    assert "--classes voc2012: the weights were trained with" in capsys.readouterr().err


def test_data_without_a_class_table_are_refused(tmp_path, capsys):
    folders(tmp_path)
    (tmp_path / "classes.toml").unlink()
    assert trained(tmp_path, tmp_path / "run") == 2
    assert f"--classes: expected what the label images in {tmp_path} mean" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "classes.toml").write_text("classes = 1")
    assert trained(tmp_path, tmp_path / "run") == 2
    assert "classes.toml: the table: expected name, classes" in capsys.readouterr().err


def test_network_json_from_before_class_tables_is_of_cityscapes(scenes, tmp_path):
    assert trained(scenes, tmp_path) == 0
    content = json.loads((tmp_path / "network.json").read_text())
    assert content.pop("classes") == json.loads(json.dumps(plain_classes(CITYSCAPES)))
    (tmp_path / "network.json").write_text(json.dumps(content))
    assert read_network(tmp_path).classes is None
    assert evaluated(scenes, tmp_path) == 0
    assert trained(scenes, tmp_path, "--resume") == 0


@pytest.mark.slow
def test_camvid_under_its_own_table(camvid, tmp_path):
    """The field's 11 classes, from real street images whose labels hold Cityscapes' ids."""
    ids = {"sky": 23, "building": 11, "pole": 17, "road": 7, "pavement": 8, "tree": 21, "sign": 20, "fence": 13}
    ids |= {"car": 26, "pedestrian": 24, "bicyclist": 33}
    entries = "".join(f'{{name = "{name}", values = [{value}]}},\n' for name, value in ids.items())
    (tmp_path / "own.toml").write_text(f'name = "camvid11"\nclasses = [{entries}]\nvoid = {{values = [0]}}\n')
    flags = ["--classes", tmp_path / "own.toml"]
    assert trained(camvid, tmp_path, *flags) == 0
    assert evaluated(camvid, tmp_path, *flags, "--input-size", "360,480") == 0
    result = json.loads((tmp_path / "outputs/CS_scenes_1/val/result.json").read_text())
    assert list(result["classes"]) == list(ids)
    assert None not in result["classes"].values()
