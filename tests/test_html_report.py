"""The report in one HTML file: what it shows, and that a browser shows it."""

import base64
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from test_own_data import SMALL, trained

import evaluate
from dataset import CITYSCAPES, ImageFile, load_classes, scan
from dataset.samples import read_train_ids
from utils.html_report import Panel, html_report
from utils.launch import launch
from utils.metrics import ConfusionMatrix
from utils.training_log import TrainingLog, read_scalars


@pytest.fixture(scope="module")
def report(scenes, tmp_path_factory):
    """The report of an evaluation of three scenes, with two of them that a later one has to replace."""
    folder = tmp_path_factory.mktemp("report")
    assert trained(scenes, folder, "--num-steps", 3, "--print-frequency", 1, "--initial-gamma", 1) == 0
    arguments = ["--data-dir", scenes, "--restore-from", folder / "CS_scenes_3.pth", *SMALL, "--report"]
    for _ in range(2):
        assert launch(evaluate.evaluate, evaluate.get_parser().parse_args(list(map(str, arguments)))) == 0
    return folder / "outputs/CS_scenes_3/val/report.html"


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_an_evaluation_writes_a_page_with_everything_in_it(report, scenes):
    page = report.read_text()
    assert not re.search(r"https?://|<script|<link|url\(", page)
    result = {name: value for name, value in re.findall(r"</span> ([\w ]+)</td><td>([\d.]+|absent)</td>", page)}
    assert list(result) == CITYSCAPES.names
    items = scan(scenes, "val")
    confusion = ConfusionMatrix(19)
    scores = {}
    for item in items:
        one = ConfusionMatrix(19)
        prediction = np.asarray(Image.open(report.parent / "predictions" / f"{item.name}.png"))
        one.update(torch.from_numpy(read_train_ids(item, CITYSCAPES)), torch.from_numpy(prediction.copy()))
        confusion.counts += one.counts
        scores[item.name] = one.mean_iou()
    expected = ["absent" if iou != iou else f"{100 * iou:.2f}" for iou in confusion.iou().tolist()]
    assert list(result.values()) == expected
    captions = re.findall(r"<figcaption>(\w+): mean IoU ([\d.]+)</figcaption>", page)
    assert captions == [(name, f"{100 * scores[name]:.2f}") for name in sorted(scores, key=lambda name: scores[name])]
    assert "recurrence 2" in page
    curve = read_scalars(report.parents[3], "loss/total")
    assert [step for step, _ in curve] == [1, 2, 3]
    assert page.count("<polyline") == 1


def test_a_panel_shows_image_truth_prediction_and_errors(report, scenes):
    shown = pictures(report.read_text())
    assert len(shown) == 4  # three images and the attention
    name = re.search(r"<figcaption>(\w+): mean IoU", report.read_text())[1]
    item = next(item for item in scan(scenes, "val") if item.name == name)
    image, label = ImageFile(item.image).read_colour(), read_train_ids(item, CITYSCAPES)
    height, width = label.shape
    assert shown[0].shape == (height, 4 * width, 3)
    prediction = np.asarray(Image.open(report.parent / "predictions" / f"{name}.png"))
    wrong = (label != prediction) & (label != 255)
    assert 0.05 < wrong.mean() < 0.95
    parts = shown[0].reshape(height, 4, width, 3).astype(int).swapaxes(0, 1)
    assert np.abs(parts[0] - image).mean() < 12  # JPEG's colours
    for part, ids in ((parts[1], label), (parts[2], prediction)):
        assert np.abs(part - CITYSCAPES.palette[ids]).mean() < 25
    redness = parts[3][..., 0] - parts[3][..., 1]
    assert redness[wrong].mean() > 100
    assert redness[~wrong].mean() < 60


def test_names_are_escaped_and_classes_that_do_not_occur_are_left_out_of_the_matrix(tmp_path):
    table = tmp_path / "t.toml"
    table.write_text('name = "t"\nclasses = [{name = "a<b"}, {name = "c"}, {name = "never"}]\n')
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]))
    picture = Panel("<x>", np.zeros((4, 4, 3), np.uint8))
    page = html_report("a & b", ["<fact>"], load_classes(table), confusion, {"Some": [picture], "None": []}, [])
    assert "a&lt;b" in page
    assert "&lt;fact&gt;" in page
    assert "<h2>None</h2>" not in page
    assert "<polyline" not in page
    matrix = page[page.index('id="confusion"') :]
    assert "never" not in matrix
    assert re.findall(r">([\d.]+)</td>", matrix) == ["66.7", "33.3", "100.0"]


def test_the_curve_of_a_resumed_run_is_what_it_went_on_from(tmp_path):
    """Not the steps that were logged after the snapshot; and a file that ends in a record is read up to there."""
    for first, last, loss in ((0, 5, 1.0), (3, 6, 2.0)):
        log = TrainingLog(tmp_path, first, 6, 1)
        for step in range(first + 1, last + 1):
            log.scalars(step, 0.1, {"total": loss})
        log.close()
        # Its name is the second in which it began, the same for both.
        written = max(tmp_path.glob("events*"), key=lambda path: path.stat().st_mtime_ns)
        written.rename(tmp_path / f"events.out.tfevents.{first}")
    assert read_scalars(tmp_path, "loss/total") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    newest = tmp_path / "events.out.tfevents.3"
    newest.write_bytes(newest.read_bytes()[:-5])
    assert read_scalars(tmp_path, "loss/total")[:4] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_browser_shows_it(report, tmp_path):
    """The colours of the classes, the red of errors and the line of the curve are on the screen."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2400"]
    command = ["chromium", *flags, f"--screenshot={tmp_path / 'x.png'}", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([*command, report.as_uri()], check=True, capture_output=True, timeout=120)
    screen = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert screen.shape == (2400, 1200, 3)
    colours = {tuple(colour) for colour in np.unique(screen.reshape(-1, 3), axis=0).tolist()}
    assert {tuple(colour) for colour in CITYSCAPES.palette[:19].tolist()} <= colours
    assert (31, 95, 168) in colours  # bars and curve
    red = (screen[..., 0].astype(int) - screen[..., 1] > 120).any(1)
    assert red.sum() > 30
