"""Generated scenes: reproducible, in the Cityscapes layout, with a class that only the far cue tells."""

import json

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from dataset import EvaluationSet, scan
from dataset.scenes import CUES, LABEL_IDS, make_scene, write_data_set


@pytest.mark.parametrize(("height", "width"), [(48, 48), (96, 96), (48, 192)])
def test_the_cue_tells_the_vehicle_and_nothing_else_does(height, width):
    shared_rows = 0
    looks = {name: [] for name in CUES}
    for number in range(200):
        scene = make_scene(height, width, np.random.default_rng(number))
        vehicle, cue = scene.vehicle, scene.cue
        ids = scene.label[vehicle.top : vehicle.bottom, vehicle.left : vehicle.right]
        (name,) = (name for name in CUES if (ids == LABEL_IDS[name]).all())
        cue_name, colour = CUES[name]
        assert (scene.label[cue.top : cue.bottom, cue.left : cue.right] == LABEL_IDS[cue_name]).all()
        others = {LABEL_IDS[label] for other in CUES if other != name for label in (other, CUES[other][0])}
        assert not others & set(np.unique(scene.label))
        pixels = scene.image[cue.top : cue.bottom, cue.left : cue.right].mean((0, 1))
        assert min((c for _, c in CUES.values()), key=lambda c: np.abs(pixels - c).sum()) == colour
        looks[name].append(scene.image[vehicle.top : vehicle.bottom, vehicle.left : vehicle.right].mean((0, 1)))
        assert cue.left >= vehicle.right + width // 3 or vehicle.left >= cue.right + width // 3
        shared_rows += cue.top < vehicle.bottom and vehicle.top < cue.bottom
    assert 0.4 < shared_rows / 200 < 0.6
    bus, truck = (np.array(looks[name]) for name in CUES)
    assert 60 < len(bus) < 140
    # Their colours differ no more than two samples of one distribution do.
    error = np.sqrt(bus.var(0) / len(bus) + truck.var(0) / len(truck))
    assert (np.abs(bus.mean(0) - truck.mean(0)) < 4 * error).all()


def test_a_data_set_is_reproducible_and_left_alone_when_it_is_there(tmp_path):
    counts = {"train": 2, "val": 1, "test": 1}
    for folder in ("a", "b"):
        write_data_set(tmp_path / folder, counts, 48, 64, seed=3)
    for a, b in zip(scan(tmp_path / "a", "trainval"), scan(tmp_path / "b", "trainval"), strict=True):
        assert a.image.read_bytes() == b.image.read_bytes()
        assert a.label.read_bytes() == b.label.read_bytes()
    first = scan(tmp_path / "a", "train")[0].image
    before = first.stat().st_mtime_ns
    write_data_set(tmp_path / "a", counts, 48, 64, seed=3)
    assert first.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="expected no data set or the same"):
        write_data_set(tmp_path / "a", counts, 48, 64, seed=4)


def test_an_interrupted_data_set_is_finished(tmp_path):
    counts = {"train": 2, "val": 1, "test": 1}
    write_data_set(tmp_path, counts, 48, 64, seed=3)
    scan(tmp_path, "val")[0].image.unlink()
    marker = tmp_path / "scenes.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "complete": False}))
    with pytest.raises(FileExistsError, match="expected no data set or the same"):
        write_data_set(tmp_path, counts, 48, 80, seed=3)
    write_data_set(tmp_path, counts, 48, 64, seed=3)
    assert len(scan(tmp_path, "val")) == 1
    assert json.loads(marker.read_text())["complete"] is True


def test_a_data_set_without_instances_gets_them(tmp_path):
    """As earlier versions wrote it; nothing else changes."""
    counts = {"train": 1, "val": 1, "test": 1}
    write_data_set(tmp_path, counts, 48, 64, seed=3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for path in tmp_path.rglob("*_instanceIds.png"):
        path.unlink()
    marker = tmp_path / "scenes.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "version": 2}))
    write_data_set(tmp_path, counts, 48, 64, seed=3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_instances_are_things_of_their_own():
    for number in range(20):
        scene = make_scene(96, 96, np.random.default_rng(number))
        things = scene.instances >= 1000
        ids = np.where(things, scene.instances // 1000, scene.instances)
        assert np.array_equal(ids, scene.label)
        assert things[scene.vehicle.top, scene.vehicle.left]
        assert set(np.unique(scene.label[things])) <= set(range(24, 34))
        assert not set(np.unique(scene.label[~things])) & set(range(24, 34))


@pytest.mark.parametrize("kind", ["semantic", "instance", "color"])
def test_torchvisions_reader_reads_them(scenes, kind):
    data = datasets.Cityscapes(str(scenes), split="val", mode="fine", target_type=kind)
    found = dict(zip(data.images, data, strict=True))  # in no order
    for item in scan(scenes, "val"):
        image, target = found.pop(str(item.image))
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(item.image)))
        if kind == "semantic":
            assert np.array_equal(np.asarray(target), np.asarray(Image.open(item.label)))
    assert not found


def test_other_peoples_folders_are_not_written_to(tmp_path):
    (tmp_path / "leftImg8bit").mkdir()
    with pytest.raises(FileExistsError, match="expected an empty folder or generated scenes"):
        write_data_set(tmp_path, {"train": 1}, 48, 64, seed=3)
    assert [path.name for path in tmp_path.iterdir()] == ["leftImg8bit"]


def test_hidden_files_are_ignored(tmp_path):
    (tmp_path / ".DS_Store").write_text("")
    write_data_set(tmp_path, {"train": 1}, 48, 64, seed=3)
    assert len(scan(tmp_path, "train")) == 1


def test_the_labels_are_readable_by_the_pipeline(scenes):
    sample = EvaluationSet(scan(scenes, "val"))[0]
    assert sample["image"].shape == (3, 48, 64)
    labels = set(np.unique(sample["label"]))
    assert {0, 10, 255} <= labels  # road, sky, void


def test_too_small_is_an_error():
    with pytest.raises(ValueError, match="size: expected at least 48x48, got 40x96"):
        make_scene(40, 96, np.random.default_rng(0))
