"""evaluate.py: agreement with the official evaluation, what it writes, and its errors."""

import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from dataset import CITYSCAPES, scan
from dataset.scenes import LABEL_IDS
from networks import BACKBONES, STEMS, NetworkConfig, build_model
from utils.checkpoint import CheckpointError, described
from utils.commandline import CommandError
from utils.launch import launch
from utils.network_file import describe, find_network, read_network, save_network
from utils.report import read_others

ROOT = Path(evaluate.__file__).parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained network whose batch-norm statistics have seen noise, so that it predicts many classes."""
    torch.manual_seed(2)
    model = build_model("resnet18")
    with torch.no_grad():
        for _ in range(3):
            model(100 * torch.randn(4, 3, 48, 64))
        model.head.cca.gamma.fill_(0.5)
        model.head.bottleneck[3].weight.mul_(20)
    path = tmp_path_factory.mktemp("checkpoint") / "CS_scenes_1.pth"
    torch.save(model.state_dict(), path)
    return path


def evaluation(data, checkpoint, output, *flags):
    arguments = ["--data-dir", data, "--restore-from", checkpoint, "--output-dir", output, "--backbone", "resnet18"]
    arguments += ["--input-size", "33,41", "--num-workers", 0, "--device", "cpu", *flags]
    args = evaluate.get_parser().parse_args([str(argument) for argument in arguments])
    return launch(evaluate.evaluate, args)


def official_iou(monkeypatch, predictions, items):
    """IoU of every class by the real cityscapesscripts, from submitted files; of instances too where there are such."""
    monkeypatch.setenv("CITYSCAPES_DATASET", "/nonexistent")
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # which NumPy no longer has
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    instances = [Path(str(item.label).replace("labelIds", "instanceIds")) for item in items]
    official.args.evalInstLevelScore = all(path.exists() for path in instances)
    official.args.JSONOutput = False
    official.args.quiet = True
    files = [str(predictions / f"{item.frame}_pred_labelIds.png") for item in items]
    return official.evaluateImgLists(files, [str(item.label) for item in items], official.args)["classScores"]


def assert_agrees(monkeypatch, output, items):
    result = json.loads((output / "result.json").read_text())
    expected = official_iou(monkeypatch, output / "submit", items)
    present = 0
    for name in CITYSCAPES.names:
        ours = result["classes"][name]
        if math.isnan(expected[name]):
            assert ours is None, name
        else:
            assert ours == pytest.approx(expected[name], abs=1e-9), name
            present += 1
    assert result["meanIU"] == pytest.approx(np.nanmean([expected[name] for name in CITYSCAPES.names]), abs=1e-9)
    return result, present


def test_agrees_with_cityscapesscripts_on_generated_scenes(scenes, checkpoint, tmp_path, monkeypatch):
    assert evaluation(scenes, checkpoint, tmp_path, "--submit", "--split", "trainval", "--batch-size", 4) == 0
    result, present = assert_agrees(monkeypatch, tmp_path, scan(scenes, "trainval"))
    assert present >= 5
    assert 0 < result["meanIU"] < 1
    assert result["images"] == 9


@pytest.mark.slow
def test_agrees_with_cityscapesscripts_on_camvid(camvid, checkpoint, tmp_path, monkeypatch):
    flags = ["--submit", "--input-size", "240,320", "--batch-size", 2]
    assert evaluation(camvid, checkpoint, tmp_path, *flags) == 0
    result, present = assert_agrees(monkeypatch, tmp_path, scan(camvid, "val"))
    assert present >= 5
    assert result["images"] == 34


def test_agrees_when_the_prediction_is_partly_right(scenes, checkpoint, tmp_path, monkeypatch):
    """The truth itself with a third of it wrong: IoUs in the middle, absent classes absent."""
    noise = np.random.default_rng(0)
    truths = {item.name: np.asarray(Image.open(item.label)) for item in scan(scenes, "val")}
    to_train_id = np.zeros(256, np.int64)
    to_train_id[CITYSCAPES.label_values[:19]] = np.arange(19)

    def predict(images):
        names = list(truths)[len(predict.done) : len(predict.done) + len(images)]
        predict.done += names
        ids = torch.from_numpy(np.stack([to_train_id[truths[name]] for name in names]))
        wrong = torch.from_numpy(noise.random(ids.shape) < 1 / 3)
        return torch.nn.functional.one_hot(torch.where(wrong, (ids + 1) % 3, ids), 19).permute(0, 3, 1, 2).float()

    predict.done = []
    monkeypatch.setattr(evaluate, "make_predictor", lambda args, world, model: predict)
    assert evaluation(scenes, checkpoint, tmp_path, "--submit", "--batch-size", 2) == 0
    result, _ = assert_agrees(monkeypatch, tmp_path, scan(scenes, "val"))
    assert result["classes"]["train"] is None
    assert 0.2 < result["classes"]["sky"] < 0.9


def test_what_it_writes(scenes, checkpoint, tmp_path, capsys):
    assert evaluation(scenes, checkpoint, tmp_path, "--submit") == 0
    items = scan(scenes, "val")
    for item in items:
        coloured = Image.open(tmp_path / "predictions" / f"{item.name}.png")
        assert coloured.mode == "P"
        train_ids = np.asarray(coloured)
        submitted = np.asarray(Image.open(tmp_path / "submit" / f"{item.frame}_pred_labelIds.png"))
        assert np.array_equal(submitted, CITYSCAPES.label_values[train_ids])
        assert set(np.unique(submitted)) <= {LABEL_IDS[name] for name in CITYSCAPES.names}
        assert train_ids.shape == (48, 64)
    assert len(list((tmp_path / "submit").iterdir())) == len(items)
    output = capsys.readouterr().out
    assert re.search(r"\| sky \| \d+\.\d\d \|", output)
    assert "| train | absent |" in output
    for name in ("report.md", "result.json", "predictions"):
        assert str(tmp_path / name) in output
    assert str(checkpoint) in output
    result = json.loads((tmp_path / "result.json").read_text())
    present = [iou for iou in result["IU_array"] if iou is not None]
    assert result["meanIU"] == pytest.approx(sum(present) / len(present))
    assert f"{100 * result['meanIU']:.2f}" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("flags", [[], ["--whole", "--scales", "0.5", "0.75"]])
def test_predictions_do_not_depend_on_the_batch_size(scenes, checkpoint, tmp_path, flags):
    for size in (1, 2):
        assert evaluation(scenes, checkpoint, tmp_path / str(size), "--batch-size", size, *flags) == 0
    for item in scan(scenes, "val"):
        one, two = (np.asarray(Image.open(tmp_path / size / "predictions" / f"{item.name}.png")) for size in "12")
        assert (one == two).mean() > 0.999  # convolutions of other batch sizes may round differently


def test_mixed_precision_predicts_the_same(scenes, checkpoint, tmp_path):
    for amp in ("off", "bf16"):
        assert evaluation(scenes, checkpoint, tmp_path / amp, "--amp", amp) == 0
    for item in scan(scenes, "val"):
        one, other = (
            np.asarray(Image.open(tmp_path / amp / "predictions" / f"{item.name}.png")) for amp in ("off", "bf16")
        )
        assert 0.9 < (one == other).mean() < 1  # where two classes are about as likely, rounding decides


def predictor_calls(scenes, checkpoint, tmp_path, monkeypatch, *flags):
    seen = []

    def record(predict, scales, flip):
        seen.append((predict.__qualname__.split(".")[0], tuple(scales), flip))
        return predict

    monkeypatch.setattr(evaluate, "multi_scale", record)
    assert evaluation(scenes, checkpoint, tmp_path, *flags) == 0
    return seen[0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("sliding_predictor", (1.0,), False)),
        (["--whole"], ("whole_predictor", (0.75, 1.0, 1.25, 1.5, 1.75, 2.0), True)),
        (["--whole", "--no-flip", "--scales", "1"], ("whole_predictor", (1.0,), False)),
        (["--flip", "--scales", "1", "2"], ("sliding_predictor", (1.0, 2.0), True)),
    ],
)
def test_flags_choose_the_prediction(scenes, checkpoint, tmp_path, monkeypatch, flags, expected):
    assert predictor_calls(scenes, checkpoint, tmp_path, monkeypatch, *flags) == expected


def test_test_images_without_labels_are_predicted_and_not_measured(scenes, checkpoint, tmp_path, capsys):
    assert evaluation(scenes, checkpoint, tmp_path, "--split", "test", "--submit") == 0
    assert len(list((tmp_path / "submit").glob("ufer_00000*_000019_pred_labelIds.png"))) == 2
    assert not (tmp_path / "result.json").exists()
    assert "IoU" not in capsys.readouterr().out


def test_images_of_different_sizes_in_one_batch(scenes, checkpoint, tmp_path):
    lines = []
    for number, size in enumerate([(48, 64), (40, 56), (40, 56)]):
        path = tmp_path / f"image_{number}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        lines.append(path.name)
    (tmp_path / "images.lst").write_text("\n".join(lines))
    flags = ["--data-list", tmp_path / "images.lst", "--batch-size", 3]
    assert evaluation(tmp_path, checkpoint, tmp_path / "out", *flags) == 0
    sizes = [Image.open(tmp_path / "out" / "predictions" / f"image_{number}.png").size for number in range(3)]
    assert sizes == [(64, 48), (56, 40), (56, 40)]


def test_attention_picture(scenes, checkpoint, tmp_path, capsys):
    flags = ["--attention", "10,20", "--attention", "40,60", "--attention-image", "hafen_000001_000019"]
    assert evaluation(scenes, checkpoint, tmp_path, *flags) == 0
    path = tmp_path / "attention" / "hafen_000001_000019_leftImg8bit.png"
    assert str(path) in capsys.readouterr().out
    assert Image.open(path).size == (4 * 400, 18 + 2 * 300)


def test_shared_flags_mean_the_same_in_both_scripts():
    training, evaluating = train.get_parser().parse_args([]), evaluate.get_parser().parse_args(["--restore-from", "x"])
    shared = vars(training).keys() & vars(evaluating).keys() - {"restore_from", "split", "batch_size"}
    assert {"recurrence", "backbone", "num_classes", "input_size", "ignore_label", "data_dir"} <= shared
    assert {name: getattr(training, name) for name in shared} == {name: getattr(evaluating, name) for name in shared}


def test_every_flag_is_read():
    source = "".join((ROOT / name).read_text() for name in ("evaluate.py", "utils/commandline.py", "utils/launch.py"))
    for action in evaluate.get_parser()._actions:
        if action.dest not in ("help", *asdict(NetworkConfig())):  # those, by network_config
            assert re.search(rf"args\.{action.dest}\b", source), action.dest


# ---- the network, as the file or network.json says


@pytest.fixture
def leaky(tmp_path):
    """A snapshot of a network with leaky_relu and R=1, and its network.json."""
    config = NetworkConfig("resnet18", "leaky_relu", 1)
    folder = tmp_path / "leaky"
    save_network(config, CITYSCAPES, folder)
    torch.save(build_model(config).state_dict(), folder / "CS_scenes_1.pth")
    return folder / "CS_scenes_1.pth"


def plain_evaluation(data, checkpoint, *flags):
    """Without --backbone and --output-dir."""
    arguments = ["--data-dir", data, "--restore-from", checkpoint, "--num-workers", 0, "--device", "cpu", *flags]
    return launch(evaluate.evaluate, evaluate.get_parser().parse_args([str(argument) for argument in arguments]))


def test_the_network_is_the_one_of_network_json(scenes, leaky, monkeypatch, capsys):
    built = []
    monkeypatch.setattr(evaluate, "build_model", lambda config: built.append(config) or build_model(config))
    assert plain_evaluation(scenes, leaky) == 0
    assert built == [NetworkConfig("resnet18", "leaky_relu", 1)]
    line = "network: backbone resnet18, backbone_activation leaky_relu, recurrence 1, num_classes 19, stem conv3x3, "
    assert f"{line}head rcca (as {leaky.parent / 'network.json'} says)" in capsys.readouterr().out
    result = json.loads((leaky.parent / "outputs" / "CS_scenes_1" / "val" / "result.json").read_text())
    assert (result["flags"]["backbone_activation"], result["flags"]["recurrence"]) == ("leaky_relu", 1)
    assert plain_evaluation(scenes, leaky, "--recurrence", 3) == 0
    assert built[1] == NetworkConfig("resnet18", "leaky_relu", 3)
    assert "but R, with which it was trained, was 1" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--backbone", "resnet34"], ["--backbone-activation", "identity"]])
def test_a_flag_that_contradicts_network_json_is_refused(scenes, leaky, capsys, flags):
    assert plain_evaluation(scenes, leaky, *flags) == 2
    value = {"--backbone": "resnet18", "--backbone-activation": "leaky_relu"}[flags[0]]
    expected = f"error: {flags[0]} {flags[1]}: the weights are of {value}, as {leaky.parent / 'network.json'} says"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read it"),
        ("[1]", "expected an object with the keys backbone"),
        ('{"backbone": "resnet18"}', "missing: backbone_activation, num_classes, recurrence"),
        ({"stern": "conv7x7"}, "unknown: stern"),
        ({"stem": "deep"}, "stem: expected one of conv3x3, conv3x3_narrow, conv7x7, got 'deep'"),
        ({"recurrence": "2"}, "recurrence: expected a whole number, got '2'"),
        ({"recurrence": True}, "recurrence: expected a whole number, got True"),
        ({"num_classes": -1}, "num_classes: expected 1 or more, got -1"),
        ({"backbone": ["resnet18"]}, "backbone: expected one of resnet18"),
    ],
)
def test_a_damaged_network_json_is_named(tmp_path, content, message):
    text = content if isinstance(content, str) else json.dumps(asdict(NetworkConfig()) | content)
    (tmp_path / "network.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"network.json: .*{message}"):
        read_network(tmp_path)


def test_what_the_file_says_wins_over_network_json(scenes, leaky, monkeypatch):
    """As network.json may be of another run, into whose folder the file was copied."""
    config = NetworkConfig("resnet18", stem="conv7x7", recurrence=1)
    torch.save(described(build_model(config).state_dict(), describe(config, CITYSCAPES)), leaky)
    built = []
    monkeypatch.setattr(evaluate, "build_model", lambda config: built.append(config) or build_model(config))
    assert plain_evaluation(scenes, leaky) == 0
    assert built == [config]


def test_otherwise_the_shapes_say_what_it_is(scenes, checkpoint, tmp_path, capsys):
    assert evaluation(scenes, checkpoint, tmp_path) == 0
    assert f"(as the shapes in {checkpoint} say)" in capsys.readouterr().out


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_shapes_say_backbone_stem_and_classes(tmp_path, backbone, stem):
    config = NetworkConfig(backbone, num_classes=3, stem=stem)
    with torch.device("meta"):
        state = build_model(config).state_dict()
    for names in (lambda key: key, lambda key: f"module.{key}"):
        found = find_network(tmp_path / "x.pth", {names(key): tensor for key, tensor in state.items()})
        known = ("backbone", "stem", "head", "ccl", "num_classes")
        assert found == (config, None, f"the shapes in {tmp_path / 'x.pth'} say", known)
    imagenet = {key: tensor for key, tensor in state.items() if not key.startswith(("head.", "dsn."))}
    assert find_network(tmp_path / "x.pth", imagenet).known == ("backbone", "stem")
    assert find_network(tmp_path / "x.pth", {"weight": torch.zeros(2)}) is None


def test_other_numbers_of_passes_are_compared(scenes, checkpoint, tmp_path, capsys):
    """Each as an evaluation with that --recurrence measures it; the predictions stay those of R=2."""
    for name, flags in (("0", ["--recurrence", 0]), ("2", ["--compare-recurrence", 0, 2])):
        assert evaluation(scenes, checkpoint, tmp_path / name, *flags) == 0
    zero, both = (json.loads((tmp_path / name / "result.json").read_text()) for name in "02")
    assert both["recurrence"]["0"]["classes"] == zero["classes"]
    assert both["recurrence"]["2"]["classes"] == both["classes"] != zero["classes"]
    assert both["gamma"] == 0.5
    output = capsys.readouterr().out
    assert "gamma of the attention: 0.5" in output
    two, none = (f"{100 * result['meanIU']:.2f}" for result in (both, zero))
    assert f"| **mean IoU** | {two} | {none} | {two} |" in output


def test_other_evaluations_stand_beside(scenes, checkpoint, tmp_path, capsys):
    other = tmp_path / "other" / "result.json"
    assert evaluation(scenes, checkpoint, other.parent, "--recurrence", 0) == 0
    capsys.readouterr()
    assert evaluation(scenes, checkpoint, tmp_path / "both", "--compare-with", other) == 0
    mine, beside = (json.loads((tmp_path / name / "result.json").read_text())["meanIU"] for name in ("both", "other"))
    output = capsys.readouterr().out
    assert f"| class | IoU, % | {checkpoint.parent.name} |" in output
    assert f"| **mean IoU** | {100 * mine:.2f} | {100 * beside:.2f} |" in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("[]", "expected an evaluation's result.json"),
        (
            '{"flags": {"restore_from": "a/b.pth"}, "classes": {"road": 1}}',
            r"the 19 classes measured here, found \['road'\]",
        ),
    ],
)
def test_what_is_no_other_evaluation_is_refused(tmp_path, content, message):
    path = tmp_path / "result.json"
    if content:
        path.write_text(content)
    with pytest.raises(CommandError, match=rf"--compare-with {path}: .*{message}"):
        read_others([path], CITYSCAPES.names)


# ---- where results go


def test_results_of_different_evaluations_do_not_mix(scenes, checkpoint, capsys):
    outputs = checkpoint.parent / "outputs" / "CS_scenes_1"
    flags = ["--backbone", "resnet18"]
    for split, count in (("val", 3), ("test", 2)):
        assert plain_evaluation(scenes, checkpoint, *flags, "--split", split, "--submit") == 0
        assert len(list((outputs / split / "submit").iterdir())) == count
    assert plain_evaluation(scenes, checkpoint, *flags, "--whole", "--scales", 1) == 0
    assert not (outputs / "val" / "submit").exists()  # they were of another evaluation
    shutil.rmtree(outputs.parent)


def test_a_folder_of_something_else_is_not_written_to(scenes, checkpoint, tmp_path, capsys):
    mine = tmp_path / "predictions" / "mine.png"
    mine.parent.mkdir()
    mine.write_text("")
    assert evaluation(scenes, checkpoint, tmp_path) == 2
    assert f"--output-dir {tmp_path}: expected a new folder or one of an earlier evaluation, found {mine}" in (
        capsys.readouterr().err
    )
    assert mine.exists()


# ---- errors: one message, no stack trace


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attention", "48,0"], "--attention 48,0: expected a pixel of"),
        (["--attention", "1,1", "--attention-image", "nobody"], "--attention-image nobody: expected an image"),
        (["--attention", "1,1", "--recurrence", "0"], "--attention: expected --head rcca and --recurrence 1 or more"),
        (["--num-classes", "20"], "--num-classes 20: the class table cityscapes has 19 classes"),
        (["--classes", "camvid"], "--classes camvid: has 11 classes, and the weights 19, as the shapes in"),
        (["--backbone", "resnet34"], "--backbone resnet34: the weights are of resnet18, as the shapes in"),
        (["--data-list", "nowhere.lst"], "nowhere.lst: expected a list file"),
        (["--restore-from", "nowhere.pth"], "nowhere.pth: expected a checkpoint, there is no such file"),
    ],
)
def test_errors(scenes, checkpoint, tmp_path, capsys, flags, message):
    assert evaluation(scenes, checkpoint, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


def test_repeated_names_are_refused(scenes, checkpoint, tmp_path, capsys):
    line = str(scan(scenes, "val")[0].image.relative_to(scenes))
    (tmp_path / "x.lst").write_text(f"{line}\n{line}\n")
    assert evaluation(scenes, checkpoint, tmp_path, "--data-list", tmp_path / "x.lst") == 2
    assert "_leftImg8bit.png: expected every image once, found 2 named hafen_000000" in capsys.readouterr().err


def test_what_is_in_the_way_of_the_output_is_named(scenes, checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert evaluation(scenes, checkpoint, tmp_path / "file") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_labels_that_are_all_void_are_refused_and_one_beside_others_counts_nothing(
    scenes, checkpoint, tmp_path, capsys
):
    first, second, _ = scan(scenes, "val")
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(tmp_path / "void.png")
    flags = ["--data-list", tmp_path / "x.lst", "--label-encoding", "ids"]
    (tmp_path / "x.lst").write_text(f"{first.image} {tmp_path / 'void.png'}\n")
    assert evaluation("/", checkpoint, tmp_path / "alone", *flags) == 2
    assert (
        "void.png: expected label ids 0..33 and -1 (255) of cityscapes, found no pixel of a class"
        in capsys.readouterr().err
    )
    results = []
    for line in (f"{first.image} {tmp_path / 'void.png'}\n", ""):
        (tmp_path / "x.lst").write_text(f"{line}{second.image} {second.label}\n")
        assert evaluation("/", checkpoint, tmp_path / "out", *flags) == 0
        results.append(json.loads((tmp_path / "out" / "result.json").read_text(), parse_constant=pytest.fail))
    assert [result["images"] for result in results] == [2, 1]
    assert results[0]["IU_array"] == results[1]["IU_array"]


def test_an_imagenet_backbone_is_no_network_to_evaluate(scenes, checkpoint, tmp_path, capsys):
    state = torch.load(checkpoint, weights_only=True)
    torch.save({name: t for name, t in state.items() if not name.startswith(("head.", "dsn."))}, tmp_path / "b.pth")
    assert evaluation(scenes, tmp_path / "b.pth", tmp_path / "out") == 2
    assert "    dsn.0.bias\n" in capsys.readouterr().err


def test_a_training_state_is_no_state_dict(scenes, tmp_path, capsys):
    arguments = ["--data-dir", scenes, "--snapshot-dir", tmp_path, "--num-steps", 0, "--backbone", "resnet18"]
    args = train.get_parser().parse_args([*map(str, arguments), "--device", "cpu"])
    assert launch(train.train, args) == 0
    assert evaluation(scenes, tmp_path / "CS_scenes_0.training.pth", tmp_path / "out") == 2
    assert "expected a state dict (names to tensors), found other entries: version, step" in capsys.readouterr().err
