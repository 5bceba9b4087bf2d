"""Any image, predicted by a snapshot: evaluate.py --images, and load_model from Python."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from programs import ROOT
from test_layouts import folders
from test_own_data import SMALL, trained

import evaluate
from dataset import CITYSCAPES, DatasetError, load_classes
from networks import StateDictError, build_model, load_model
from utils.launch import launch

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """A network of two classes that predicts both."""
    root = tmp_path_factory.mktemp("snapshot")
    folders(root / "data")
    assert trained(root / "data", root, "--recurrence", 1) == 0
    path = root / "CS_scenes_1.pth"
    state = torch.load(path, weights_only=True)
    state["head.bottleneck.3.weight"].mul_(30)
    torch.save(state, path)
    return path


def predicted(snapshot, *flags):
    arguments = ["--restore-from", snapshot, *SMALL, "--input-size", "33,41", "--images", *flags]
    return launch(evaluate.evaluate, evaluate.get_parser().parse_args(list(map(str, arguments))))


def test_images_of_any_kind_are_predicted_without_a_data_set(snapshot, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, kind in (("a/1.png", "RGB"), ("b/1.JPG", "L"), ("b/deep/2.webp", "RGB"), ("c.tif", "CMYK")):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).resize((20 + 10 * len(name), 33)).convert(kind).save(path)
    (tmp_path / "pictures/notes.txt").write_text("not an image")
    assert predicted(snapshot, "pictures/a", "pictures/b", "pictures/c.tif", "--output-dir", "out") == 0
    assert "overlays:     out/overlays" in capsys.readouterr().out
    model = load_model(snapshot)
    for name in ("a/1.png", "b/1.JPG", "b/deep/2.webp", "c.tif"):
        source, stem = tmp_path / "pictures" / name, name.rpartition(".")[0]
        ids = np.asarray(Image.open(tmp_path / "out/predictions" / f"{stem}.png"))
        assert ids.shape == Image.open(source).size[::-1]
        assert np.array_equal(ids, model.predict(source, tile_size=(33, 41)))
        picture = Image.open(tmp_path / "out/overlays" / f"{stem}.jpg")
        assert picture.height > ids.shape[0]  # the legend
    assert {0, 1} == set(np.unique(model.predict(PIXELS, tile_size=(33, 41))).tolist())


def test_images_that_are_none(snapshot, tmp_path, capsys):
    assert predicted(snapshot, tmp_path / "nowhere.jpg") == 2
    assert "nowhere.jpg: expected an image or a folder of images" in capsys.readouterr().err
    (tmp_path / "text.jpg").write_text("no image")
    assert predicted(snapshot, tmp_path / "text.jpg", "--output-dir", tmp_path / "out") == 2
    assert "text.jpg: expected an image file, cannot read it" in capsys.readouterr().err


def test_an_image_may_be_a_path_a_pil_image_or_an_array(snapshot, tmp_path):
    model = load_model(snapshot)
    assert model.classes.names == ["wall", "crack"]
    assert model.network.head.recurrence == 1
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=exif)
    turned = np.ascontiguousarray(PIXELS.swapaxes(0, 1)[:, ::-1])
    expected = model.predict(turned)
    assert (expected.dtype, expected.shape) == (np.uint8, (50, 40))
    for image in (tmp_path / "x.png", str(tmp_path / "x.png"), Image.open(tmp_path / "x.png"), Image.fromarray(turned)):
        assert np.array_equal(model.predict(image), expected)
    assert np.array_equal(model.predict(PIXELS[..., 0]), model.predict(np.stack([PIXELS[..., 0]] * 3, 2)))
    for wrong in (PIXELS.astype(np.float32), PIXELS.transpose(2, 0, 1), PIXELS[None]):
        with pytest.raises(ValueError, match=r"image: expected uint8 \[H, W, 3\] or \[H, W\], got"):
            model.predict(wrong)
    with pytest.raises(ValueError, match="expected a PIL image of 8 bits, got mode I;16"):
        model.predict(Image.fromarray(PIXELS[..., 0].astype(np.uint16)))


def test_scales_and_mirror_images_are_averaged(snapshot):
    model = load_model(snapshot)
    with torch.no_grad():
        mirrored = model.predict(PIXELS[:, ::-1].copy(), scales=(1.0, 1.5), flip=True)[:, ::-1]
    assert (mirrored == model.predict(PIXELS, scales=(1.0, 1.5), flip=True)).mean() > 0.99  # up to rounding


def test_a_snapshot_alone_knows_what_it_is(snapshot, tmp_path):
    """Also without network.json beside it; and it is a plain state dict."""
    moved = tmp_path / "moved.pth"
    moved.write_bytes((snapshot.parent / "CS_scenes_1.pth").read_bytes())
    model = load_model(moved)
    assert (model.network.head.recurrence, model.classes.names) == (1, ["wall", "crack"])
    state = torch.load(moved, weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    build_model("resnet18", num_classes=2).load_state_dict(state)
    assert np.array_equal(model.predict(PIXELS), load_model(snapshot).predict(PIXELS))


def test_snapshots_without_network_json(tmp_path):
    torch.save(build_model("resnet18").state_dict(), tmp_path / "19.pth")
    model = load_model(tmp_path / "19.pth", recurrence=3)
    assert (model.classes, model.network.head.recurrence) == (CITYSCAPES, 3)
    torch.save(build_model("resnet18", num_classes=11).state_dict(), tmp_path / "11.pth")
    with pytest.raises(DatasetError, match=r"11.pth: expected a class table of its 11 classes, found none"):
        load_model(tmp_path / "11.pth")
    with pytest.raises(DatasetError, match="found cityscapes with 19"):
        load_model(tmp_path / "11.pth", classes=CITYSCAPES)
    assert load_model(tmp_path / "11.pth", classes=load_classes("camvid")).classes.name == "camvid"
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(StateDictError, match=r"x.pth: expected the weights of CCNet, found fc.weight"):
        load_model(tmp_path / "x.pth")


def test_training_begins_with_a_network_of_other_classes(scenes, snapshot, tmp_path, capsys):
    """Everything that fits is loaded, and what does not is told."""
    assert trained(scenes, tmp_path, "--num-steps", 0, "--restore-from", snapshot) == 0
    out = capsys.readouterr().out
    left_out = ["dsn.3.bias", "dsn.3.weight", "head.bottleneck.3.bias", "head.bottleneck.3.weight"]
    assert f"{snapshot}: loaded without {', '.join(left_out)}, which begin anew" in out
    before, after = (torch.load(path, weights_only=True) for path in (snapshot, tmp_path / "CS_scenes_0.pth"))
    differ = [name for name in after if before[name].shape != after[name].shape]
    assert sorted(differ) == left_out
    assert all(torch.equal(before[name], after[name]) for name in after if name not in differ)


def test_equally_many_other_classes_are_other_classes(snapshot, tmp_path, capsys):
    folders(tmp_path / "data")
    path = tmp_path / "data/classes.toml"
    flags = ["--num-steps", 0, "--restore-from", snapshot]
    assert trained(tmp_path / "data", tmp_path / "same", *flags) == 0
    assert "loaded without" not in capsys.readouterr().out
    path.write_text(path.read_text().replace("crack", "moss"))
    assert trained(tmp_path / "data", tmp_path / "others", *flags) == 0
    assert "loaded without dsn.3.bias, " in capsys.readouterr().out
    before, same, others = (
        torch.load(path, weights_only=True)["dsn.3.weight"]
        for path in (snapshot, tmp_path / "same/CS_scenes_0.pth", tmp_path / "others/CS_scenes_0.pth")
    )
    assert torch.equal(before, same)
    assert not torch.equal(before, others)
    assert trained(tmp_path / "data", tmp_path / "ft", *flags, "--ft") == 2
    assert "the weights were trained with the classes of cracks" in capsys.readouterr().err


def test_torch_hub_builds_networks_and_loads_snapshots(snapshot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = torch.hub.load(str(ROOT), "ccnet", source="local", backbone="resnet18", num_classes=2, head="psp")
    assert network.state_dict()["head.bottleneck.3.weight"].shape[0] == 2
    model = torch.hub.load(str(ROOT), "ccnet_model", snapshot, source="local")
    assert np.array_equal(model.predict(PIXELS), load_model(snapshot).predict(PIXELS))
